"""How a model that runs packs is run: which attention provider, and whose layers around it. Each is tried on the model
before it is taken."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from fastscore.attention import AttentionNeeds, Provider, choose_provider
from fastscore.config import ScorerConfig
from fastscore.decoder import Decoder, OwnForward, choose_operators, read_decoder
from fastscore.packed_forward import ModelForward, PackForward, body_of
from fastscore.self_check import SelfCheck, error_text
from fastscore.types import InputError, dtype_name

logger = logging.getLogger("fastscore")


@dataclass(frozen=True, slots=True)
class ChosenForward:
    """The forward pass over packs; ``name`` says in words whose layers run and how, for logs and metadata."""

    provider: Provider
    forward: PackForward
    name: str


def choose_forward(
    model: PreTrainedModel, config: ScorerConfig, needs: AttentionNeeds, check: SelfCheck
) -> ChosenForward:
    """fastscore's own forward pass where it knows the model's layers and agrees with them, otherwise the model's.

    The attention provider is the one asked for, or the first that can serve and is right on this model. ``check`` has
    found that the model runs packs.

    Raises:
        InputError: a provider or a forward pass that was asked for cannot serve this model.
    """
    needs = replace(needs, deterministic=config.deterministic)
    decoder = None if config.forward == "model" else read_decoder(model, body_of(model))
    passed_over: set[str] = set()
    while True:
        provider = choose_provider(config.attention, needs, passed_over)
        reason = ""
        if not (wrong := _broken(provider)):
            if isinstance(decoder, Decoder):
                own = _own_forward(decoder, model.device, config, provider)
                if not (reason := check.forward(own.forward)):  # and so is the provider's attention, in the same pass
                    return own
                del own  # it may hold the weights once more
            if not (wrong := check.provider(provider.load())):
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


def _broken(provider: Provider) -> str:
    """Why a provider's library, which is there, cannot be imported; or ""."""
    try:
        provider.load()
    except Exception as error:  # noqa: BLE001 - a library may fail in any way; said, and the next one taken
        return f"importing it fails ({error_text(error)})"
    return ""


def _own_forward(decoder: Decoder, device: torch.device, config: ScorerConfig, provider: Provider) -> ChosenForward:
    residual = decoder.dtype if config.residual == "model" else torch.float32
    operators = choose_operators(device, decoder.dtype, residual, wide=provider.wide, compiled=config.compiled)
    forward = OwnForward(operators.prepare(decoder), operators, provider.load(), in_order=config.deterministic)
    name = f"fastscore's, residual stream in {dtype_name(residual)}, {operators.description}"
    return ChosenForward(provider, forward, name)
