"""One cell: whether all contenders agree with fp64, their memory, and their times by turns beside the limit."""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from device_timer import HostTimer, Run, Timing, take_turns
from kernel_cells import Agreement, Cell, compare_with_truth, find_truth, make_rows
from kernel_peers import OURS, PEER_TOLERANCE, TORCH_CHUNKED, Compute, Contender, find_contenders

LIBRARY_GEMM = "library GEMM"
BUDGET_SECONDS = 4.0
"""For the timed rounds of a cell."""


def measure_device(timer: HostTimer, device: torch.device) -> dict[str, Any]:
    """What the device is, and the rates of a large copy and a large matrix product there."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    source = torch.randn((1 << 31) if on_gpu else (1 << 20), dtype=dtype, device=device)
    copied = torch.empty_like(source)
    side = 8192 if on_gpu else 256
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    timings = take_turns(
        timer,
        {"copy": lambda _: copied.copy_(source), "product": lambda _: left @ right},
        {},
        input_sets=1,
        budget_seconds=BUDGET_SECONDS if on_gpu else 0.1,
        max_rounds=15,
    )
    return {
        "name": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "cache_bytes": timer.cache_bytes,
        "copy_bytes_per_s": 2 * source.nbytes / timings["copy"].seconds,
        "copy_spread": timings["copy"].spread,
        "product": f"{side}x{side}x{side} {dtype}",
        "product_flops_per_s": 2 * side**3 / timings["product"].seconds,
    }


def measure_cell(
    cell: Cell,
    weights: Sequence[torch.Tensor],
    timer: HostTimer,
    contenders: Sequence[Contender],
    device_limits: Mapping[str, Any],
    max_rounds: int,
) -> dict[str, Any]:
    """Agreement first, then memory, then times. A contender that is wrong or fails is not timed."""
    hidden_ND, target_N = make_rows(cell, weights[0].dtype, weights[0].device)
    agreements, errors = check(contenders, hidden_ND, weights[0], target_N, timer)
    timed = [one for one in contenders if one.name in agreements and agreements[one.name].agrees]
    peaks = {one.name: timer.peak_bytes(call(one.compute, hidden_ND, weights, target_N)) for one in timed}
    runs = {one.name: call(one.compute, hidden_ND, weights, target_N) for one in timed}
    captured = {one.name: call(one.captured, hidden_ND, weights, target_N) for one in timed if one.captured is not None}
    runs[LIBRARY_GEMM] = captured[LIBRARY_GEMM] = library_gemm(hidden_ND, weights)
    timings = take_turns(
        timer,
        runs,
        captured,
        input_sets=len(weights),
        budget_seconds=BUDGET_SECONDS,
        max_rounds=max_rounds,
    )
    limit = limit_of(cell, weights[0].dtype, timings[LIBRARY_GEMM], device_limits)
    report = {
        name: {
            **agreement.report(),
            **({} if name not in timings else time_report(timings[name], limit["limit_us"])),
            "peak_bytes": peaks.get(name),
            "peak_share_of_logits": None if peaks.get(name) is None else peaks[name] / cell.logits_bytes(),
        }
        for name, agreement in agreements.items()
    }
    del runs, captured
    free_memory(hidden_ND.device)
    return {
        "agrees": all(one.name in agreements and agreements[one.name].agrees for one in contenders if one.name in OURS),
        **limit,
        "input_sets": len(weights),
        "contenders": report,
        "errors": errors,
    }


def check(
    contenders: Sequence[Contender],
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    timer: HostTimer,
) -> tuple[dict[str, Agreement], dict[str, str]]:
    """Each contender's agreement with fp64, its memory poisoned; and what those that failed said."""
    truth = find_truth(hidden_ND, weight_VD, target_N)
    (independent,), _ = find_contenders(hidden_ND.device, (TORCH_CHUNKED,))
    others_N, _ = independent.compute(hidden_ND, weight_VD, target_N)
    agreements: dict[str, Agreement] = {}
    errors: dict[str, str] = {}
    for one in contenders:
        tolerance = truth.tolerance if one.name in OURS else PEER_TOLERANCE
        try:
            with poisoned_memory():
                nll_N, top1_N = one.compute(hidden_ND, weight_VD, target_N)
            agreements[one.name] = compare_with_truth(nll_N, top1_N, truth, others_N, tolerance)
        except Exception as error:  # noqa: BLE001 a peer may raise anything; it is reported, and the others go on
            errors[one.name] = f"{type(error).__name__}: {error}"[:500]
        if not timer.alive():
            raise RuntimeError(f"{one.name} left the device unusable: {errors.get(one.name)}")
    return agreements, errors


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, memory that torch.empty gives is NaN (integers: the largest), so that what nobody writes shows."""
    mode, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def call(compute: Compute, hidden_ND: torch.Tensor, weights: Sequence[torch.Tensor], target_N: torch.Tensor) -> Run:
    """The contender on the inputs of that number; only the weights differ, which is nearly all that is read."""

    @torch.no_grad()
    def run(number: int) -> object:
        return compute(hidden_ND, weights[number % len(weights)], target_N)

    return run


def library_gemm(hidden_ND: torch.Tensor, weights: Sequence[torch.Tensor]) -> Run:
    """The logits, in the inputs' dtype and written to memory: the product that the LM head cannot do without."""
    logits_NV = hidden_ND.new_empty(len(hidden_ND), len(weights[0]))
    transposed = [weight_VD.T for weight_VD in weights]
    return lambda number: torch.mm(hidden_ND, transposed[number % len(transposed)], out=logits_NV)


def limit_of(cell: Cell, dtype: torch.dtype, gemm: Timing, device_limits: Mapping[str, Any]) -> dict[str, Any]:
    """The larger of the library's GEMM and the bytes at the copy's rate."""
    moved = cell.bytes_moved(dtype.itemsize)
    copy_seconds = moved / device_limits["copy_bytes_per_s"]
    return {
        "limit_us": max(gemm.seconds, copy_seconds) * 1e6,
        "copy_us": copy_seconds * 1e6,
        "gemm_us": gemm.seconds * 1e6,
        "gemm_spread": gemm.spread,
        "gemm_flops_per_s": cell.flops / gemm.seconds,
        "bytes_moved": moved,
    }


def time_report(timing: Timing, limit_us: float) -> dict[str, Any]:
    """Microseconds: ``us`` is the device's own time (replays of a graph where there are any, else queued calls)."""
    return {
        "us": timing.seconds * 1e6,
        "times_limit": timing.seconds * 1e6 / limit_us,
        "spread": timing.spread,
        "stream_us": statistics.median(timing.stream) * 1e6,
        "graph_us": statistics.median(timing.graph) * 1e6 if timing.graph else None,
        "rounds": len(timing.stream),
    }


def free_memory(device: torch.device) -> None:
    """Graphs hold theirs until nobody knows them any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
