"""The short form of ``end_to_end.py``: part of ``make bench``.

FASTSCORE_BENCH_QUERIES (3), FASTSCORE_BENCH_ROUNDS (5), FASTSCORE_BENCH_DTYPE (auto), FASTSCORE_BENCH_MODEL
(smollm2-135m) and FASTSCORE_BENCH_PEERS (padded,padded-tuned,lm-eval,vllm) change the task; FASTSCORE_VLLM_PYTHON names
vLLM's environment. So few requests share less than a whole file does.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import suite
from compare import LIMIT
from contenders import OURS, PADDED, TUNED
from end_to_end import PEERS, measure, show
from environment import environment, one_line
from peer_lm_eval import LM_EVAL
from peer_vllm import VLLM, VLLM_PREFILL
from pytest_benchmark.fixture import BenchmarkFixture
from rounds import MeasuredRounds

ROUNDS = suite.rounds(5)
WANTED = os.environ.get("FASTSCORE_BENCH_PEERS", ",".join(PEERS)).split(",")
CLOCK = MeasuredRounds()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    found = measure(suite.MODEL, suite.dtype(), suite.QUERIES, ROUNDS, [name for name in PEERS if name in WANTED])
    print(f"\n{one_line(environment())}\n{show(found)}")
    return found


def of(report: dict[str, Any], name: str) -> dict[str, Any]:
    """A contender's figures, or the test is skipped."""
    if name not in report["contenders"]:
        peer = VLLM if name == VLLM_PREFILL else name
        pytest.skip(report["left_out"].get(peer, "not among FASTSCORE_BENCH_PEERS"))
    return report["contenders"][name]


@pytest.mark.parametrize("peer", PEERS)
def test_contenders_agree(peer: str, report: dict[str, Any]) -> None:
    found = of(report, peer)
    assert "failed" not in found, found["failed"]
    assert peer not in report["disagreeing"], found["difference_from_fastscore"]


@pytest.mark.benchmark(group="end to end", timer=CLOCK)
@pytest.mark.parametrize("name", [OURS, PADDED, TUNED, LM_EVAL, VLLM, VLLM_PREFILL])
def test_end_to_end(name: str, report: dict[str, Any], benchmark: BenchmarkFixture) -> None:
    values = of(report, name)
    if "seconds" not in values:
        pytest.skip("not timed: test_contenders_agree says why")
    CLOCK.rounds = list(values["seconds"])
    benchmark.extra_info.update({key: value for key, value in values.items() if isinstance(value, float | int)})
    if name == OURS:
        timed = {peer: found for peer, found in report["contenders"].items() if "times_fastscore" in found}
        ratios = {
            f"end to end: {OURS} / {peer}": 1 / timed[peer]["times_fastscore"]
            for peer in (PADDED, TUNED, LM_EVAL)
            if peer in timed
        }
        ratios[f"end to end: {OURS} / {LIMIT}"] = 1 / values["useful_flop_efficiency"]
        task = report["workload"]
        suite.record(
            benchmark, ratios, f"{report['model']} in {report['dtype']}, {task['pairs']} pairs of {task['source']}"
        )
    benchmark.pedantic(CLOCK.pass_round, rounds=ROUNDS)
