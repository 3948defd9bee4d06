"""The kernel's benchmark in parts: what it calls right and wrong, how it times, and what its reports say."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fastscore_kernels.launch_configs import CONFIGS, LaunchConfig
from fastscore_kernels.path_table import nearest_path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

import kernel_cells  # noqa: E402
import kernel_report  # noqa: E402
from device_timer import HostTimer, Run, Timing, take_turns  # noqa: E402
from kernel_cells import Cell, compare_with_truth, find_truth, make_rows, make_weights  # noqa: E402
from kernel_configs import candidates_for, show_config, split_choices  # noqa: E402
from kernel_measure import check, limit_of, poisoned_memory  # noqa: E402
from kernel_peers import TORCH_CHUNKED, Contender, find_contenders  # noqa: E402

CPU = torch.device("cpu")


def inputs(cell: Cell) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(cell.num_rows)
    (weight_VD,) = make_weights(cell, torch.float32, CPU, cache_bytes=0)
    hidden_ND, target_N = make_rows(cell, torch.float32, CPU)
    return hidden_ND, weight_VD, target_N


@pytest.mark.parametrize("cell", [Cell(1, 3, 7), Cell(300, 9, 101)], ids=str)
@pytest.mark.parametrize("weight_rows_at_once", [1, 13, 1000])
def test_truth_is_log_softmax_in_fp64(cell: Cell, weight_rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cells, "TRUTH_BYTES", 8 * cell.hidden_size * weight_rows_at_once)
    hidden_ND, weight_VD, target_N = inputs(cell)
    truth = find_truth(hidden_ND, weight_VD, target_N)
    logits_NV = hidden_ND.double() @ weight_VD.double().T
    nll_N = -logits_NV.log_softmax(dim=1).gather(1, target_N[:, None])[:, 0]
    assert len(truth.rows) == min(cell.num_rows, kernel_cells.CHECKED_ROWS) == len(truth.rows.unique())
    assert {0, cell.num_rows - 1} <= set(truth.rows.tolist())
    torch.testing.assert_close(truth.nll_r, nll_N[truth.rows], atol=1e-12, rtol=0)
    torch.testing.assert_close(truth.best_r, logits_NV.amax(dim=1)[truth.rows], atol=1e-12, rtol=0)
    assert 0 < truth.reference_error < truth.tolerance < 1e-4


def test_a_wrong_result_does_not_agree() -> None:
    cell = Cell(300, 9, 101)
    hidden_ND, weight_VD, target_N = inputs(cell)
    truth = find_truth(hidden_ND, weight_VD, target_N)
    logits_NV = hidden_ND @ weight_VD.T
    nll_N, top1_N = -logits_NV.log_softmax(dim=1).gather(1, target_N[:, None])[:, 0], logits_NV.argmax(dim=1)

    def agrees(nll_N: torch.Tensor, top1_N: torch.Tensor | None) -> bool:
        return compare_with_truth(nll_N, top1_N, truth, nll_right_N, truth.tolerance).agrees

    nll_right_N = nll_N.clone()
    assert agrees(nll_N, top1_N)
    assert agrees(nll_N, None)
    checked = set(truth.rows.tolist())
    unchecked = next(row for row in range(cell.num_rows) if row not in checked)
    for row in (0, unchecked):
        for bad in (math.nan, math.inf, float(nll_N[row]) + 1e-3):
            wrong_N = nll_N.clone()
            wrong_N[row] = bad
            assert not agrees(wrong_N, top1_N), (row, bad)
    for bad_token in (-1, cell.vocab_size, int(logits_NV[0].argmin())):
        wrong_N = top1_N.clone()
        wrong_N[0] = bad_token
        assert not agrees(nll_N, wrong_N), bad_token
    assert not agrees(nll_N[:-1], top1_N)


def test_memory_that_nobody_writes_shows_up_and_failures_are_named() -> None:
    def forgetful(
        hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        right_N, _ = right.compute(hidden_ND, weight_VD, target_N)
        out_N = torch.empty_like(right_N)
        out_N[1:] = right_N[1:]
        return out_N, None

    def failing(*tensors: torch.Tensor) -> tuple[torch.Tensor, None]:
        raise KeyError("no such luck")

    (right,), _ = find_contenders(CPU, (TORCH_CHUNKED,))
    contenders = [right, Contender("forgetful", forgetful, None), Contender("failing", failing, None)]
    agreements, errors = check(contenders, *inputs(Cell(6, 9, 101)), HostTimer())
    assert {name: one.agrees for name, one in agreements.items()} == {TORCH_CHUNKED: True, "forgetful": False}
    assert agreements["forgetful"].max_error is None
    assert errors == {"failing": "KeyError: 'no such luck'"}


def test_poison_is_for_the_checks_alone() -> None:
    with poisoned_memory():
        assert torch.empty(7).isnan().all()
        assert torch.empty(7, dtype=torch.int32).eq(torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_cells_count_operations_bytes_and_copies_that_a_cache_cannot_hold() -> None:
    cell = Cell(16, 4096, 128256)
    assert cell.flops == 2 * 16 * 4096 * 128256
    assert cell.bytes_moved(2) == 2 * 4096 * (128256 + 16) + 16 * 20
    assert cell.logits_bytes() == 4 * 16 * 128256
    small = Cell(4, 8, 100)
    weights = make_weights(small, torch.bfloat16, CPU, cache_bytes=1000)
    assert sum(weight.nbytes for weight in weights) >= 8 * 1000 > sum(weight.nbytes for weight in weights[1:])
    assert len({weight.data_ptr() for weight in weights}) == len(weights)
    _, target_N = make_rows(small, torch.float32, CPU)
    assert (int(target_N[0]), int(target_N[-1])) == (99, 0)
    assert kernel_cells.parse_shapes(["4096x128256"]) == [(4096, 128256)]
    with pytest.raises(SystemExit, match="DxV"):
        kernel_cells.parse_shapes(["4096"])


@pytest.mark.parametrize(("gemm_seconds", "copy_rate", "limit_us"), [(2e-3, 1e9, 2e3), (1e-6, 1e6, 4.8e3)])
def test_the_limit_is_the_larger_time(gemm_seconds: float, copy_rate: float, limit_us: float) -> None:
    cell = Cell(5, 20, 100)  # 4 * 20 * 105 bytes and 20 for each row: 8500
    limit = limit_of(cell, torch.float32, Timing([gemm_seconds]), {"copy_bytes_per_s": copy_rate})
    assert limit["limit_us"] == pytest.approx(max(gemm_seconds * 1e6, 8500 / copy_rate * 1e6))
    assert limit["gemm_flops_per_s"] == pytest.approx(2 * 5 * 20 * 100 / gemm_seconds)
    assert limit_us <= limit["limit_us"]


class ReplayTimer(HostTimer):
    """A CPU's timer whose replays are the calls again: what is divided by what can be seen without a GPU."""

    def capture(self, run: Run, calls: int) -> Run | None:
        return lambda _: [run(call) for call in range(calls)]


