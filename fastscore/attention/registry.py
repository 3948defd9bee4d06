"""Which providers there are, and which of them a model on a device can use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from fastscore.types import InputError, PackedBatch

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("fastscore")


class Attend(Protocol):
    """Varlen causal attention over a pack.

    ``query_THd`` ``[T, H, d]``; keys ``[C + T, K, d]`` and values ``[C + T, K, dv]`` over the pack's key space, K
    divides H. Returns ``[T, H, dv]``; rows that belong to no segment are zero.
    """

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
class AttentionNeeds:
    """What a model asks of attention on a device; found by running it once (see :mod:`fastscore.self_check`)."""

    device_type: str
    dtype: str = "float32"
    head_size: int = 64
    value_head_size: int = 64
    sliding_window: bool = False
    softcap: bool = False
    sinks: bool = False
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class Provider:
    """A way to compute varlen attention. ``unusable`` says why it cannot serve ("" when it can); ``wide``: it takes
    queries and keys in fp32 beside values of lower precision."""

    name: str
    module: str
    description: str
    unusable: Callable[[AttentionNeeds], str]
    wide: bool = False

    def load(self) -> Attend:
        """The provider's function, imported now.

        Raises:
            ImportError: a package that it needs is not there, or broken; ``unusable`` only looks whether it is there.
        """
        attend: Attend = import_module(self.module).attend
        return attend


def _flash(package: str, install: str, largest_head: int, softcap: bool) -> Callable[[AttentionNeeds], str]:
    def unusable(needs: AttentionNeeds) -> str:
        return (
            _not_cuda(needs)
            or ("" if _has(package) else f"{package} is not installed ({install})")
            or _half_only(needs)
            or _head_sizes(needs, largest_head)
            or ("it has no soft cap" if needs.softcap and not softcap else "")
        )

    return unusable


def _torch_varlen_unusable(needs: AttentionNeeds) -> str:
    return (
        _not_cuda(needs)
        or ("" if _has("torch.nn.attention.varlen") else "this torch has no varlen attention (2.11 has)")
        or _half_only(needs)
        or _head_sizes(needs, 256)
        or ("it has no soft cap" if needs.softcap else "")
    )


def _dense_unusable(needs: AttentionNeeds) -> str:
    if needs.deterministic:
        return "its sums depend on what else is in the pack"
    return "" if needs.device_type == "cpu" else "it is made for CPUs"


def _blocked_unusable(needs: AttentionNeeds) -> str:
    return "" if needs.deterministic else "it costs more and serves --deterministic only"


def _reference_unusable(needs: AttentionNeeds) -> str:
    return "its sums depend on how a request is cut into segments" if needs.deterministic else ""


def _not_cuda(needs: AttentionNeeds) -> str:
    if needs.deterministic:
        return "its sums depend on how a request is cut into segments"
    return "" if needs.device_type == "cuda" else f"it runs on CUDA, not on {needs.device_type}"


def _half_only(needs: AttentionNeeds) -> str:
    return "" if needs.dtype in ("bfloat16", "float16") else f"it takes bf16 and fp16, not {needs.dtype}"


def _head_sizes(needs: AttentionNeeds, largest: int) -> str:
    if needs.head_size != needs.value_head_size:
        return "keys and values differ in head size"
    if needs.head_size > largest or needs.head_size % 8:
        return f"its head sizes are multiples of 8 up to {largest}, not {needs.head_size}"
    return ""


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing or broken
        return False


# In the order of preference.
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(
            "flash-attn-4",
            "fastscore.attention.flash_attn_4",
            "FlashAttention 4 (flash_attn.cute), Hopper and Blackwell",
            _flash("flash_attn.cute", "pip install flash-attn-4", 128, softcap=True),
        ),
        Provider(
            "flash-attn-3",
            "fastscore.attention.flash_attn_3",
            "FlashAttention 3 (flash_attn_interface), Hopper",
            _flash("flash_attn_interface", "built from the flash-attention repository", 256, softcap=True),
        ),
        Provider(
            "flash-attn-2",
            "fastscore.attention.flash_attn_2",
            "FlashAttention 2 (flash_attn)",
            _flash("flash_attn", "pip install 'fastscore[flash-attn]'", 256, softcap=True),
        ),
        Provider(
            "torch-varlen",
            "fastscore.attention.torch_varlen",
            "torch's own varlen attention (FlashAttention 2)",
            _torch_varlen_unusable,
        ),
        Provider(
            "dense",
            "fastscore.attention.dense",
            "matrix products over neighbouring segments together, with a mask",
            _dense_unusable,
            wide=True,
        ),
        Provider(
            "blocked",
            "fastscore.attention.blocked",
            "blocks of fixed shape at fixed positions: the same sums whatever is in the pack",
            _blocked_unusable,
            wide=True,
        ),
        Provider(
            "reference",
            "fastscore.attention.reference",
            "plain PyTorch, one segment at a time; every option",
            _reference_unusable,
            wide=True,
        ),
    )
}


def choose_provider(name: str, needs: AttentionNeeds, passed_over: Collection[str] = ()) -> Provider:
    """The provider of that name, or for ``auto`` the first that can serve and is not among ``passed_over``.

    Raises:
        InputError: an unknown name, or a named provider that cannot serve.
    """
    if name == "auto":
        for provider in PROVIDERS.values():
            if provider.name in passed_over:
                continue
            if not (reason := provider.unusable(needs)):
                return provider
            # What the device or an installation lacks is no news; what this model asks for is, and is said once.
            news = not passed_over and not provider.unusable(_any_model(needs))
            logger.log(
                logging.INFO if news else logging.DEBUG, "attention by %s is not possible: %s", provider.name, reason
            )
        raise InputError("no attention provider can serve this model on this device")
    if name not in PROVIDERS:
        raise InputError(f"unknown attention provider {name!r}; known: auto, {', '.join(PROVIDERS)}")
    if reason := PROVIDERS[name].unusable(needs):
        raise InputError(f"attention provider {name!r} cannot be used: {reason}")
    return PROVIDERS[name]


def _any_model(needs: AttentionNeeds) -> AttentionNeeds:
    """What a model that asks for nothing special needs on that device."""
    return AttentionNeeds(needs.device_type, "bfloat16", deterministic=needs.deterministic)


def available_providers(needs: AttentionNeeds) -> list[tuple[str, bool, str]]:
    """(name, usable, reason or description) of every provider, in the order of preference."""
    return [
        (provider.name, not (reason := provider.unusable(needs)), reason or provider.description)
        for provider in PROVIDERS.values()
    ]
