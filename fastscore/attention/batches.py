"""Spans of a pack in batches of near-equal size, each computed by one batched product.

Shapes: B spans of a batch, R its queries (those of the longest span), k its keys, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastscore.attention.spans import Span
from fastscore.ranges import ranges

WASTED_SCORES = 2048
"""Scores of padding, all heads, that a span may bring to a batch: less than another call costs."""
ALIGNMENT = 16
"""Keys of a batch are filled up to a multiple of this; products of other widths are slower."""


@dataclass(frozen=True, slots=True)
class SpanBatch:
    """B spans filled up to R queries and k keys.

    query_row_BR, key_row_Bk: tokens of the pack and of its key space; padding repeats one of the span. output_row_BR:
    the same as query_row_BR, but padding goes to the row behind the last. mask_BRk: 0 where a query sees a key,
    otherwise -inf; 0 for padding queries.
    """

    query_row_BR: torch.Tensor
    key_row_Bk: torch.Tensor
    output_row_BR: torch.Tensor
    mask_BRk: torch.Tensor


def batch_spans(spans: Sequence[Span], num_tokens: int, max_scores: int) -> list[SpanBatch]:
    """All spans, those of like sizes together, at most ``max_scores`` scores of one head in a batch."""
    return [_batch(group, num_tokens) for group in _groups(spans, max_scores)]


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


def _batch(spans: Sequence[Span], num_tokens: int) -> SpanBatch:
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
        torch.from_numpy(query_BR), torch.from_numpy(key_Bk), torch.from_numpy(output_BR), mask_BRk.contiguous()
    )


def _keys(span: Span) -> np.ndarray:
    start, stop = np.array(span.key_runs, dtype=np.int64).T
    return ranges(start, stop - start)
