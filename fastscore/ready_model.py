"""A model that was found out about, ready for scoring."""

from __future__ import annotations

import logging
from typing import Any

import torch

from fastscore.budget import default_budget
from fastscore.config import ScorerConfig
from fastscore.decoder import OwnForward
from fastscore.devices import DTYPES
from fastscore.language_model import LanguageModel
from fastscore.lm_head import LMHead
from fastscore.own_forward import ChosenForward
from fastscore.types import dtype_name

logger = logging.getLogger("fastscore")


def ready_model(
    model: Any,
    head: LMHead,
    device: torch.device,
    config: ScorerConfig,
    chosen: ChosenForward | None,
    *,
    mode: str = "packed",
    reason: str = "",
    longest_packed: int | None = None,
) -> LanguageModel:
    """The model as the config wants it run, and a line about it in the log.

    Args:
        model: with its ``config`` and ``dtype``.
        chosen: how its packs are run; None where it runs without, for that ``reason``.
    """
    forward = None if chosen is None else chosen.forward
    loaded = LanguageModel(
        model=model,
        head=head,
        device=device,
        dtype=model.dtype,
        provider=None if chosen is None else chosen.provider,
        forward=forward,
        forward_name="the model's own layers" if chosen is None else chosen.name,
        mode=mode,
        reason=reason,
        max_batch_tokens=config.max_batch_tokens
        or default_budget(
            model.config, device, forward.decoder.dtype if isinstance(forward, OwnForward) else model.dtype
        ),
        share_prefixes=config.share_prefixes,
        deterministic=config.deterministic,
        longest_packed=longest_packed,
    )
    name = short_dtype(model.dtype)
    if chosen is not None:
        logger.info("%s, %s, packed, attention by %s", device, name, chosen.provider.name)
    else:
        logger.warning("%s, %s, not packed: %s", device, name, reason)
    return loaded


def short_dtype(dtype: torch.dtype) -> str:
    """As ``--dtype`` has it."""
    return next((name for name, known in DTYPES.items() if known == dtype), dtype_name(dtype))
