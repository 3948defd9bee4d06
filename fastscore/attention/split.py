"""A pack's attention in two kinds of parts: dense rectangles where many queries see one long run, and the rest.

In depth-first order the queries that see a whole run of keys are contiguous. So one dense call without a mask serves
them all and no key is copied; a short run, or one seen by few, is gathered together with the segment's own tokens.
Parts that share queries are merged by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastscore.ranges import Ints, offsets
from fastscore.types import KeyRuns, PackedBatch


@dataclass(frozen=True, slots=True)
class Rectangle:
    """All queries ``first_q:last_q`` see all keys ``first_k:last_k``."""

    first_q: int
    last_q: int
    first_k: int
    last_k: int


@dataclass(frozen=True, slots=True)
class AttentionParts:
    """``rest`` are the runs of each segment that no rectangle covers; the segment's own tokens are always last."""

    rectangles: tuple[Rectangle, ...]
    rest: KeyRuns


def split_attention(pack: PackedBatch, min_keys: int) -> AttentionParts:
    """Rectangles from runs of at least ``min_keys`` keys; copying a shorter one costs less than one more call."""
    runs = pack.key_runs
    # A segment's last run is (or ends with) its own tokens, which are causal and never part of a rectangle.
    long_P = runs.length_P >= min_keys
    long_P[runs.offset_S[1:] - 1] = False
    if not long_P.any():
        return AttentionParts((), runs)
    segment_P = np.repeat(np.arange(pack.num_segments), np.diff(runs.offset_S))
    query_stop_S = np.append(pack.query_start_S[1:], pack.num_segment_tokens)
    start_P, length_P = runs.start_P.copy(), runs.length_P.copy()
    rectangles = []
    places = np.flatnonzero(long_P)
    # Runs that begin at the same key belong to neighbouring segments; each sees at least what the shortest covers.
    by_start = places[np.argsort(start_P[places], kind="stable")]
    for group in np.split(by_start, np.flatnonzero(np.diff(start_P[by_start])) + 1):
        for neighbours in np.split(group, np.flatnonzero(np.diff(segment_P[group]) > 1) + 1):
            covered = int(length_P[neighbours].min())
            first_k = int(start_P[neighbours[0]])
            first, last = segment_P[neighbours[0]], segment_P[neighbours[-1]]
            rectangles.append(
                Rectangle(int(pack.query_start_S[first]), int(query_stop_S[last]), first_k, first_k + covered)
            )
            start_P[neighbours] += covered
            length_P[neighbours] -= covered
    kept = length_P > 0
    counts = np.bincount(segment_P[kept], minlength=pack.num_segments)
    return AttentionParts(tuple(rectangles), KeyRuns(offsets(counts), start_P[kept], length_P[kept]))


def last_keys(runs: KeyRuns, count_S: Ints) -> KeyRuns:
    """So many keys of each segment, at most, from its end: a run before them is left out, and one is cut."""
    segment_P = np.repeat(np.arange(len(count_S)), np.diff(runs.offset_S))
    stop_P = np.cumsum(runs.length_P)
    # From the run's first key to the segment's end.
    behind_P = stop_P[runs.offset_S[1:] - 1][segment_P] - stop_P + runs.length_P
    skipped_P = np.clip(behind_P - count_S[segment_P], 0, runs.length_P)
    kept = skipped_P < runs.length_P
    counts = np.bincount(segment_P[kept], minlength=len(count_S))
    return KeyRuns(offsets(counts), (runs.start_P + skipped_P)[kept], (runs.length_P - skipped_P)[kept])
