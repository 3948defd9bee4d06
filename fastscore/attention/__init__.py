"""One varlen attention interface, several providers, imported only when they are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from fastscore.types import InputError, PackedBatch

if TYPE_CHECKING:
    import torch


class Attend(Protocol):
    """Varlen causal attention over a pack. ``query_THd`` ``[T, H, d]``, keys and values ``[T, K, d]``, K divides H."""

    def __call__(
        self,
        query_THd: torch.Tensor,
        key_TKd: torch.Tensor,
        value_TKd: torch.Tensor,
        pack: PackedBatch,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Provider:
    """A way to compute varlen attention. ``unusable`` says why it cannot run on a device ("" when it can)."""

    name: str
    module: str
    description: str
    unusable: Callable[[str], str]

    def load(self) -> Attend:
        attend: Attend = import_module(self.module).attend
        return attend


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(
            name="sdpa",
            module="fastscore.attention.sdpa",
            description="torch's scaled_dot_product_attention, one call per segment",
            unusable=lambda device_type: "",
        ),
    )
}


def choose_provider(name: str, device_type: str) -> Provider:
    """The provider of that name, or for ``auto`` the first one that runs on the device.

    Raises:
        InputError: an unknown name, or a named provider that cannot run there.
    """
    if name == "auto":
        return next(provider for provider in PROVIDERS.values() if not provider.unusable(device_type))
    if name not in PROVIDERS:
        raise InputError(f"unknown attention provider {name!r}; known: auto, {', '.join(PROVIDERS)}")
    if reason := PROVIDERS[name].unusable(device_type):
        raise InputError(f"attention provider {name!r} cannot be used: {reason}")
    return PROVIDERS[name]


def available_providers(device_type: str = "cpu") -> list[tuple[str, bool, str]]:
    """(name, usable, reason or description) of every provider, in the order of preference."""
    return [
        (provider.name, not (reason := provider.unusable(device_type)), reason or provider.description)
        for provider in PROVIDERS.values()
    ]
