"""FlashAttention 2 (package flash_attn)."""

from __future__ import annotations

from functools import partial

import torch
from flash_attn import flash_attn_varlen_func

from fastscore.attention.varlen import VarlenCall, attend_varlen


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
    result = flash_attn_varlen_func(
        query_qHd,
        key_kKd,
        value_kKd,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_k=call.max_seqlen_k,
        softmax_scale=scaling,
        causal=call.causal,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
        return_attn_probs=with_lse,
    )
    if not with_lse:
        return result, None
    out_qHd, lse_Hq, _ = result
    return out_qHd, lse_Hq.transpose(0, 1)


attend = partial(attend_varlen, _varlen)
