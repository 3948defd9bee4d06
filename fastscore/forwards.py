"""How a model that runs packs is run: which attention provider, and whose layers around it. Each is tried on the model
before it is taken."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from fastscore.attention import AttentionNeeds, Provider, choose_provider
from fastscore.config import ScorerConfig
from fastscore.decoder import OwnForward, choose_operators, read_decoder
from fastscore.packed_forward import ModelForward, PackForward, body_of
from fastscore.self_check import check_forward, check_provider
from fastscore.types import InputError, dtype_name

logger = logging.getLogger("fastscore")


@dataclass(frozen=True, slots=True)
class ChosenForward:
    """The forward pass over packs; ``name`` says in words whose layers run and how, for logs and metadata."""

    provider: Provider
    forward: PackForward
    name: str


def choose_forward(model: PreTrainedModel, config: ScorerConfig, needs: AttentionNeeds) -> ChosenForward:
    """fastscore's own forward pass where it knows the model's layers and agrees with them, otherwise the model's.

    Raises:
        InputError: a provider or a forward pass that was asked for cannot serve this model.
    """
    provider = _working_provider(model, config.attention, replace(needs, deterministic=config.deterministic))
    if config.forward == "model":
        return ChosenForward(provider, ModelForward(model, provider.load()), "the model's own layers")
    found = _own_forward(model, config, provider)
    if isinstance(found, ChosenForward):
        return found
    if config.own_forward_option:
        raise InputError(f"{config.own_forward_option} is not possible with this model: {found}")
    logger.info("the model's own layers run: %s", found)
    return ChosenForward(provider, ModelForward(model, provider.load()), f"the model's own layers: {found}")


def _own_forward(model: PreTrainedModel, config: ScorerConfig, provider: Provider) -> ChosenForward | str:
    decoder = read_decoder(model, body_of(model))
    if isinstance(decoder, str):
        return decoder
    residual = decoder.dtype if config.residual == "model" else torch.float32
    operators = choose_operators(model.device, decoder.dtype, residual, wide=provider.wide, compiled=config.compiled)
    forward = OwnForward(operators.prepare(decoder), operators, provider.load(), in_order=config.deterministic)
    if reason := check_forward(model, forward, model.device):
        logger.warning("fastscore's own forward pass is not used: %s", reason)
        return f"fastscore's own forward pass was tried: {reason}"
    name = f"fastscore's, residual stream in {dtype_name(residual)}, {operators.description}"
    return ChosenForward(provider, forward, name)


def _working_provider(model: PreTrainedModel, name: str, needs: AttentionNeeds) -> Provider:
    """The provider of that name, or the first that can serve; it is tried on this model before it is taken."""
    passed_over: set[str] = set()
    while True:
        provider = choose_provider(name, needs, passed_over)
        if not (reason := check_provider(model, provider.load(), model.device)):
            return provider
        if name != "auto":
            raise InputError(f"attention provider {name!r} cannot be used: {reason}")
        logger.warning("attention by %s passed over: %s", provider.name, reason)
        passed_over.add(provider.name)
