"""Which of the two GPU paths a shape gets, from measured cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastscore_kernels import path_table
from fastscore_kernels.path_table import choose_path, measured_cells, nearest_path


def cell(num_rows: int, vocab_size: int, hidden_size: int, faster: str, dtype: str = "bfloat16") -> dict[str, Any]:
    fused_us, gemm_us = (1.0, 2.0) if faster == "fused" else (2.0, 1.0)
    return {
        "num_rows": num_rows,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "dtype": dtype,
        "fused_us": fused_us,
        "gemm_us": gemm_us,
    }


CELLS = [
    cell(16, 128256, 4096, "fused"),
    cell(4096, 128256, 4096, "gemm"),
    cell(4096, 49152, 576, "fused"),
    cell(4096, 128256, 4096, "fused", "float32"),
]


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "hidden_size", "dtype", "path"),
    [
        (4096, 128256, 4096, "torch.bfloat16", "gemm"),
        (4096, 128256, 4096, "bfloat16", "gemm"),
        (8192, 128256, 4096, "torch.bfloat16", "gemm"),  # twice as many: still near
        (2048, 64128, 2048, "torch.bfloat16", "gemm"),  # every dimension half
        (8193, 128256, 4096, "torch.bfloat16", "fused"),  # more than twice
        (4096, 128256, 2047, "torch.bfloat16", "fused"),
        (4096, 60000, 4096, "torch.bfloat16", "fused"),  # the vocabulary is too far
        (4096, 128256, 4096, "torch.float16", "fused"),  # never measured
        (4096, 128256, 4096, "torch.float32", "fused"),  # measured apart
        (0, 128256, 4096, "torch.bfloat16", "fused"),
        (1, 1, 1, "torch.bfloat16", "fused"),
    ],
)
def test_nearest_cell(num_rows: int, vocab_size: int, hidden_size: int, dtype: str, path: str) -> None:
    assert nearest_path(CELLS, num_rows, vocab_size, hidden_size, dtype) == path


def test_the_nearer_of_two_cells_decides() -> None:
    cells = [cell(1000, 50000, 4096, "gemm"), cell(3000, 50000, 4096, "fused")]
    assert [nearest_path(cells, rows, 50000, 4096, "bfloat16") for rows in (1500, 1700, 1800, 2000)] == [
        "gemm",
        "gemm",
        "fused",
        "fused",
    ]
    assert nearest_path(cells[::-1], 1500, 50000, 4096, "bfloat16") == "gemm"


def test_nothing_measured() -> None:
    assert nearest_path([], 4096, 128256, 4096, "torch.bfloat16") == "fused"


def test_table_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device's name; one that was never measured, and a missing file, have no cells."""
    table = tmp_path / "measured_paths.json"
    table.write_text(json.dumps({"NVIDIA H100 80GB HBM3": CELLS}), encoding="utf-8")
    for path, name, expected in [
        (table, "NVIDIA H100 80GB HBM3", CELLS),
        (table, "NVIDIA A100", []),
        (tmp_path / "none.json", "NVIDIA H100 80GB HBM3", []),
    ]:
        measured_cells.cache_clear()
        monkeypatch.setattr(path_table, "TABLE", path)
        assert measured_cells(name) == expected
    measured_cells.cache_clear()


def test_what_ships_can_be_read() -> None:
    """Whatever devices the table holds: each cell names a shape, a dtype and both times."""
    measured_cells.cache_clear()
    if not path_table.TABLE.exists():
        assert measured_cells("NVIDIA H100 80GB HBM3") == []
        return
    for name, cells in json.loads(path_table.TABLE.read_text(encoding="utf-8")).items():
        for one in measured_cells(name):
            shape = one["num_rows"], one["vocab_size"], one["hidden_size"]
            faster = "fused" if one["fused_us"] <= one["gemm_us"] else "gemm"
            assert nearest_path(cells, *shape, one["dtype"]) == faster


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_device_has_a_path() -> None:
    assert choose_path(torch.device("cuda", 0), 4096, 128256, 4096, torch.bfloat16) in ("fused", "gemm")
