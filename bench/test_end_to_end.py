"""fastscore against plain transformers on the first queries of nq_qa: ``make bench``.

FASTSCORE_BENCH_QUERIES (3), FASTSCORE_BENCH_ROUNDS (3), FASTSCORE_BENCH_DTYPE (fp32) and FASTSCORE_BENCH_MODEL
(smollm2-135m) change the task. The contenders run by turns in one process, on the same token ids, in the same dtype,
with the same threads.
"""

from __future__ import annotations

import os

import pytest
from compare import MAX_DIFFERENCE, MEAN_DIFFERENCE, OURS, PADDED, TUNED, Comparison, compare
from environment import environment, one_line
from pytest_benchmark.fixture import BenchmarkFixture
from rounds import MeasuredRounds
from transformers import AutoModelForCausalLM
from workload import NQ_QA, load_workload

from fastscore import Scorer
from fastscore.config import DEFAULT_MODEL
from fastscore.models import DTYPES

QUERIES = int(os.environ.get("FASTSCORE_BENCH_QUERIES", "3"))
ROUNDS = int(os.environ.get("FASTSCORE_BENCH_ROUNDS", "3"))
DTYPE = os.environ.get("FASTSCORE_BENCH_DTYPE", "fp32")
MODEL = os.environ.get("FASTSCORE_BENCH_MODEL", DEFAULT_MODEL)


CLOCK = MeasuredRounds()


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    scorer = Scorer(MODEL, dtype=DTYPE)  # type: ignore[arg-type]
    workload = load_workload(scorer.tokenizer, QUERIES)
    plain = AutoModelForCausalLM.from_pretrained(scorer.model_path, dtype=DTYPES[DTYPE]).eval()
    plain = plain.to(scorer.load().device)
    result = compare(scorer, plain, workload.pairs, ROUNDS)

    task = workload.describe()
    print(f"\n{one_line(environment())}")
    if task["source"] != NQ_QA.name:
        print(f"{NQ_QA.name} is absent: {task['source']} stands in for it, and its figures are not comparable")
    print(
        f"{MODEL} in {DTYPE}; first {task['queries']} queries of {task['source']}, {task['pairs']} pairs, "
        f"{task['tokens']:,} tokens of which {result.work.unique_tokens:,} unique inputs; {ROUNDS} rounds by turns"
    )
    sizes = ", ".join(f"{size} {seconds:.1f} s" for size, seconds in result.batch_size_seconds.items())
    print(f"padded-tuned takes batches of {result.batch_size} ({sizes}); GEMM {result.gemm_rate / 1e9:.0f} GFLOP/s")
    print(result.table())
    return result


@pytest.mark.parametrize("peer", [PADDED, TUNED])
def test_contenders_agree(peer: str, comparison: Comparison) -> None:
    assert comparison.differences[peer].max <= MAX_DIFFERENCE[DTYPE]
    assert comparison.differences[peer].mean <= MEAN_DIFFERENCE[DTYPE]


@pytest.mark.benchmark(group="end to end", timer=CLOCK)
@pytest.mark.parametrize("name", [OURS, PADDED, TUNED])
def test_end_to_end(name: str, comparison: Comparison, benchmark: BenchmarkFixture) -> None:
    CLOCK.rounds = list(comparison.seconds[name])
    benchmark.extra_info.update(comparison.contenders()[name])
    benchmark.pedantic(CLOCK.pass_round, rounds=ROUNDS)
