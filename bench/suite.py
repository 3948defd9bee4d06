"""What the benchmarks of ``make bench`` have in common: what changes their task, and the ratios they record.

A ratio is the time of a part of fastscore over that of something else, both measured by turns in the same run: lower is
better, and machines that differ in speed have nearly the same. ``regression.py`` compares them with those of before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from contenders import dtype_name
from pytest_benchmark.fixture import BenchmarkFixture

from fastscore.config import DEFAULT_MODEL
from fastscore.devices import choose_dtype

MODEL = os.environ.get("FASTSCORE_BENCH_MODEL", DEFAULT_MODEL)
QUERIES = int(os.environ.get("FASTSCORE_BENCH_QUERIES", "3"))


def rounds(default: int) -> int:
    return int(os.environ.get("FASTSCORE_BENCH_ROUNDS", default))


def dtype() -> str:
    """``fp32``, ``bf16`` or ``fp16``: what was asked for, or what fastscore would choose for this CPU."""
    return dtype_name(choose_dtype(os.environ.get("FASTSCORE_BENCH_DTYPE", "auto"), torch.device("cpu")))


def record(benchmark: BenchmarkFixture, ratios: Mapping[str, float], task: str) -> None:
    """Keep ratios with a benchmark. Those of another task, or of other threads, cannot be compared with them."""
    benchmark.extra_info["ratios"] = dict(ratios)
    benchmark.extra_info["task"] = f"{task}, {torch.get_num_threads()} threads"
