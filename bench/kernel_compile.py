"""Compiles the fused kernel for many configurations at once, so that a lent GPU does not wait for the compiler."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch
from fastscore_kernels.fused_launch import _device, fused_partials
from fastscore_kernels.launch_configs import LaunchConfig, choose_config

MOST_PROCESSES = 14

CompileJob = tuple[LaunchConfig, int, torch.dtype, torch.device]
"""Configuration, D, dtype, device."""


def shipped_jobs(
    shapes: Iterable[tuple[int, int]], rows: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[CompileJob]:
    """What the fused path itself takes for those D and N."""
    arch, _ = _device(device)
    return [
        (choose_config(arch, num_rows, dtype.itemsize), hidden_size, dtype, device)
        for hidden_size, _ in shapes
        for num_rows in rows
    ]


def compile_ahead(jobs: Iterable[CompileJob], *, processes: int | None = None) -> dict[CompileJob, str]:
    """Compile in processes that share Triton's cache on disk; what went wrong, by job. 0 processes: in this one."""
    distinct = list(dict.fromkeys(jobs))
    if processes is None:
        processes = min(MOST_PROCESSES, len(distinct), os.cpu_count() or 1)
    try:
        if processes == 0:
            errors = list(map(_compile, distinct))
        else:
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
                errors = list(pool.map(_compile, distinct))
    except BrokenProcessPool as error:
        print(f"compiling ahead ended early; the rest is compiled when it is needed: {error}", flush=True)
        return {}
    return {job: error for job, error in zip(distinct, errors, strict=True) if error}


def _compile(job: CompileJob) -> str:
    """Run the kernel once on a sliver of a vocabulary: what it is specialised on does not depend on N or V.

    (Only on whether V is a multiple of 16, as those of the measured shapes are.)
    """
    config, hidden_size, dtype, device = job
    hidden_AD = torch.randn(config.block_a, hidden_size, dtype=dtype, device=device)
    weight_VD = torch.randn(256, hidden_size, dtype=dtype, device=device)
    target_AJ = torch.zeros(config.block_a, 1, dtype=torch.int64, device=device)
    try:
        fused_partials(hidden_AD, weight_VD, target_AJ, config=config, num_splits=1)
    except Exception as error:  # noqa: BLE001 compilers raise anything; the candidate is left out, and why is printed
        return f"{type(error).__name__}: {error}"[:300]
    return ""
