"""Varlen attention on a CPU by the operator below torch's scaled_dot_product_attention, a span of segments in one call.

Shapes: T packed tokens, H query heads, K key-value heads, G = H / K, d head size; q queries and k keys of a span.
"""

from __future__ import annotations

import torch

from fastscore.attention.spans import Span, split_spans
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
    """See :class:`fastscore.attention.Attend`. No soft cap."""
    assert softcap is None, "the registry keeps models with a soft cap away"
    window = sliding_window if sliding_window is not None and sliding_window < pack.max_seqlen_k else None
    num_kv = key_TKd.shape[1]
    shape_KG = (num_kv, query_THd.shape[1] // num_kv)
    out_THd = query_THd.new_empty(query_THd.shape)
    out_THd[pack.num_segment_tokens :] = 0
    query_KGTd, out_KGTd = (tensor.transpose(0, 1).unflatten(0, shape_KG) for tensor in (query_THd, out_THd))
    key_KTd, value_KTd = key_TKd.transpose(0, 1), value_TKd.transpose(0, 1)
    for span in _spans(pack, window, query_THd.dtype):
        queries = slice(span.first_q, span.last_q)
        # This operator and not the public function, because it gives the log-sum-exp too.
        out_KGqd, lse_KGq = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_KGTd[:, :, queries],
            _seen(key_KTd, span, shape_KG[1]),
            _seen(value_KTd, span, shape_KG[1]),
            is_causal=span.mask_11qk is None,
            attn_mask=span.mask_11qk,
            scale=scaling,
        )
        if sinks is not None:
            # A sink, one logit a head, takes its share of the probability and gives no value.
            out_KGqd = out_KGqd * torch.sigmoid(lse_KGq - sinks.float().view(*shape_KG, 1))[..., None]
        out_KGTd[:, :, queries] = out_KGqd
    return out_THd


def _seen(tensor_KTd: torch.Tensor, span: Span, group: int) -> torch.Tensor:
    """The span's keys ``[K, G, k, d]``: no copy where they are one run, and a stride of 0 repeats them for a group."""
    parts = [tensor_KTd[:, start:stop] for start, stop in span.key_runs]
    rows_Kkd = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return rows_Kkd[:, None].expand(-1, group, -1, -1)


def _spans(pack: PackedBatch, window: int | None, dtype: torch.dtype) -> list[Span]:
    """Made once for all layers that share the window."""
    key = ("sdpa", window)
    if key not in pack.memo:
        pack.memo[key] = split_spans(pack, window, dtype)
    spans: list[Span] = pack.memo[key]
    return spans
