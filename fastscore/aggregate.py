"""NLLs of answer tokens to scores of pairs, and those to scores of candidates.

The order is fixed: tokens are reduced, the baseline taken off, several answers combined, candidates normalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, TypeAlias

from fastscore.config import Combine, Reduce, ScoreConfig, TaskConfig
from fastscore.types import AnswerScore, Pair, RowPairs, ScoredRow, TeacherScores

Scores: TypeAlias = tuple[AnswerScore, ...]
"""Of the pairs of one row."""


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


def by_row(rows: Iterable[RowPairs], scores: Iterable[AnswerScore]) -> Iterator[tuple[RowPairs, Scores]]:
    """Each row with the scores of its pairs, of those of all of them."""
    remaining = iter(scores)
    for pairs in rows:
        yield pairs, tuple(islice(remaining, len(pairs.pairs)))


def scored_row(pairs: RowPairs, scores: Scores, config: TaskConfig) -> ScoredRow:
    """The row with what it is given, from the scores of its pairs: a score for each candidate, raw counts."""
    raw = teacher_raw(pairs, scores) if config.score.keep_raw else None
    return ScoredRow(pairs.row, teacher_scores(pairs, scores, config.combine, config.score), scores, raw, pairs.pairs)


def teacher_scores(
    pairs: RowPairs, scores: Sequence[AnswerScore], combine: Combine, score: ScoreConfig | None = None
) -> TeacherScores:
    """One score per candidate, as ``score`` defines it; by default the mean log-probability (nats) of its answer.

    Where the pairs say so, it is the sum in any case.

    ``logsumexp`` adds the answers' length-normalised probabilities; with more than one answer it may exceed 0.
    """
    score = ScoreConfig() if score is None else score
    if score.reduce == "none":
        return tuple(found.token_logprobs for found in scores)
    reduce = "sum" if pairs.summed else score.reduce
    values = [reduced(pair, found, reduce) for pair, found in zip(pairs.pairs, scores, strict=True)]
    count = pairs.num_answers
    num_scored = pairs.num_candidates * count
    if pairs.has_baseline:
        values = [value - values[num_scored + index % count] for index, value in enumerate(values[:num_scored])]
    if count > 1:
        combiner = COMBINERS[combine]
        values = [combiner(values[c * count : (c + 1) * count]) for c in range(pairs.num_candidates)]
    return softmax(values, score.temperature) if score.normalize == "softmax" else tuple(values)


def reduced(pair: Pair, score: AnswerScore, reduce: Reduce) -> float:
    """One number for an answer, in nats: mean over its tokens, their sum, or that per byte or character."""
    if reduce == "mean":
        return score.mean_logprob
    if reduce == "sum":
        return score.logprob
    size = pair.num_bytes if reduce == "byte" else pair.num_chars
    assert size is not None, "rows of token ids are refused where this is needed"
    return score.logprob / size


def softmax(values: Sequence[float], temperature: float) -> tuple[float, ...]:
    """``exp(value / temperature)`` as shares of their sum."""
    largest = max(values)
    weights = [math.exp((value - largest) / temperature) for value in values]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def teacher_raw(pairs: RowPairs, scores: Sequence[AnswerScore]) -> dict[str, Any]:
    """What every reduction can be computed from: for each candidate, a list with an entry for each answer.

    ``logprob`` (nats, sum over the tokens), ``num_tokens``, ``num_bytes`` and ``num_chars`` (None for token ids); with
    a baseline also ``baseline_logprob`` and ``baseline_num_tokens``, an entry for each answer.
    """
    count = pairs.num_answers
    num_scored = pairs.num_candidates * count

    def by_candidate(values: Sequence[Any]) -> list[list[Any]]:
        return [list(values[start : start + count]) for start in range(0, num_scored, count)]

    raw: dict[str, Any] = {
        "logprob": by_candidate([score.logprob for score in scores]),
        "num_tokens": by_candidate([score.num_tokens for score in scores]),
    }
    is_text = isinstance(pairs.pairs[0].answer, str)
    raw["num_bytes"] = by_candidate([pair.num_bytes for pair in pairs.pairs]) if is_text else None
    raw["num_chars"] = by_candidate([pair.num_chars for pair in pairs.pairs]) if is_text else None
    if pairs.has_baseline:
        raw["baseline_logprob"] = [score.logprob for score in scores[num_scored:]]
        raw["baseline_num_tokens"] = [score.num_tokens for score in scores[num_scored:]]
    return raw
