"""The short form of ``prefix_sharing.py``: part of ``make bench``.

FASTSCORE_BENCH_QUERIES (3), FASTSCORE_BENCH_QUESTIONS (4), FASTSCORE_BENCH_ROUNDS (2), FASTSCORE_BENCH_DTYPE (fp32) and
FASTSCORE_BENCH_MODEL (smollm2-135m) change the task. So few requests share less than a whole file does.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from compare import OURS, PADDED, TUNED
from environment import one_line
from prefix_sharing import NO_TREE, here, load_both, make_contenders, measure, show, workloads
from pytest_benchmark.fixture import BenchmarkFixture
from rounds import MeasuredRounds

from fastscore.config import DEFAULT_MODEL

QUERIES = int(os.environ.get("FASTSCORE_BENCH_QUERIES", "3"))
QUESTIONS = int(os.environ.get("FASTSCORE_BENCH_QUESTIONS", "4"))
ROUNDS = int(os.environ.get("FASTSCORE_BENCH_ROUNDS", "2"))
DTYPE = os.environ.get("FASTSCORE_BENCH_DTYPE", "fp32")
MODEL = os.environ.get("FASTSCORE_BENCH_MODEL", DEFAULT_MODEL)
CLOCK = MeasuredRounds()


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """Of both files. A contender that disagrees raises."""
    scorer, plain = load_both(MODEL, DTYPE)
    print(f"\n{one_line(here())}\n{MODEL} in {DTYPE}, {ROUNDS} rounds by turns")
    found = []
    for workload, whole_factor in workloads(scorer.tokenizer, QUERIES, QUESTIONS):
        result = measure(make_contenders(scorer, plain, workload.pairs), workload.pairs, ROUNDS)
        print(show(workload.source, workload.describe(), whole_factor, result))
        found.append(result)
    return found


@pytest.mark.benchmark(group="shared prefixes", timer=CLOCK)
@pytest.mark.parametrize("name", [OURS, NO_TREE, PADDED, TUNED])
@pytest.mark.parametrize("file", [0, 1], ids=["qa", "5-shot choices"])
def test_prefix_sharing(file: int, name: str, results: list[dict[str, Any]], benchmark: BenchmarkFixture) -> None:
    result = results[file]
    assert result["contenders"][OURS]["tokens_computed"] < result["contenders"][NO_TREE]["tokens_computed"]
    CLOCK.rounds = list(result["seconds"][name])
    benchmark.extra_info.update(result["contenders"][name])
    benchmark.pedantic(CLOCK.pass_round, rounds=ROUNDS)
