"""NLLs of answer tokens to scores of pairs, and those to scores of candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

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


def split_answers(nlls: Sequence[float], greedy: Sequence[bool], offsets: Sequence[int]) -> Iterator[AnswerScore]:
    """The answer rows of a batch, request by request: request r has ``offsets[r]:offsets[r + 1]``."""
    for start, stop in pairwise(offsets):
        yield AnswerScore(tuple(0.0 - nll for nll in nlls[start:stop]), all(greedy[start:stop]))


def is_finite(score: AnswerScore) -> bool:
    """False where the model overflowed: such a score cannot be trusted."""
    return math.isfinite(score.logprob)


def not_finite(score: AnswerScore, place: str) -> RuntimeError:
    """What to raise for a score that is no number; ``place`` says where its request came from."""
    token = next(i for i, value in enumerate(score.token_logprobs) if not math.isfinite(value))
    return RuntimeError(
        f"{place}: the model gave a log-probability of {score.token_logprobs[token]} for answer token {token}; "
        "a wider dtype (--dtype bf16 or fp32) usually helps"
    )


def teacher_scores(pairs: RowPairs, scores: Sequence[AnswerScore], combine: Combine) -> tuple[float, ...]:
    """One score per candidate: the mean log-probability (nats) of its answer, several answers combined.

    Where the pairs say so, the sum takes the place of the mean.

    ``logsumexp`` adds the answers' length-normalised probabilities; with more than one answer it may exceed 0.
    """
    means = [score.logprob if pairs.summed else score.mean_logprob for score in scores]
    count = pairs.num_answers
    if count == 1:
        return tuple(means)
    combiner = COMBINERS[combine]
    return tuple(combiner(means[c * count : (c + 1) * count]) for c in range(pairs.num_candidates))
