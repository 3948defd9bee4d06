"""The short form of ``prefix_sharing.py``: part of ``make bench``.

FASTSCORE_BENCH_QUERIES (3), FASTSCORE_BENCH_QUESTIONS (4), FASTSCORE_BENCH_ROUNDS (3), FASTSCORE_BENCH_DTYPE (auto) and
FASTSCORE_BENCH_MODEL (smollm2-135m) change the task. So few requests share less than a whole file does.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import suite
from contenders import NO_TREE, OURS, PADDED, TUNED, load_both
from environment import environment, one_line
from prefix_sharing import measure_files, show
from pytest_benchmark.fixture import BenchmarkFixture
from rounds import MeasuredRounds

QUESTIONS = int(os.environ.get("FASTSCORE_BENCH_QUESTIONS", "4"))
ROUNDS = suite.rounds(3)
CLOCK = MeasuredRounds()
FILES = ["qa", "5-shot choices"]


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """Of both files."""
    scorer, plain = load_both(suite.MODEL, suite.dtype())
    print(f"\n{one_line(environment())}\n{suite.MODEL} in {suite.dtype()}, {ROUNDS} rounds by turns")
    found = []
    for result in measure_files(scorer, plain, suite.QUERIES, QUESTIONS, ROUNDS):
        print(show(result))
        found.append(result)
    return found


@pytest.mark.parametrize("file", [0, 1], ids=FILES)
def test_contenders_agree(file: int, results: list[dict[str, Any]]) -> None:
    assert results[file]["disagreeing"] == []
    assert [name for name, found in results[file]["contenders"].items() if "failed" in found] == []


@pytest.mark.benchmark(group="shared prefixes", timer=CLOCK)
@pytest.mark.parametrize("name", [OURS, NO_TREE, PADDED, TUNED])
@pytest.mark.parametrize("file", [0, 1], ids=FILES)
def test_prefix_sharing(file: int, name: str, results: list[dict[str, Any]], benchmark: BenchmarkFixture) -> None:
    result = results[file]
    values, task = result["contenders"][name], result["workload"]
    if "seconds" not in values:
        pytest.skip("not timed: test_contenders_agree says why")
    if "tokens_computed" in result["contenders"][NO_TREE]:
        assert result["contenders"][OURS]["tokens_computed"] < result["contenders"][NO_TREE]["tokens_computed"]
    CLOCK.rounds = list(values["seconds"])
    benchmark.extra_info.update({key: value for key, value in values.items() if isinstance(value, float | int)})
    if name == OURS and "times_fastscore" in result["contenders"][NO_TREE]:
        without = result["contenders"][NO_TREE]["times_fastscore"]
        task = f"{suite.MODEL} in {result['dtype']}, {task['pairs']} pairs of {task['source']}"
        suite.record(benchmark, {f"shared prefixes, {FILES[file]}: {OURS} / {NO_TREE}": 1 / without}, task)
    benchmark.pedantic(CLOCK.pass_round, rounds=ROUNDS)
