"""torch's own varlen attention: FlashAttention 2 inside PyTorch, from 2.11 on."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from fastscore.attention.varlen import VarlenCall, attend_varlen

# Since 2.12 fewer key heads than query heads have to be asked for; 2.11 takes them as they are.
_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _varlen(
    query_qHd: torch.Tensor,
    key_kKd: torch.Tensor,
    value_kKd: torch.Tensor,
    call: VarlenCall,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    assert softcap is None, "the registry keeps models with a soft cap away"
    causal_window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    result: Any = varlen_attn(
        query_qHd,
        key_kKd,
        value_kKd,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.max_seqlen_q,
        call.max_seqlen_k,
        return_aux=AuxRequest(lse=True) if with_lse else None,
        scale=scaling,
        window_size=causal_window if call.causal else (-1, -1),
        **(_GQA if query_qHd.shape[1] != key_kKd.shape[1] else {}),
    )
    if not with_lse:
        return result, None
    out_qHd, lse_Hq = result
    return out_qHd, lse_Hq.transpose(0, 1)


attend = partial(attend_varlen, _varlen)
