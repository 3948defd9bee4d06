"""How a model that runs packs is run: which attention provider, and whose layers around it. Each is tried on the model
before it is taken."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from fastscore.attention import AttentionNeeds, choose_provider
from fastscore.config import ScorerConfig
from fastscore.decoder import Decoder, read_decoder
from fastscore.own_forward import ChosenForward, broken, own_forward
from fastscore.packed_forward import ModelForward, body_of
from fastscore.probes import Truth
from fastscore.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fastscore")


def choose_forward(model: PreTrainedModel, config: ScorerConfig, needs: AttentionNeeds, truth: Truth) -> ChosenForward:
    """fastscore's own forward pass where it knows the model's layers and agrees with them, otherwise the model's.

    The attention provider is the one asked for, or the first that can serve and is right on this model, which runs
    packs: ``truth`` is what it gives.

    Raises:
        InputError: a provider or a forward pass that was asked for cannot serve this model.
    """
    needs = replace(needs, deterministic=config.deterministic)
    decoder = None if config.forward == "model" else read_decoder(model, body_of(model))
    passed_over: set[str] = set()
    while True:
        provider = choose_provider(config.attention, needs, passed_over)
        reason = ""
        if not (wrong := broken(provider)):
            if isinstance(decoder, Decoder):
                own = own_forward(decoder, model.device, config, provider)
                # The provider's attention is compared in the same pass.
                if not (reason := truth.difference(own.forward)):
                    return own
                del own  # it may hold the weights once more
            if not (wrong := truth.difference(ModelForward(model, provider.load()))):
                break
        if config.attention != "auto":
            raise InputError(f"attention provider {config.attention!r} cannot be used: {wrong}")
        logger.warning("attention by %s passed over: %s", provider.name, wrong)
        passed_over.add(provider.name)
    name = "the model's own layers"
    if reason:
        logger.warning("fastscore's own forward pass is not used: %s", reason)
        reason = f"fastscore's own forward pass was tried: {reason}"
    elif isinstance(decoder, str):
        reason = decoder
    if reason:
        if config.own_forward_option:
            raise InputError(f"{config.own_forward_option} is not possible with this model: {reason}")
        logger.info("%s run: %s", name, reason)
        name = f"{name}: {reason}"
    return ChosenForward(provider, ModelForward(model, provider.load()), name)
