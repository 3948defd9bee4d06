"""Which of the two GPU paths is faster for a shape, as measured by ``bench/gpu_kernel.py --tune``.

The table is written by that command and is empty until it has run on a device. Until then, and for devices and shapes
far from any measured one, the fused kernel runs.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("measured_paths.json")


@lru_cache(maxsize=4096)
def choose_path(device: torch.device, num_rows: int, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> str:
    """``"fused"`` or ``"gemm"``: that of the nearest measured shape on this kind of device."""
    return nearest_path(
        measured_cells(torch.cuda.get_device_name(device)), num_rows, vocab_size, hidden_size, str(dtype)
    )


def nearest_path(cells: list[dict[str, Any]], num_rows: int, vocab_size: int, hidden_size: int, dtype: str) -> str:
    """The faster path in the nearest cell of that dtype; every dimension must be within a factor of two."""
    best, path = 1.0, "fused"
    for cell in cells:
        if cell["dtype"] != dtype.removeprefix("torch."):
            continue
        distance = max(
            abs(math.log2(ours / theirs))
            for ours, theirs in (
                (max(num_rows, 1), cell["num_rows"]),
                (vocab_size, cell["vocab_size"]),
                (hidden_size, cell["hidden_size"]),
            )
        )
        if distance <= best:
            best, path = distance, "fused" if cell["fused_us"] <= cell["gemm_us"] else "gemm"
    return path


@lru_cache
def measured_cells(device_name: str) -> list[dict[str, Any]]:
    """The measured cells of a kind of device; none where it was never measured."""
    if not TABLE.exists():
        return []
    cells: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8")).get(device_name, [])
    return cells
