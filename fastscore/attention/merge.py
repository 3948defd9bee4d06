"""Attention computed in parts, put together by the log-sum-exp of each part.

Shapes: T packed tokens, H query heads, K key-value heads, d head size; q and k the queries and keys of a rectangle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from fastscore.attention.split import AttentionParts, Rectangle


def merge_parts(
    out_THd: torch.Tensor,
    lse_TH: torch.Tensor,
    parts: Iterable[tuple[slice, torch.Tensor, torch.Tensor]],
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Each part ``(queries, out_qHd, lse_qH)`` into ``out_THd``; the weights of the sum are in fp32.

    ``sinks``, one logit a head, take their share of the probability at the end and give no value.
    """
    merged_THd = out_THd.float()
    for queries, out_qHd, lse_qH in parts:
        both_qH = torch.logaddexp(lse_TH[queries], lse_qH)
        merged_THd[queries] *= (lse_TH[queries] - both_qH).exp()[:, :, None]
        merged_THd[queries] += (lse_qH - both_qH).exp()[:, :, None] * out_qHd
        lse_TH[queries] = both_qH
    if sinks is not None:
        # Rows of no segment have an LSE of -inf and stay zero.
        merged_THd *= torch.sigmoid(lse_TH - sinks.float())[:, :, None]
    return merged_THd.to(out_THd.dtype)


def rectangle_attention(
    query_THd: torch.Tensor, key_TKd: torch.Tensor, value_TKd: torch.Tensor, parts: AttentionParts, scaling: float
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The rectangles on a CPU, in order."""
    for rectangle in parts.rectangles:
        queries = slice(rectangle.first_q, rectangle.last_q)
        yield queries, *_rectangle(query_THd[queries], key_TKd, value_TKd, rectangle, scaling)


def _rectangle(
    query_qHd: torch.Tensor, key_TKd: torch.Tensor, value_TKd: torch.Tensor, rectangle: Rectangle, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    keys = slice(rectangle.first_k, rectangle.last_k)
    num_q, num_heads, _ = query_qHd.shape
    num_kv = key_TKd.shape[1]
    # Without a mask, the query heads that share a key head are just more queries.
    folded_Kqd = query_qHd.unflatten(1, (num_kv, num_heads // num_kv)).permute(1, 0, 2, 3).flatten(1, 2)
    out_Kqd, lse_Kq = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        folded_Kqd[None], key_TKd[keys].transpose(0, 1)[None], value_TKd[keys].transpose(0, 1)[None], scale=scaling
    )
    out_qHd = out_Kqd[0].unflatten(1, (num_q, -1)).transpose(0, 1).flatten(1, 2)
    return out_qHd.float(), lse_Kq[0].unflatten(1, (num_q, -1)).transpose(0, 1).flatten(1, 2).float()