def test_contenders_take_turns_on_input_sets_that_change() -> None:
    order: list[tuple[str, int]] = []

    def contender(name: str) -> Run:
        return lambda number: order.append((name, number % 3))

    runs = {name: contender(name) for name in "AB"}
    timings = take_turns(ReplayTimer(), runs, {"B": runs["B"]}, input_sets=3, budget_seconds=0, max_rounds=9)
    assert [len(timings[name].stream) for name in "AB"] == [3, 3]
    assert [len(timings[name].graph) for name in "AB"] == [0, 3]
    # Three calls each to find out how long they are, two of them on the first set. Both are far shorter than a sample,
    # which therefore goes round the three sets a whole number of times, after a call on the last of them.
    for name in "AB":
        numbers = [number for who, number in order if who == name][3:]
        assert numbers.count(2) > numbers.count(0) == numbers.count(1) > 0
    turns = [who for i, (who, _) in enumerate(order) if i == 0 or order[i - 1][0] != who]
    assert "".join(turns) == "AB" + "AB" + "AB" * 3  # How long they are, one more call each, three rounds.

    replayed = take_turns(ReplayTimer(), runs, runs, input_sets=3, budget_seconds=0, max_rounds=9)
    for timing in replayed.values():
        # Microseconds each, however many calls a replay holds.
        assert 0 < timing.seconds < 1e-4
    assert Timing(stream=[5.0], graph=[1.0, 2.0, 9.0]).seconds == 2.0
    assert Timing(stream=[1.0, 2.0, 3.0, 4.0, 5.0]).spread == pytest.approx(2 / 3)


def test_a_long_call_is_neither_repeated_nor_captured() -> None:
    calls: list[int] = []

    def slow(number: int) -> None:
        calls.append(number)
        torch.randn(700, 700) @ torch.randn(700, 700)

    timer = ReplayTimer()
    while timer.seconds(slow, 1, False) < 3e-3:
        previous = slow

        def slow(number: int, previous: Run = previous) -> None:
            previous(number)
            previous(number)

    calls.clear()
    timing = take_turns(timer, {"slow": slow}, {"slow": slow}, input_sets=2, budget_seconds=0, max_rounds=9)["slow"]
    assert len(timing.stream) == 3
    assert timing.graph == []


