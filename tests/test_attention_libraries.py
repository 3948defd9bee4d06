"""Providers that stand on a library's kernels for GPUs: with functions of the same signatures that compute on a CPU.

They take their arguments for what the libraries' own documentation says; on a GPU, ``test_attention_gpu.py`` runs what
is installed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_truth import OPTIONS, cpu_varlen, inputs, packs_of, shared_requests, truth

from fastscore.attention import varlen
from fastscore.attention.varlen import VarlenCall

Result = tuple[torch.Tensor, torch.Tensor]


def computed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor, int, int],
    *,
    scale: float,
    causal: bool,
    window: tuple[int | None, int | None],
    softcap: float,
) -> Result:
    """Output and log-sum-exp ``[H, q]``. Of a window (left, right), negative or None is no limit; left leaves out the
    query's own key."""
    left, right = (-1 if side is None else side for side in window)
    causal = causal or right == 0
    assert causal or left < 0, "here a window is asked for together with causality alone"
    call = VarlenCall(None, None, *bounds, causal)
    out, lse = cpu_varlen(
        query,
        key,
        value,
        call,
        scaling=scale,
        sliding_window=left + 1 if left >= 0 else None,
        softcap=softcap or None,
        with_lse=True,
    )
    assert lse is not None
    return out, lse.transpose(0, 1)


def flash_attn_2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    assert softmax_scale is not None
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = computed(q, k, v, bounds, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_3(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_attn_probs: bool = False,
) -> Any:
    assert softmax_scale is not None
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    found = computed(q, k, v, bounds, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap)
    return found if return_attn_probs else found[0]


def flash_attn_3_older(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Any:
    return flash_attn_3(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size,
        softcap,
        return_attn_probs=True,
    )


def flash_attn_4(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Any:
    assert qv is None
    assert cu_seqlens_q is not None
    assert cu_seqlens_k is not None
    assert max_seqlen_q is not None
    assert max_seqlen_k is not None
    assert softmax_scale is not None
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = computed(q, k, v, bounds, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap)
    return out, lse if return_lse else None


def torch_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Any:
    assert enable_gqa or query.shape[1] == key.shape[1], "fewer key heads must be asked for"
    return torch_varlen_older(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale, window_size=window_size
    )


def torch_varlen_older(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    assert scale is not None
    bounds = (cu_seq_q, cu_seq_k, max_q, max_k)
    found = computed(query, key, value, bounds, scale=scale, causal=False, window=window_size, softcap=0.0)
    return found if return_aux is not None and return_aux.lse else found[0]


LIBRARIES: dict[str, tuple[str, str, str, Callable[..., Any]]] = {
    "flash-attn-2": ("flash_attn_2", "flash_attn", "flash_attn_varlen_func", flash_attn_2),
    "flash-attn-3": ("flash_attn_3", "flash_attn_interface", "flash_attn_varlen_func", flash_attn_3),
    "flash-attn-3, older": ("flash_attn_3", "flash_attn_interface", "flash_attn_varlen_func", flash_attn_3_older),
    "flash-attn-4": ("flash_attn_4", "flash_attn.cute", "flash_attn_varlen_func", flash_attn_4),
    "torch-varlen": ("torch_varlen", "torch.nn.attention.varlen", "varlen_attn", torch_varlen),
    "torch-varlen, 2.11": ("torch_varlen", "torch.nn.attention.varlen", "varlen_attn", torch_varlen_older),
}


@pytest.fixture(params=LIBRARIES)
def attend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The provider, imported anew with the library's function in place."""
    name, library, function, instead = LIBRARIES[request.param]
    place = f"fastscore.attention.{name}"
    monkeypatch.delitem(sys.modules, place, raising=False)
    if library.startswith("torch"):
        monkeypatch.setattr(f"{library}.{function}", instead)
    else:
        for depth in range(1, library.count(".") + 2):
            package = ".".join(library.split(".")[:depth])
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
        setattr(sys.modules[library], function, instead)
    yield importlib.import_module(place).attend
    sys.modules.pop(place, None)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("min_keys", [4, 10_000])
def test_arguments_mean_what_the_library_takes_them_for(
    options: str, min_keys: int, attend: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "MIN_RECTANGLE_KEYS", min_keys)
    asked: dict[str, Any] = {"sliding_window": None, "softcap": None, "sinks": None, "scaling": 0.3} | OPTIONS[options]
    if asked["softcap"] is not None and "torch" in request.node.callspec.params["attend"]:
        asked["softcap"] = None  # the registry gives it no model that has one
    for size in (1000, 17):
        for pack in packs_of(shared_requests(1), size):
            query, key, value = inputs(pack, torch.float32)
            out = attend(query, key, value, pack, **asked)
            torch.testing.assert_close(out.double(), truth(query, key, value, pack, **asked), rtol=1e-5, atol=2e-6)
