"""Varlen attention by torch's scaled_dot_product_attention, segment by segment: the CPU's provider and the truth.

Shapes: T packed tokens, H query heads, K key-value heads, d head size; lower-case q and k are one segment's tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastscore.types import PackedBatch


def attend(
    query_THd: torch.Tensor,
    key_TKd: torch.Tensor,
    value_TKd: torch.Tensor,
    pack: PackedBatch,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention within each segment, queries aligned to the end of the keys (bottom-right)."""
    out_THd = query_THd.new_empty(query_THd.shape[0], query_THd.shape[1], value_TKd.shape[2])
    first_q = first_k = 0
    for length_q, length_k in zip(pack.seqlens_q, pack.seqlens_k, strict=True):
        q, k = slice(first_q, first_q + length_q), slice(first_k, first_k + length_k)
        mask_qk = _mask(length_q, length_k, sliding_window, query_THd.device)
        query_Hqd, key_Kkd, value_Kkd = (tensor.transpose(0, 1) for tensor in (query_THd[q], key_TKd[k], value_TKd[k]))
        if softcap is None and sinks is None:
            out_Hqd = F.scaled_dot_product_attention(
                query_Hqd[None],
                key_Kkd[None],
                value_Kkd[None],
                attn_mask=mask_qk,
                is_causal=mask_qk is None,
                scale=scaling,
                enable_gqa=query_Hqd.shape[0] != key_Kkd.shape[0],
            )[0]
        else:
            if mask_qk is None:
                mask_qk = torch.ones(length_q, length_k, dtype=torch.bool, device=query_THd.device).tril()
            out_Hqd = _attend_explicitly(query_Hqd, key_Kkd, value_Kkd, mask_qk, scaling, softcap, sinks)
        out_THd[q] = out_Hqd.transpose(0, 1)
        first_q, first_k = q.stop, k.stop
    return out_THd


def _mask(length_q: int, length_k: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """True where a query may look, or None for the plain causal square."""
    windowed = sliding_window is not None and length_k > sliding_window
    if length_q == length_k and not windowed:
        return None
    query_q = torch.arange(length_k - length_q, length_k, device=device)[:, None]
    key_k = torch.arange(length_k, device=device)[None, :]
    mask_qk = key_k <= query_q
    if sliding_window is not None and windowed:
        mask_qk &= key_k > query_q - sliding_window
    return mask_qk


def _attend_explicitly(
    query_Hqd: torch.Tensor,
    key_Kkd: torch.Tensor,
    value_Kkd: torch.Tensor,
    mask_qk: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a soft cap on its scores (Gemma 2) or a learned sink per head (gpt-oss), softmax in fp32."""
    groups = query_Hqd.shape[0] // key_Kkd.shape[0]
    key_Hkd, value_Hkd = (tensor.repeat_interleave(groups, dim=0) for tensor in (key_Kkd, value_Kkd))
    scores_Hqk = (query_Hqd @ key_Hkd.transpose(1, 2)).float() * scaling
    if softcap is not None:
        scores_Hqk = torch.tanh(scores_Hqk / softcap) * softcap
    scores_Hqk = scores_Hqk.masked_fill(~mask_qk, -torch.inf)
    if sinks is None:
        weights_Hqk = scores_Hqk.softmax(dim=-1)
    else:
        # A sink is one more key that takes probability and gives no value.
        sink_Hq1 = sinks.float()[:, None, None].expand(-1, scores_Hqk.shape[1], 1)
        weights_Hqk = torch.cat([scores_Hqk, sink_Hq1], dim=-1).softmax(dim=-1)[..., :-1]
    return weights_Hqk.to(value_Hkd.dtype) @ value_Hkd
