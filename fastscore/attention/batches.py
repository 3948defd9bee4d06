"""Spans of a pack in batches of near-equal size, each computed by one batched product.

Shapes: B spans of a batch, R its queries (those of the longest span), k its keys, T packed tokens, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastscore.attention.spans import Span
from fastscore.ranges import ranges

WASTED_SCORES = 1024
"""Scores of padding, all heads, that a span may bring to a batch: less than another call costs."""
ALIGNMENT = 16
"""Keys of a batch are filled up to a multiple of this; products of other widths are slower."""


@dataclass(frozen=True, slots=True)
class SpanBatch:
    """B spans filled up to R queries and k keys.

    query_row, key_row: ``[K B R]`` and ``[K B k]``, rows of the queries ``[K T, ...]`` and keys ``[K (C + T), ...]``;
    padding repeats a row of the span. output_row: ``[K B R]``, rows of an output ``[K (T + 1), ...]``, where padding
    goes to the row behind the last. mask_BRk: 0 where a query sees a key, otherwise -inf; 0 for padding queries.
    """

    query_row: torch.Tensor
    key_row: torch.Tensor
    output_row: torch.Tensor
    mask_BRk: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, R, k."""
        num_spans, num_queries, num_keys = self.mask_BRk.shape
        return num_spans, num_queries, num_keys


def batch_spans(
    spans: Sequence[Span], num_kv_heads: int, num_tokens: int, num_keys: int, max_scores: int
) -> list[SpanBatch]:
    """All spans, those of like sizes together, at most ``max_scores`` scores of one head in a batch."""
    return [_batch(group, num_kv_heads, num_tokens, num_keys) for group in _groups(spans, max_scores)]


def _groups(spans: Sequence[Span], max_scores: int) -> Iterator[list[Span]]:
    group: list[Span] = []
    rows = keys = 0
    for span in sorted(spans, key=lambda span: (span.mask_qk.shape[1], span.mask_qk.shape[0]), reverse=True):
        num_q, num_k = span.mask_qk.shape
        if group:
            wider = max(rows, num_q)
            wasted = wider * keys - num_q * num_k + (wider - rows) * keys * len(group)
            if wasted <= WASTED_SCORES and wider * keys * (len(group) + 1) <= max_scores:
                group.append(span)
                rows = wider
                continue
            yield group
        group, rows, keys = [span], num_q, num_k
    if group:
        yield group


def _batch(spans: Sequence[Span], num_kv_heads: int, num_tokens: int, num_keys: int) -> SpanBatch:
    rows = max(span.last_q - span.first_q for span in spans)
    keys = [_keys(span) for span in spans]
    width = max(map(len, keys))
    if len(spans) > 1:
        width = -(-width // ALIGNMENT) * ALIGNMENT
        mask_BRk = torch.zeros(len(spans), rows, width, dtype=spans[0].mask_qk.dtype)
        for mask_Rk, span in zip(mask_BRk, spans, strict=True):
            num_q, num_k = span.mask_qk.shape
            mask_Rk[:num_q, :num_k] = span.mask_qk
            mask_Rk[:, num_k:] = -torch.inf
    else:
        mask_BRk = spans[0].mask_qk[None]
    query_BR, output_BR = np.empty((2, len(spans), rows), dtype=np.int64)
    key_Bk = np.empty((len(spans), width), dtype=np.int64)
    for index, (span, span_keys) in enumerate(zip(spans, keys, strict=True)):
        num_q = span.last_q - span.first_q
        query_BR[index, :num_q] = output_BR[index, :num_q] = np.arange(span.first_q, span.last_q)
        query_BR[index, num_q:], output_BR[index, num_q:] = span.first_q, num_tokens
        key_Bk[index, : len(span_keys)], key_Bk[index, len(span_keys) :] = span_keys, span_keys[0]
    return SpanBatch(
        _of_every_head(query_BR, num_kv_heads, num_tokens),
        _of_every_head(key_Bk, num_kv_heads, num_keys),
        _of_every_head(output_BR, num_kv_heads, num_tokens + 1),
        mask_BRk,
    )


def _keys(span: Span) -> np.ndarray:
    start, stop = np.array(span.key_runs, dtype=np.int64).T
    return ranges(start, stop - start)


def _of_every_head(row: np.ndarray, num_heads: int, rows_per_head: int) -> torch.Tensor:
    return torch.from_numpy((np.arange(num_heads)[:, None] * rows_per_head + row.ravel()).ravel())
