"""The numbers behind the charts and tables, from a file's flat arrays.

Shapes: C candidates, N values that are ranked, B bins. A chart and the table beside it show the same object.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastscore.report.collect import NEGATIVE, POSITIVE, UNLABELLED, Collected

Floats: TypeAlias = NDArray[np.float64]
Labels: TypeAlias = NDArray[np.int8]

MAX_BINS = 40
_FINEST = 1e-9
"""A bin is no narrower than this share of the scores' size, which floats can still tell apart."""
MAX_BARS = 150
"""More ranked values than these are drawn in groups of neighbours."""
MAX_LENGTH_BINS = 8
MIN_OF_KIND = 6
"""Of the rarer kind, a bin of lengths holds about this many at least: medians of fewer say little."""
MAX_POINTS = 200
"""Candidates of one kind that are drawn as points."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The scores of one kind of candidate."""

    label: int
    count: int
    mean: float
    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ScoreBin:
    """Scores above ``low``, up to and with ``high``; the outermost bins also hold what lies beyond them."""

    low: float
    high: float
    counts: dict[int, int]


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Values of neighbouring ranks, counted from 1, the highest first. ``line`` is 0 where there are several."""

    first: int
    last: int
    median: float
    low: float
    high: float
    line: int


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Candidates of ``low`` to ``high`` characters; by label, how many there are and the quartiles of their scores."""

    low: int
    high: int
    median: float
    quartiles: dict[int, tuple[int, float, float, float]]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in characters against scores. ``points`` are (length, score), evenly picked where there are many."""

    count: int
    correlation: float | None
    """Spearman's rank correlation; None where all lengths or all scores are equal."""
    bins: list[LengthBin]
    points: dict[int, list[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that is drawn of a file."""

    summaries: list[Summary]
    bins: list[ScoreBin]
    margins: list[RankGroup]
    median_margin: float | None
    leads: list[RankGroup]
    median_lead: float | None
    lengths: Lengths | None


def figures(collected: Collected) -> Figures:
    score_C = np.frombuffer(collected.score_C, np.float64)
    length_C = np.frombuffer(collected.length_C, np.int32)
    label_C = np.frombuffer(collected.label_C, np.int8)
    summaries = [
        _summary(label, score_C[label_C == label])
        for label in (POSITIVE, NEGATIVE, UNLABELLED)
        if np.any(label_C == label)
    ]
    known_C = length_C >= 0
    return Figures(
        summaries,
        score_bins(score_C, label_C),
        rank_groups(collected.margin_R, collected.line_R),
        _median(collected.margin_R),
        rank_groups(collected.lead_U, collected.line_U),
        _median(collected.lead_U),
        lengths(length_C[known_C], score_C[known_C], label_C[known_C]) if np.any(known_C) else None,
    )


def _summary(label: int, scores: Floats) -> Summary:
    return Summary(
        label, len(scores), float(scores.mean()), float(np.median(scores)), float(scores.min()), float(scores.max())
    )


def _median(values: array[float]) -> float | None:
    return float(np.median(np.frombuffer(values))) if values else None


def score_bins(score_C: Floats, label_C: Labels) -> list[ScoreBin]:
    """At most ``MAX_BINS`` bins and one more, the same for every label, with round edges; fewer for few scores.

    Bins span all scores, unless a few far ones would squeeze the others together: then the outermost bins take them.
    """
    low, high = float(score_C.min()), float(score_C.max())
    inner_low, inner_high = map(float, np.quantile(score_C, (0.005, 0.995)))
    if inner_low < inner_high and high - low > 2 * (inner_high - inner_low):
        low, high = inner_low, inner_high
    num_bins = min(math.ceil(2 * math.sqrt(len(score_C))), MAX_BINS)
    step, digits = _round_step(max((high - low) / num_bins, abs(low) * _FINEST, abs(high) * _FINEST))
    first, last = math.ceil(low / step) - 1, math.ceil(high / step)
    edges = [round(step * index, digits) for index in range(first, last + 1)]
    bin_C = np.clip(np.searchsorted(edges, score_C, side="left") - 1, 0, len(edges) - 2)
    counts = {
        label: np.bincount(bin_C[label_C == label], minlength=len(edges) - 1)
        for label in (POSITIVE, NEGATIVE, UNLABELLED)
    }
    return [
        ScoreBin(edges[index], edges[index + 1], {label: int(found[index]) for label, found in counts.items()})
        for index in range(len(edges) - 1)
    ]


def _round_step(least: float) -> tuple[float, int]:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least this, and the decimals of its multiples."""
    if least <= 0:
        return 0.1, 1
    exponent = math.floor(math.log10(least))
    times = next(times for times in (1, 2, 2.5, 5, 10) if times * 10.0**exponent >= least * (1 - 1e-9))
    digits = max(1 - exponent, 0)
    return round(times * 10.0**exponent, digits), digits


def rank_groups(values: array[float], lines: array[int]) -> list[RankGroup]:
    """The values, highest first (of equals, the earlier line); neighbours grouped where there are many."""
    if not values:
        return []
    value_N, line_N = np.frombuffer(values, np.float64), np.frombuffer(lines, np.int64)
    order_N = np.argsort(-value_N, kind="stable")
    value_N, line_N = value_N[order_N], line_N[order_N]
    starts = np.linspace(0, len(value_N), min(len(value_N), MAX_BARS) + 1).astype(np.int64)
    return [
        RankGroup(
            start + 1,
            stop,
            float(np.median(value_N[start:stop])),
            float(value_N[stop - 1]),
            float(value_N[start]),
            int(line_N[start]) if stop - start == 1 else 0,
        )
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]


def lengths(length_C: NDArray[np.int32], score_C: Floats, label_C: Labels) -> Lengths:
    """Bins hold about equally many candidates, whatever their label."""
    rarest = int(np.unique(label_C, return_counts=True)[1].min())
    num_bins = min(max(rarest // MIN_OF_KIND, 1), MAX_LENGTH_BINS)
    quantiles = np.quantile(length_C, np.linspace(0, 1, num_bins + 1)[1:], method="inverted_cdf")
    tops = np.unique(quantiles)
    bin_C = np.searchsorted(tops, length_C, side="left")
    bins = []
    for index in range(len(tops)):
        inside_C = bin_C == index
        of_label = {label: score_C[inside_C & (label_C == label)] for label in (POSITIVE, NEGATIVE, UNLABELLED)}
        bins.append(
            LengthBin(
                int(length_C[inside_C].min()),
                int(length_C[inside_C].max()),
                float(np.median(length_C[inside_C])),
                {
                    label: (len(scores), *(float(q) for q in np.quantile(scores, (0.25, 0.5, 0.75))))  # type: ignore[misc]
                    for label, scores in of_label.items()
                    if len(scores)
                },
            )
        )
    points = {}
    for label in (POSITIVE, NEGATIVE, UNLABELLED):
        places = np.flatnonzero(label_C == label)
        if len(places):
            picked = places[np.linspace(0, len(places) - 1, min(len(places), MAX_POINTS)).astype(np.int64)]
            points[label] = list(zip(length_C[picked].tolist(), score_C[picked].tolist(), strict=True))
    return Lengths(len(score_C), _rank_correlation(length_C, score_C), bins, points)


def _rank_correlation(one_C: NDArray[np.int32], other_C: Floats) -> float | None:
    """Spearman's rho: the correlation of ranks, equal values sharing the mean of theirs."""
    ranks = []
    for values in (one_C, other_C):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        mean_rank = last - (counts - 1) / 2
        ranks.append(mean_rank[inverse] - (len(values) + 1) / 2)
    one, other = ranks
    spread = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / spread if spread else None
