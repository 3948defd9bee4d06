"""Token NLLs to scores of pairs, and several answers' scores to one, against plain arithmetic."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastscore.aggregate import COMBINERS, is_finite, not_finite, split_answers, teacher_scores
from fastscore.types import AnswerScore, Pair, Row, RowPairs

LOGPROB = st.floats(-200, 0)
ANSWER = st.lists(LOGPROB, min_size=1, max_size=5).map(lambda values: AnswerScore(tuple(values), False))


def row_pairs(num_candidates: int, num_answers: int) -> RowPairs:
    pairs = tuple(Pair("p", "a") for _ in range(num_candidates * num_answers))
    return RowPairs(Row({}), pairs, num_candidates, num_answers)


def mean(score: AnswerScore) -> float:
    return sum(score.token_logprobs) / len(score.token_logprobs)


EXPECTED = {
    "max": lambda values: sorted(values)[-1],
    "min": lambda values: sorted(values)[0],
    "mean": lambda values: sum(values) / len(values),
    "logsumexp": lambda values: math.log(sum(math.exp(value) for value in values)),
}


@given(st.data(), st.integers(1, 4), st.integers(2, 4))
def test_combined_scores(data: st.DataObject, num_candidates: int, num_answers: int) -> None:
    count = num_candidates * num_answers
    scores = data.draw(st.lists(ANSWER, min_size=count, max_size=count))
    assert set(EXPECTED) == set(COMBINERS)
    for combine, plain in EXPECTED.items():
        found = teacher_scores(row_pairs(num_candidates, num_answers), scores, combine)
        expected = [
            plain([mean(scores[c * num_answers + a]) for a in range(num_answers)]) for c in range(num_candidates)
        ]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(scores=st.lists(ANSWER, min_size=1, max_size=6))
@pytest.mark.parametrize("combine", COMBINERS)
def test_one_answer_is_its_mean_whatever_the_combination(combine: str, scores: list[AnswerScore]) -> None:
    assert teacher_scores(row_pairs(len(scores), 1), scores, combine) == tuple(map(mean, scores))


def test_written_example() -> None:
    scores = [AnswerScore((-1.0, -3.0), False), AnswerScore((-4.0,), False)]
    found = {combine: teacher_scores(row_pairs(1, 2), scores, combine)[0] for combine in COMBINERS}
    assert found["max"] == -2
    assert found["min"] == -4
    assert found["mean"] == -3
    assert found["logsumexp"] == pytest.approx(-2 + math.log(1 + math.exp(-2)))


def test_logsumexp_neither_underflows_nor_overflows() -> None:
    scores = [AnswerScore((-5000.0,), False)] * 2
    assert teacher_scores(row_pairs(1, 2), scores, "logsumexp") == pytest.approx((-5000 + math.log(2),))
    certain = [AnswerScore((0.0,), True)] * 4
    assert teacher_scores(row_pairs(1, 4), certain, "logsumexp") == pytest.approx((math.log(4),))


def test_rows_of_a_batch_go_to_their_requests() -> None:
    nlls, greedy = [1.0, 2.0, 3.0, 0.0, 5.0], [True, True, False, True, True]
    scores = list(split_answers(nlls, greedy, (0, 2, 3, 5)))
    assert [score.token_logprobs for score in scores] == [(-1.0, -2.0), (-3.0,), (0.0, -5.0)]
    assert [score.is_greedy for score in scores] == [True, False, True]
    assert str(scores[2].token_logprobs[0]) == "0.0", "a certain token has 0, not -0"
    assert [(score.logprob, score.mean_logprob, score.num_tokens) for score in scores] == [
        (-3.0, -1.5, 2),
        (-3.0, -3.0, 1),
        (-5.0, -2.5, 2),
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_named(bad: float) -> None:
    assert is_finite(AnswerScore((-1.0, -2.0), False))
    score = AnswerScore((-1.0, bad), False)
    assert not is_finite(score)
    assert str(not_finite(score, "pair 3")).startswith(
        f"pair 3: the model gave a log-probability of {bad} for answer token 1; a wider dtype (--dtype "
    )
