"""Scores of pairs to scores of candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fastscore.config import Combine
from fastscore.types import AnswerScore, RowPairs


def _logsumexp(values: Sequence[float]) -> float:
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))


COMBINERS: dict[Combine, Callable[[Sequence[float]], float]] = {
    "max": max,
    "min": min,
    "mean": lambda values: math.fsum(values) / len(values),
    "logsumexp": _logsumexp,
}


def teacher_scores(pairs: RowPairs, scores: Sequence[AnswerScore], combine: Combine) -> tuple[float, ...]:
    """One score per candidate: the mean log-probability (nats) of its answer, several answers combined.

    ``logsumexp`` adds the answers' length-normalised probabilities; with more than one answer it may exceed 0.
    """
    means = [score.mean_logprob for score in scores]
    count = pairs.num_answers
    if count == 1:
        return tuple(means)
    combiner = COMBINERS[combine]
    return tuple(combiner(means[c * count : (c + 1) * count]) for c in range(pairs.num_candidates))
