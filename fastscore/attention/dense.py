"""Varlen attention on a CPU: batched matrix products over spans of segments, and a softmax in fp32 between them.

torch's own fused attention for CPUs works in small blocks; two products with the scores between them in cache are
faster. ``bench/test_cpu_attention.py`` measures it. Queries and keys are multiplied in fp32 whatever their dtype,
weights and values in the values' dtype.

Shapes: T packed tokens, C + T key space, H query heads, K key-value heads, G = H / K, d head size; B spans of a batch,
R queries and k keys of each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastscore.attention.batches import batch_spans
from fastscore.attention.spans import MAX_SCORES, split_spans
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
    """See :class:`fastscore.attention.Attend`; queries and keys may be wider than the values."""
    num_tokens, num_heads, _ = query_THd.shape
    num_kv = key_TKd.shape[1]
    group = num_heads // num_kv
    accumulator = torch.promote_types(query_THd.dtype, torch.float32)
    # A group's heads share their keys: they are further rows of one product.
    queries = _as_rows(query_THd.to(accumulator), group)
    keys, values = _as_rows(key_TKd.to(accumulator), 1), _as_rows(value_TKd, 1)
    # The rows behind the last token take what padding gives.
    out_Nw = value_TKd.new_empty((num_tokens + 1) * num_kv, group * value_TKd.shape[2])
    if pack.num_segment_tokens < num_tokens:
        out_Nw.zero_()
    batches = _batches(pack, pack.narrowed(sliding_window), queries, keys, values, num_heads, num_kv)
    # Used by batches in turn: fresh memory for each would cost as much as the passes over it.
    scores = query_THd.new_empty(num_heads * max(batch.mask_BRk.numel() for batch in batches), dtype=accumulator)
    for batch in batches:
        num_spans, num_queries, num_keys = batch.mask_BRk.shape
        rows_NRd = queries.rows_Nw.index_select(0, batch.query_row).view(num_kv * num_spans, num_queries * group, -1)
        keys_Nkd = keys.rows_Nw.index_select(0, batch.key_row).view(num_kv * num_spans, num_keys, -1)
        values_Nkd = values.rows_Nw.index_select(0, batch.value_row).view(num_kv * num_spans, num_keys, -1)
        scores_KBRGk = scores[: num_heads * batch.mask_BRk.numel()].view(
            num_kv, num_spans, num_queries, group, num_keys
        )
        scores_NRk = scores_KBRGk.view(num_kv * num_spans, num_queries * group, num_keys)
        mask_BR1k = batch.mask_BRk[:, :, None]
        if softcap is None:
            scores_KBRGk.copy_(mask_BR1k.expand(num_kv, -1, -1, group, -1))
            torch.baddbmm(scores_NRk, rows_NRd, keys_Nkd.transpose(1, 2), alpha=scaling, out=scores_NRk)
        else:
            torch.baddbmm(scores_NRk, rows_NRd, keys_Nkd.transpose(1, 2), beta=0, alpha=scaling, out=scores_NRk)
            scores_NRk.div_(softcap).tanh_().mul_(softcap)
            scores_KBRGk += mask_BR1k
        weights_NRk = _softmax(scores_KBRGk, sinks).view(scores_NRk.shape).to(value_TKd.dtype)
        out_NRd = torch.bmm(weights_NRk, values_Nkd)
        out_Nw.index_copy_(0, batch.output_row, out_NRd.view(-1, out_Nw.shape[1]))
    return out_Nw[: num_tokens * num_kv].view(num_tokens, num_heads, value_TKd.shape[2])


class _Rows(NamedTuple):
    """The heads of all tokens as rows of a matrix: those of token t are ``t * step + first`` and the ones after it."""

    rows_Nw: torch.Tensor
    step: int
    first: int


def _as_rows(heads_Thd: torch.Tensor, group: int) -> _Rows:
    """``group`` heads to a row; the same memory where a token's heads lie side by side, as a part of what a projection
    gave, say: rows are gathered anyway, and a copy before would be one too many."""
    num_heads, size = heads_Thd.shape[1:]
    width = group * size
    step, first = heads_Thd.stride(0), heads_Thd.storage_offset()
    if heads_Thd.stride()[1:] != (size, 1) or step % width or first % width:
        heads_Thd = heads_Thd.contiguous()
    if heads_Thd.is_contiguous():
        return _Rows(heads_Thd.view(-1, width), num_heads // group, 0)
    num_rows = heads_Thd.untyped_storage().nbytes() // heads_Thd.element_size() // width
    return _Rows(heads_Thd.as_strided((num_rows, width), (width, 1), 0), step // width, first // width)


class _Batch(NamedTuple):
    """A :class:`SpanBatch` with the rows of all heads: ``[K B R]`` and ``[K B k]``."""

    query_row: torch.Tensor
    key_row: torch.Tensor
    value_row: torch.Tensor
    output_row: torch.Tensor
    mask_BRk: torch.Tensor


def _softmax(scores_KBRGk: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """In place, where that can be."""
    if sinks is None:
        return torch.softmax(scores_KBRGk, dim=-1, out=scores_KBRGk)
    # A sink is one more key that takes probability and gives no value.
    num_kv, *_, group, _ = scores_KBRGk.shape
    sink_KBRG1 = sinks.to(scores_KBRGk.dtype).view(num_kv, 1, 1, group, 1).expand(*scores_KBRGk.shape[:-1], 1)
    return torch.cat([scores_KBRGk, sink_KBRG1], dim=-1).softmax(dim=-1)[..., :-1].contiguous()


def _batches(
    pack: PackedBatch, window: int | None, queries: _Rows, keys: _Rows, values: _Rows, num_heads: int, num_kv: int
) -> list[_Batch]:
    """Made once for all layers that share the window and lay out their heads alike."""
    layout = tuple((rows.step, rows.first) for rows in (queries, keys, values))
    key = ("dense", window, layout)
    if key not in pack.memo:
        num_tokens = len(pack.token_ids_T)
        spans = split_spans(pack, window, num_heads, queries.rows_Nw.dtype)
        heads_K11 = torch.arange(num_kv)[:, None, None]

        def of_every_head(token_BN: torch.Tensor, step: int, first: int) -> torch.Tensor:
            return (token_BN * step + first + heads_K11).flatten()

        pack.memo[key] = [
            _Batch(
                of_every_head(batch.query_row_BR, queries.step, queries.first),
                of_every_head(batch.key_row_Bk, keys.step, keys.first),
                of_every_head(batch.key_row_Bk, values.step, values.first),
                of_every_head(batch.output_row_BR, num_kv, 0),
                batch.mask_BRk,
            )
            for batch in batch_spans(spans, num_tokens, MAX_SCORES // num_heads)
        ]
    batches: list[_Batch] = pack.memo[key]
    return batches
