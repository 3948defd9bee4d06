"""A pack's segments in spans: neighbours that one call of dense masked attention computes together.

In depth-first order all that a span's segments see of the tokens before it is a first part of its first segment's
chain. So the keys of a span are that chain (copied once for the whole span, a few runs) and the span's own tokens as
they stand, and a mask says which query sees which. A segment joins the span before it as long as the scores that the
mask throws away cost less than another call and another copy of the chain.

Shapes: q the queries of a span, k its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fastscore.types import PackedBatch

CALL_SCORES = 4096
"""What one more span costs, in scores of all heads."""
COPY_SCORES = 16
"""What copying one key and its value costs, in the same unit."""
MAX_SCORES = 1 << 19
"""Scores of a call, all heads together: about what stays in cache between the passes over them."""
MIN_ROWS = 32
"""Queries of a span that are kept together even where their scores are more."""
ROWS = 48
"""Queries of a span, about: fewer leave out more of what causality hides, and make smaller products."""


@dataclass(frozen=True, slots=True)
class Span:
    """Queries ``first_q:last_q`` against the keys of ``key_runs``, runs ``start:stop`` of the key space.

    mask_qk: 0 where a query sees a key, otherwise -inf.
    """

    first_q: int
    last_q: int
    key_runs: tuple[tuple[int, int], ...]
    mask_qk: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Segment:
    """Its queries, and the runs ``(start, length)`` of the tokens before them."""

    first_q: int
    last_q: int
    chain: tuple[tuple[int, int], ...]
    num_chain: int

    @property
    def num_q(self) -> int:
        return self.last_q - self.first_q

    @property
    def scores(self) -> int:
        return self.num_q * (self.num_chain + self.num_q)


def split_spans(pack: PackedBatch, window: int | None, num_heads: int, dtype: torch.dtype) -> list[Span]:
    """All segments of the pack, in order; masks of that dtype. A sliding ``window`` counts the query's own token."""
    spans: list[Span] = []
    max_scores = MAX_SCORES // num_heads
    for group in _groups(_segments(pack), max_scores):
        if len(group) == 1:
            spans += _alone(group[0], pack.num_carried, window, max_scores, dtype)
        else:
            spans += _together(group, pack.num_carried, window, max_scores, dtype)
    return spans


def _segments(pack: PackedBatch) -> Iterator[_Segment]:
    runs = pack.key_runs
    bounds, stops = runs.offset_S.tolist(), [*pack.query_start_S.tolist(), pack.num_segment_tokens]
    start_P, length_P = runs.start_P.tolist(), runs.length_P.tolist()
    for segment in range(pack.num_segments):
        first_q, last_q = stops[segment], stops[segment + 1]
        pieces = slice(bounds[segment], bounds[segment + 1])
        chain = list(zip(start_P[pieces], length_P[pieces], strict=True))
        # The last run ends with the segment's own tokens, which need not be all of it.
        start, length = chain.pop()
        if length > last_q - first_q:
            chain.append((start, length - (last_q - first_q)))
        yield _Segment(first_q, last_q, tuple(chain), sum(length for _, length in chain))


def _groups(segments: Iterator[_Segment], max_scores: int) -> Iterator[list[_Segment]]:
    group: list[_Segment] = []
    needed = 0
    for segment in segments:
        if group:
            num_q = segment.last_q - group[0].first_q
            scores = num_q * (group[0].num_chain + num_q)
            wasted = scores - needed - segment.scores
            if wasted <= CALL_SCORES + COPY_SCORES * segment.num_chain and scores <= max_scores:
                group.append(segment)
                needed += segment.scores
                continue
            yield group
        group, needed = [segment], segment.scores
    if group:
        yield group


def _alone(
    segment: _Segment, num_carried: int, window: int | None, max_scores: int, dtype: torch.dtype
) -> Iterator[Span]:
    """One segment, a long one in several spans that share a mask: aligned to its lower right corner, all are alike."""
    first_q, num_q, num_k = segment.first_q, segment.num_q, segment.num_chain + segment.num_q
    rows = _rows(num_q, num_k, max_scores)
    after_qk = np.arange(num_k) - np.arange(num_k - rows, num_k)[:, None]
    mask_qk = _mask(after_qk <= 0 if window is None else (after_qk <= 0) & (after_qk > -window), dtype)
    for start in range(0, num_q, rows):
        stop = min(num_q, start + rows)
        seen_k = segment.num_chain + stop
        unseen = 0 if window is None else max(0, segment.num_chain + start - window + 1)
        yield Span(
            first_q + start,
            first_q + stop,
            _key_runs(segment.chain, num_carried + first_q, stop, unseen),
            mask_qk[rows - (stop - start) :, num_k - seen_k + unseen :],
        )


def _together(
    group: list[_Segment], num_carried: int, window: int | None, max_scores: int, dtype: torch.dtype
) -> Iterator[Span]:
    first = group[0]
    start_q, num_q = first.first_q, group[-1].last_q - first.first_q
    own_k = num_carried + start_q  # where the span's own tokens begin in the key space
    seen_qk = np.zeros((num_q, first.num_chain + num_q), dtype=bool)
    for segment in group:
        rows_qk = seen_qk[segment.first_q - start_q : segment.last_q - start_q]
        before = 0
        for start, length in segment.chain:
            if start >= own_k:
                column = first.num_chain + start - own_k
                rows_qk[:, column : column + length] = True
            else:
                before += length
        # A run that goes on into the span began at the chain's end: its columns follow on one another, too.
        rows_qk[:, :before] = True
        column = first.num_chain + segment.first_q - start_q
        rows_qk[:, column : column + segment.num_q] = np.tri(segment.num_q, dtype=bool)
    unseen = 0
    if window is not None:
        position_q = np.concatenate([np.arange(each.num_q) + each.num_chain for each in group])
        position_k = np.concatenate([np.arange(first.num_chain), position_q])
        seen_qk &= position_k > position_q[:, None] - window
        unseen = min(first.num_chain, max(0, int(position_q.min()) - window + 1))
    mask_qk = _mask(seen_qk, dtype)
    rows = _rows(num_q, seen_qk.shape[1], max_scores)
    for start in range(0, num_q, rows):
        stop = min(num_q, start + rows)
        runs = _key_runs(first.chain, own_k, stop, unseen)
        yield Span(start_q + start, start_q + stop, runs, mask_qk[start:stop, unseen : first.num_chain + stop])


def _rows(num_q: int, num_k: int, max_scores: int) -> int:
    """Queries of each span that a run of them is cut into, evenly."""
    largest = max(MIN_ROWS, max_scores // num_k)
    calls = max(1, round(num_q / ROWS), -(-num_q // largest))
    return -(-num_q // calls)


def _key_runs(
    chain: tuple[tuple[int, int], ...], own_start: int, num_own: int, unseen: int
) -> tuple[tuple[int, int], ...]:
    """The chain and own tokens after it, without the first ``unseen``; runs that touch are one."""
    runs: list[tuple[int, int]] = []
    for start, length in (*chain, (own_start, num_own)):
        skipped = min(unseen, length)
        unseen -= skipped
        if skipped == length:
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + length)
        else:
            runs.append((start + skipped, start + length))
    return tuple(runs)


def _mask(seen_qk: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen_qk.shape, dtype=dtype).masked_fill_(torch.from_numpy(~seen_qk), -torch.inf)
