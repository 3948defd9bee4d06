"""fastscore's own forward pass around an attention provider."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastscore.attention import Provider
from fastscore.config import ScorerConfig
from fastscore.decoder import Decoder, OwnForward, choose_operators
from fastscore.error_text import error_text
from fastscore.types import PackForward, dtype_name


@dataclass(frozen=True, slots=True)
class ChosenForward:
    """The forward pass over packs; ``name`` says in words whose layers run and how, for logs and metadata."""

    provider: Provider
    forward: PackForward
    name: str


def broken(provider: Provider) -> str:
    """Why a provider's library, which is there, cannot be imported; or ""."""
    try:
        provider.load()
    except Exception as error:  # noqa: BLE001 - a library may fail in any way; said, and the next one taken
        return f"importing it fails ({error_text(error)})"
    return ""


def own_forward(decoder: Decoder, device: torch.device, config: ScorerConfig, provider: Provider) -> ChosenForward:
    """The forward pass of a decoder, as the config asks for it. Nothing is run; weights may be laid out anew."""
    residual = decoder.dtype if config.residual == "model" else torch.float32
    operators = choose_operators(device, decoder.dtype, residual, wide=provider.wide, compiled=config.compiled)
    forward = OwnForward(operators.prepare(decoder), operators, provider.load(), in_order=config.deterministic)
    name = f"fastscore's, residual stream in {dtype_name(residual)}, {operators.description}"
    return ChosenForward(provider, forward, name)