@pytest.mark.parametrize("num_rows", [1, 16, 40, 64, 256, 16384])
@pytest.mark.parametrize("arch", CONFIGS)
def test_candidates_suit_the_rows_and_their_splits_the_chip(arch: str, num_rows: int) -> None:
    candidates = candidates_for(arch, num_rows, 2)
    assert candidates
    for config in candidates:
        assert config.block_a < 2 * max(16, num_rows)
        row_blocks, num_tiles = -(-num_rows // config.block_a), -(-128256 // config.block_v)
        splits = split_choices(config, num_rows, 128256, 132)
        assert len(splits) == len(set(splits))
        for split in splits[1:]:
            assert split <= num_tiles
            assert split * row_blocks >= min(132 * config.programs_per_sm, num_tiles)


def test_a_configuration_is_shown_as_it_is_written() -> None:
    for cases in CONFIGS.values():
        for case in cases:
            assert eval(show_config(case.config), {"LaunchConfig": LaunchConfig}) == case.config  # noqa: S307


def report(us: float, limit_us: float = 100.0, **values: Any) -> dict[str, Any]:
    return {
        "us": us,
        "times_limit": us / limit_us,
        "stream_us": us,
        "graph_us": us,
        "max_error": 1e-5,
        "peak_share_of_logits": 0.001,
        **values,
    }


def cell_report(num_rows: int, agrees: bool = True, **contenders: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_rows": num_rows,
        "hidden_size": 4096,
        "vocab_size": 128256,
        "dtype": "bfloat16",
        "agrees": agrees,
        "limit_us": 100.0,
        "gemm_us": 95.0,
        "gemm_flops_per_s": 7e14,
        "errors": {},
        "contenders": contenders,
    }


@pytest.mark.parametrize(
    ("cell", "missed"),
    [
        (cell_report(64, answer_nll=report(115), cce=report(300)), []),
        (cell_report(64, answer_nll=report(116), cce=report(300)), ["limit"]),
        (cell_report(1024, answer_nll=report(200), cce=report(300)), []),
        (cell_report(4096, answer_nll=report(105)), []),
        (cell_report(4096, answer_nll=report(106)), ["GEMM rate"]),
        (cell_report(64, answer_nll=report(101), cce=report(101), liger=report(102)), ["cce"]),
        # A peer without replays is compared by queued calls; one with both must be behind in both.
        (cell_report(64, answer_nll=report(101, stream_us=300), liger=report(250, graph_us=None)), ["liger"]),
        (cell_report(64, answer_nll=report(101, stream_us=300), liger=report(310, graph_us=None)), []),
        (cell_report(64, answer_nll=report(101, stream_us=300), cce=report(110, stream_us=290)), ["cce"]),
        (cell_report(64, answer_nll=report(101, graph_us=None), cce=report(110, graph_us=5)), []),
        (cell_report(64, answer_nll=report(101, peak_share_of_logits=0.01)), ["memory"]),
        (cell_report(64, answer_nll=report(101, peak_share_of_logits=None)), []),
        (cell_report(64, agrees=False, answer_nll=report(101)), ["not right"]),
        (cell_report(64, answer_nll={"max_error": 3.0, "agrees": False}), ["not right"]),
    ],
)
def test_aims(cell: dict[str, Any], missed: list[str]) -> None:
    assert kernel_report.missed_aims(cell) == missed


def test_measured_paths_are_what_the_kernels_read(tmp_path: Path) -> None:
    path = tmp_path / "paths.json"
    few = cell_report(64, fused=report(100), gemm=report(130))
    many = cell_report(4096, fused=report(1000), gemm=report(900))
    kernel_report.merge_paths(path, "GPU 1", [few, many])
    kernel_report.merge_paths(path, "GPU 2", [cell_report(64, fused=report(9), gemm=report(8))])
    tuned = {**few, "best": {"us": 50.0}, "gemm_path_us": 40.0}
    del tuned["contenders"]
    skipped = {**many, "skipped": "no time left"}
    del skipped["contenders"]
    kernel_report.merge_paths(path, "GPU 1", [tuned, skipped, cell_report(4096, fused=report(7))])
    table = json.loads(path.read_text("utf-8"))
    assert {name: len(cells) for name, cells in table.items()} == {"GPU 1": 2, "GPU 2": 1}
    assert nearest_path(table["GPU 1"], 4096, 128256, 4096, "torch.bfloat16") == "gemm"
    assert nearest_path(table["GPU 1"], 64, 128256, 4096, "torch.bfloat16") == "gemm"
    assert (table["GPU 1"][0]["fused_us"], table["GPU 1"][1]["fused_us"]) == (50.0, 1000.0)
    assert nearest_path(table["GPU 2"], 64, 128256, 4096, "torch.float16") == "fused"


def test_suggestion_loses_least_where_it_loses_most() -> None:
    def tuned(num_rows: int, **us: float) -> dict[str, Any]:
        tried = [{"config": name, "num_splits": 1, "us": value} for name, value in us.items()]
        return {**cell_report(num_rows), "best": min(tried, key=lambda one: one["us"]), "tried": tried}

    cells = [
        tuned(16, A=100, B=110, C=300),
        tuned(16, A=150, B=110, C=100),
        tuned(64, A=100, B=90),
        {**cell_report(64), "skipped": "no time left"},
    ]
    assert kernel_report.suggest(cells) == [(16, "B", 1.1), (64, "B", 1.0)]
