"""Times block sizes and splits of the fused kernel: a developer's command, never a user's first call.

First every candidate with the splits that would be chosen for it, a few rounds; then the best of them with several
splits. What is measured belongs into ``kernels/launch_configs.py``, by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from device_timer import HostTimer, Run, Timing, take_turns
from fastscore_kernels.fused_launch import _device, fused_partials, gemm_partials
from fastscore_kernels.launch_configs import LaunchConfig, choose_config
from fastscore_kernels.partials import nll_from_partials
from kernel_cells import Cell, compare_with_truth, find_truth, make_rows
from kernel_compile import compile_ahead, shipped_jobs
from kernel_configs import candidates_for, show_config, split_choices
from kernel_measure import (
    BUDGET_SECONDS,
    LIBRARY_GEMM,
    call,
    free_memory,
    library_gemm,
    limit_of,
    poisoned_memory,
)
from kernel_peers import GEMM_PATH, TORCH_CHUNKED, Compute, find_contenders

FINALISTS = 4
NEAR_BEST = 1.2
"""A candidate slower than this times the fastest is not tried with other splits."""
FIRST_ROUNDS = 3


class Tuner:
    """Tunes cell after cell; compiles for all of them first."""

    def __init__(
        self, shapes: Sequence[tuple[int, int]], rows: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.arch, self.num_sms = _device(device)
        self.dtype = dtype
        jobs = shipped_jobs(shapes, rows, dtype, device)
        jobs += [
            (config, hidden_size, dtype, device)
            for hidden_size, _ in shapes
            for num_rows in rows
            for config in candidates_for(self.arch, num_rows, dtype.itemsize)
        ]
        errors = compile_ahead(jobs, processes=None if device.type == "cuda" else 0)
        self.broken = {(config, hidden_size): error for (config, hidden_size, *_), error in errors.items()}
        for (config, hidden_size), error in self.broken.items():
            print(f"does not run with D={hidden_size}: {show_config(config)}: {error}", flush=True)

    def shipped(self, num_rows: int) -> LaunchConfig:
        return choose_config(self.arch, num_rows, self.dtype.itemsize)

    def tune_cell(
        self,
        cell: Cell,
        weights: Sequence[torch.Tensor],
        timer: HostTimer,
        device_limits: Mapping[str, Any],
        max_rounds: int,
    ) -> dict[str, Any]:
        """The times of all that was tried, and of the GEMM path beside them."""
        hidden_ND, target_N = make_rows(cell, self.dtype, weights[0].device)
        shipped = self.shipped(cell.num_rows)
        choices = {
            config: split_choices(config, cell.num_rows, cell.vocab_size, self.num_sms)
            for config in dict.fromkeys([shipped, *candidates_for(self.arch, cell.num_rows, self.dtype.itemsize)])
            if (config, cell.hidden_size) not in self.broken
        }
        computes = {config: _fused(config, splits[0]) for config, splits in choices.items()}
        wrong = find_wrong(computes, hidden_ND, weights[0], target_N)
        for config in wrong:
            print(f"WRONG in {cell}: {show_config(config)}", flush=True)
            del computes[config]

        def take(computes: Mapping[Any, Compute], budget_seconds: float, max_rounds: int) -> dict[Any, Timing]:
            runs: dict[Any, Run] = {key: call(one, hidden_ND, weights, target_N) for key, one in computes.items()}
            runs[LIBRARY_GEMM] = library_gemm(hidden_ND, weights)
            timings = take_turns(
                timer,
                runs,
                runs,
                input_sets=len(weights),
                budget_seconds=budget_seconds,
                max_rounds=max_rounds,
            )
            free_memory(hidden_ND.device)
            return timings

        first = take(computes, BUDGET_SECONDS / 4, FIRST_ROUNDS)
        by_time = sorted(computes, key=lambda config: first[config].seconds)
        finalists = [
            config for config in by_time[:FINALISTS] if first[config].seconds <= NEAR_BEST * first[by_time[0]].seconds
        ]
        entrants: dict[Any, Compute] = {
            (config, splits): _fused(config, splits) for config in finalists for splits in choices[config]
        }
        if shipped in computes:
            entrants[shipped, choices[shipped][0]] = computes[shipped]
        final = take({**entrants, GEMM_PATH: _gemm}, BUDGET_SECONDS, max_rounds)
        limit = limit_of(cell, self.dtype, final[LIBRARY_GEMM], device_limits)
        times = {(config, choices[config][0]): first[config] for config in computes}
        times |= {key: final[key] for key in entrants}
        best = min(entrants, key=lambda key: final[key].seconds)
        tried = [{**_tried(*key, timing), "final": key in entrants} for key, timing in times.items()]
        return {
            "agrees": not wrong,
            **limit,
            "shipped_us": final[shipped, choices[shipped][0]].seconds * 1e6 if shipped in computes else None,
            "gemm_path_us": final[GEMM_PATH].seconds * 1e6,
            "best": _tried(*best, final[best]),
            "tried": sorted(tried, key=lambda one: one["us"]),
        }


def find_wrong(
    computes: Mapping[LaunchConfig, Compute], hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor
) -> list[LaunchConfig]:
    """The configurations whose results are not within the tolerance of fp64."""
    truth = find_truth(hidden_ND, weight_VD, target_N)
    (independent,), _ = find_contenders(hidden_ND.device, (TORCH_CHUNKED,))
    others_N, _ = independent.compute(hidden_ND, weight_VD, target_N)
    wrong = []
    for config, compute in computes.items():
        with poisoned_memory():
            nll_N, top1_N = compute(hidden_ND, weight_VD, target_N)
        if not compare_with_truth(nll_N, top1_N, truth, others_N, truth.tolerance).agrees:
            wrong.append(config)
    return wrong


def _fused(config: LaunchConfig, num_splits: int) -> Compute:
    def compute(
        hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = fused_partials(hidden_ND, weight_VD, target_N[:, None], config=config, num_splits=num_splits)
        return nll_from_partials(parts)[:, 0], parts.top1_A

    return compute


def _gemm(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    parts = gemm_partials(hidden_ND, weight_VD, target_N[:, None])
    return nll_from_partials(parts)[:, 0], parts.top1_A


def _tried(config: LaunchConfig, num_splits: int, timing: Timing) -> dict[str, Any]:
    return {
        "config": show_config(config),
        "num_splits": num_splits,
        "us": timing.seconds * 1e6,
        "spread": timing.spread,
        "rounds": len(timing.stream),
    }
