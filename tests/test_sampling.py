"""Packs of a sample, and the interval around what it says."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscore.prefix_tree import build_prefix_tree
from fastscore.sampling import Sample, cut_packs, student_t
from fastscore.types import ScoringRequest


@st.composite
def many_requests(draw: st.DrawFn) -> list[ScoringRequest]:
    stems = draw(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=20), min_size=1, max_size=3))
    made = []
    for _ in range(draw(st.integers(1, 25))):
        ids = [*draw(st.sampled_from(stems)), *draw(st.lists(st.integers(3, 5), min_size=1, max_size=5))]
        made.append(ScoringRequest(tuple(ids), draw(st.integers(1, len(ids) - 1))))
    return made


@settings(max_examples=60, deadline=None)
@given(requests=many_requests(), budget=st.integers(1, 80), shares=st.booleans())
def test_packs_are_all_requests_and_hold_what_their_tree_has(
    requests: list[ScoringRequest], budget: int, shares: bool
) -> None:
    packs = list(cut_packs(requests, budget, shares))
    assert sorted(map(id, (request for pack in packs for request in pack))) == sorted(map(id, requests))
    sizes = [build_prefix_tree(pack, share=shares).num_tokens for pack in packs]
    assert all(size <= budget or len(pack) == 1 for size, pack in zip(sizes, packs, strict=True))
    # A pack computes the beginning of its first request again, and nothing else twice.
    whole = build_prefix_tree(requests, share=shares).num_tokens
    assert whole <= sum(sizes) <= whole + sum(len(pack[0].token_ids) for pack in packs[1:])
    # None is smaller than it must be: with the first request of the next it would be too large.
    for pack, after in pairwise(packs):
        assert build_prefix_tree([*pack, after[0]], share=shares).num_tokens > budget


def test_quantiles_are_those_of_the_tables() -> None:
    for degrees, value in ((2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045), (1000, 1.962)):
        assert student_t(0.95, degrees) == pytest.approx(value, rel=0.032 if degrees == 2 else 0.01)


@pytest.mark.parametrize("count", [4, 12, 60])
def test_the_interval_holds_the_truth_as_often_as_it_says(count: int) -> None:
    """Populations of packs whose seconds depend on their tokens and on chance; the truth is their sum."""
    draw = random.Random(count)
    held = 0
    for _ in range(1000):
        tokens = [draw.randrange(300, 1000) for _ in range(80)]
        seconds = [0.001 * size + draw.gauss(0.2, 0.05) for size in tokens]
        chosen = draw.sample(range(80), count)
        sample = Sample([tokens[i] for i in chosen], [seconds[i] for i in chosen])
        half = sample.half_width(80)
        assert half is not None
        held += abs(sample.seconds_per_token - sum(seconds) / sum(tokens)) <= half
    assert 0.91 < held / 1000 < 0.98


def test_all_packs_leave_nothing_open_and_two_say_nothing() -> None:
    sample = Sample([10, 10], [1.0, 2.0])
    assert sample.seconds_per_token == 0.15
    assert sample.half_width(2) == 0.0
    assert sample.half_width(3) is None
