"""The answer NLL on a CPU against its peers and a bare GEMM of the same shape: part of ``make bench``.

FASTSCORE_BENCH_KERNEL (256x576x49152: rows, D, V), FASTSCORE_BENCH_KERNEL_ROUNDS (9) and FASTSCORE_BENCH_DTYPE (auto)
change the task. On a GPU ``bench/gpu_kernel.py`` is the one to run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import suite
import torch
from device_timer import HostTimer
from environment import environment, one_line
from kernel_cells import Agreement, Cell, make_rows, make_weights
from kernel_measure import LIBRARY_GEMM, call, check, library_gemm
from kernel_peers import ANSWER_NLL, PEERS, find_contenders
from pytest_benchmark.fixture import BenchmarkFixture
from rounds import MeasuredRounds, interleave, medians, table

from fastscore.devices import DTYPES

CELL = Cell(*map(int, os.environ.get("FASTSCORE_BENCH_KERNEL", "256x576x49152").split("x")))
ROUNDS = int(os.environ.get("FASTSCORE_BENCH_KERNEL_ROUNDS", "9"))
DTYPE = suite.dtype()
CPU = torch.device("cpu")
# torch's own in chunks takes twenty times as long as without, where there are fewer rows than hidden entries.
CONTENDERS = find_contenders(CPU, tuple(name for name in (ANSWER_NLL, *PEERS) if name != "F.linear_ce-chunked"))[0]
NAMES = [one.name for one in CONTENDERS]
CLOCK = MeasuredRounds()


@dataclass(frozen=True, slots=True)
class Measured:
    agreements: dict[str, Agreement]
    errors: dict[str, str]
    seconds: dict[str, list[float]]


@pytest.fixture(scope="module")
def measured() -> Measured:
    weights = make_weights(CELL, DTYPES[DTYPE], CPU, cache_bytes=0)
    hidden_ND, target_N = make_rows(CELL, DTYPES[DTYPE], CPU)
    agreements, errors = check(CONTENDERS, hidden_ND, weights[0], target_N, HostTimer())
    runs: dict[str, Callable[[], object]] = {
        one.name: partial(call(one.compute, hidden_ND, weights, target_N), 0) for one in CONTENDERS
    }
    runs[LIBRARY_GEMM] = partial(library_gemm(hidden_ND, weights), 0)
    interleave(runs, 1)
    result = Measured(agreements, errors, interleave(runs, ROUNDS))

    median = medians(result.seconds)
    rows = [
        [
            name,
            f"{seconds * 1e3:.1f}",
            f"{seconds / median[ANSWER_NLL]:.2f}",
            f"{median[LIBRARY_GEMM] / seconds:.0%}",
            f"{agreements[name].max_error:.0e}" if name in agreements else "",
        ]
        for name, seconds in median.items()
    ]
    print(f"\n{one_line(environment())}\n{CELL}, {DTYPE}, {ROUNDS} rounds by turns", end="; ")
    print(f"GEMM {CELL.flops / median[LIBRARY_GEMM] / 1e9:.0f} GFLOP/s")
    print(table(["", "median ms", f"x {ANSWER_NLL}", "of GEMM rate", "max error"], rows))
    return result


@pytest.mark.parametrize("name", NAMES)
def test_contenders_agree_with_fp64(name: str, measured: Measured) -> None:
    assert name not in measured.errors, measured.errors[name]
    assert measured.agreements[name].agrees, measured.agreements[name]


@pytest.mark.benchmark(group="answer NLL", timer=CLOCK)
@pytest.mark.parametrize("name", [*NAMES, LIBRARY_GEMM])
def test_answer_nll(name: str, measured: Measured, benchmark: BenchmarkFixture) -> None:
    CLOCK.rounds = list(measured.seconds[name])
    median = medians(measured.seconds)
    benchmark.extra_info.update(times_answer_nll=median[name] / median[ANSWER_NLL], cell=str(CELL), dtype=DTYPE)
    if name == ANSWER_NLL:
        ratio = median[ANSWER_NLL] / median[LIBRARY_GEMM]
        suite.record(benchmark, {f"kernel: {ANSWER_NLL} / {LIBRARY_GEMM}": ratio}, f"{CELL}, {DTYPE}")
    benchmark.pedantic(CLOCK.pass_round, rounds=ROUNDS)
