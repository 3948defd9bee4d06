"""What the kernel's figures say: the aims of each cell, tables to print, and the table of the faster paths."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import write_json
from kernel_peers import ANSWER_NLL, FUSED, GEMM_PATH, OURS, PEERS
from rounds import table

FEW_ROWS, MANY_ROWS = 128, 2048
MOST_TIMES_LIMIT = 1.15
LEAST_GEMM_SHARE = 0.9
MOST_LOGITS_SHARE = 0.01


def missed_aims(cell: Mapping[str, Any]) -> list[str]:
    """Which aims the public call misses, in words; empty where it meets all that apply to the cell."""
    contenders = cell["contenders"]
    ours = contenders.get(ANSWER_NLL, {})
    if not cell["agrees"] or "us" not in ours:
        return ["not right"]
    missed = []
    if cell["num_rows"] <= FEW_ROWS and ours["times_limit"] > MOST_TIMES_LIMIT:
        missed.append("limit")
    if cell["num_rows"] >= MANY_ROWS and cell["gemm_us"] / ours["us"] < LEAST_GEMM_SHARE:
        missed.append("GEMM rate")
    for name in PEERS:
        # Like with like: replays with replays, queued calls with queued calls.
        kinds = [
            kind
            for kind in ("stream_us", "graph_us")
            if ours[kind] is not None and contenders.get(name, {}).get(kind) is not None
        ]
        if any(contenders[name][kind] <= ours[kind] for kind in kinds):
            missed.append(name)
    if ours["peak_share_of_logits"] is not None and ours["peak_share_of_logits"] >= MOST_LOGITS_SHARE:
        missed.append("memory")
    return missed


def show_comparison(cells: Sequence[Mapping[str, Any]], device_limits: Mapping[str, Any]) -> str:
    """A line for each cell: times as multiples of the limit, and which aims are missed."""
    names = [
        name for name in (*OURS, *PEERS) if any("us" in cell.get("contenders", {}).get(name, {}) for cell in cells)
    ]
    rows = []
    for cell in cells:
        start = [shape_of(cell), str(cell["num_rows"])]
        if "contenders" not in cell:
            rows.append([*start, cell.get("skipped") or "failed", *[""] * (len(names) + 5)])
            continue
        contenders = cell["contenders"]
        ours = contenders.get(ANSWER_NLL, {})
        share = ours.get("peak_share_of_logits")
        error = ours.get("max_error")
        rows.append(
            [
                *start,
                f"{cell['limit_us']:.0f}",
                f"{cell['gemm_flops_per_s'] / 1e12:.3g}",
                *(_times_limit(contenders.get(name, {}), name, cell["errors"]) for name in names),
                "" if "stream_us" not in ours else f"{ours['stream_us']:.0f}",
                "" if error is None else f"{error:.0e}",
                "" if share is None else f"{share:.2%}",
                ", ".join(missed_aims(cell)) or "met",
            ]
        )
    columns = ["DxV", "N", "limit us", "GEMM TF/s", *names, "queued us", "error", "memory", "aims missed"]
    aims = (
        f"Times are multiples of the limit (the larger of the library's GEMM and a copy of the bytes at "
        f"{device_limits['copy_bytes_per_s'] / 1e12:.2f} TB/s); ~ marks queued calls, which wait for the host. "
        f"{device_limits['product']} ran at {device_limits['product_flops_per_s'] / 1e12:.0f} TFLOP/s.\n"
        f"Aims of {ANSWER_NLL}: at most {MOST_TIMES_LIMIT} for N <= {FEW_ROWS}; {LEAST_GEMM_SHARE:.0%} of the GEMM's "
        f"rate for N >= {MANY_ROWS}; ahead of every peer; memory under {MOST_LOGITS_SHARE:.0%} of fp32 logits."
    )
    return f"{table(columns, rows)}\n{aims}"


def _times_limit(contender: Mapping[str, Any], name: str, errors: Mapping[str, str]) -> str:
    if "us" in contender:
        return f"{contender['times_limit']:.2f}" + ("~" if contender["graph_us"] is None else "")
    return "error" if name in errors else "WRONG" if contender else ""


def show_tuning(cells: Sequence[Mapping[str, Any]]) -> str:
    """A line for each cell, then for each number of rows the configuration that is best over all shapes."""
    rows = []
    for cell in cells:
        start = [shape_of(cell), str(cell["num_rows"])]
        if "best" not in cell:
            rows.append([*start, cell.get("skipped") or "failed", *[""] * 5])
            continue
        best = cell["best"]
        rows.append(
            [
                *start,
                f"{cell['limit_us']:.0f}",
                f"{cell['shipped_us'] / cell['limit_us']:.2f}",
                f"{best['us'] / cell['limit_us']:.2f}",
                f"{cell['gemm_path_us'] / cell['limit_us']:.2f}",
                best["config"],
                str(best["num_splits"]),
            ]
        )
    columns = ["DxV", "N", "limit us", "shipped", "best", GEMM_PATH, "config", "splits"]
    lines = [table(columns, rows), "", f"Best {FUSED} configuration over the shapes, for each N (x its best there):"]
    lines += [f"  N {rows}: {config}  ({times:.3f})" for rows, config, times in suggest(cells)]
    return "\n".join(lines)


def suggest(cells: Sequence[Mapping[str, Any]]) -> list[tuple[int, str, float]]:
    """For each number of rows the configuration whose worst loss against each cell's best is the least."""
    found = []
    for num_rows in sorted({cell["num_rows"] for cell in cells if "best" in cell}):
        here = [cell for cell in cells if cell["num_rows"] == num_rows and "best" in cell]
        losses: dict[str, list[float]] = {}
        for cell in here:
            times: dict[str, float] = {}
            for tried in cell["tried"]:
                times[tried["config"]] = min(tried["us"], times.get(tried["config"], float("inf")))
            for config, us in times.items():
                losses.setdefault(config, []).append(us / cell["best"]["us"])
        everywhere = {config: max(values) for config, values in losses.items() if len(values) == len(here)}
        config = min(everywhere, key=lambda one: everywhere[one])
        found.append((num_rows, config, everywhere[config]))
    return found


def merge_paths(path: Path, device_name: str, cells: Sequence[Mapping[str, Any]]) -> None:
    """Put these cells' times of both paths into the table; other devices and cells stay as they are."""
    measured: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        measured = json.loads(path.read_text(encoding="utf-8"))
    keys = ("dtype", "num_rows", "vocab_size", "hidden_size")
    by_cell = {tuple(cell[key] for key in keys): cell for cell in measured.get(device_name, [])}
    for cell in cells:
        times = path_times(cell)
        if times is not None:
            kept = {key: cell[key] for key in keys}
            by_cell[tuple(kept.values())] = {**kept, "fused_us": times[0], "gemm_us": times[1]}
    measured[device_name] = [by_cell[key] for key in sorted(by_cell)]
    write_json(path, measured)


def path_times(cell: Mapping[str, Any]) -> tuple[float, float] | None:
    """Microseconds of the fused and the GEMM path; None where one of them was not measured."""
    if "best" in cell:
        return round(cell["best"]["us"], 2), round(cell["gemm_path_us"], 2)
    paths = [cell.get("contenders", {}).get(name, {}).get("us") for name in (FUSED, GEMM_PATH)]
    return None if None in paths else (round(paths[0], 2), round(paths[1], 2))


def shape_of(cell: Mapping[str, Any]) -> str:
    return f"{cell['hidden_size']}x{cell['vocab_size']}"
