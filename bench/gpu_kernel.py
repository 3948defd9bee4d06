"""The answer-NLL kernel against its peers and its limits on one GPU, in under ten minutes.

    python bench/gpu_kernel.py --json OUT.json --wheels FOLDER      compare; FOLDER holds wheels of peers
    python bench/gpu_kernel.py --json OUT.json --tune               time the block sizes of bench/candidates.py

Runs from a checkout: nothing has to be installed but torch, triton and transformers. Every cell, N rows against an LM
head [V, D] of random weights, is first checked against fp64 and then timed by turns. The limit of a cell is the larger
of two times measured beside it: the library's GEMM of that shape, and its bytes at the rate of a large copy. Results
are written after every cell; ``--resume`` goes on with an unfinished file. ``--tiny`` runs it all on a CPU in seconds,
with toy shapes and the kernel interpreted.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkout import use_checkout, use_wheels

if "--tiny" in sys.argv:
    # Before anything imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")
use_checkout()

import torch  # noqa: E402
from device_timer import timer_for  # noqa: E402
from kernel_cells import Cell, make_weights, parse_shapes  # noqa: E402
from kernel_compile import compile_ahead, shipped_jobs  # noqa: E402
from kernel_measure import measure_cell, measure_device  # noqa: E402
from kernel_peers import OURS, PEERS, find_contenders  # noqa: E402

SHAPES = ("4096x128256", "576x49152", "4096x151936", "3584x256000", "2048x49152")
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)
QUICK_SHAPES, QUICK_ROWS = SHAPES[:2], (1, 64, 4096)
TINY_SHAPES, TINY_ROWS = ("48x301", "32x256"), (1, 5, 40)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROOT = Path(__file__).resolve().parent.parent
TUNE_JSON = ROOT / "bench" / "results" / "kernel_tune.json"
PATHS_JSON = ROOT / "kernels" / "measured_paths.json"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help=f"where results go; with --tune {TUNE_JSON.relative_to(ROOT)}")
    parser.add_argument("--tune", action="store_true", help="time candidates of block sizes instead of the peers")
    parser.add_argument(
        "--paths",
        type=Path,
        help=f"write which path was faster in each cell here; with --tune {PATHS_JSON.relative_to(ROOT)}",
    )
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, installed for this run only")
    parser.add_argument("--quick", action="store_true", help="a few cells and rounds")
    parser.add_argument("--tiny", action="store_true", help="toy shapes on a CPU, the kernel interpreted")
    parser.add_argument("--shapes", nargs="+", metavar="DxV", help=f"default {' '.join(SHAPES)}")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help=f"default {' '.join(map(str, ROWS))}")
    parser.add_argument("--contenders", nargs="+", choices=OURS + PEERS, default=OURS + PEERS)
    parser.add_argument("--rounds", type=int, help="at most (25, or 3 with --quick or --tiny)")
    parser.add_argument("--limit-seconds", type=float, default=540)
    parser.add_argument("--resume", action="store_true", help="keep the cells that the file has")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES)
    options = parser.parse_args(arguments)
    tiny = options.tiny
    options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() and not tiny else "cpu"))
    options.dtype = options.dtype or ("bf16" if options.device.type == "cuda" else "fp32")
    options.rounds = options.rounds or (3 if tiny or options.quick else 25)
    shapes = TINY_SHAPES if tiny else QUICK_SHAPES if options.quick else SHAPES
    options.shapes = parse_shapes(options.shapes or shapes)
    options.rows = options.rows or (TINY_ROWS if tiny else QUICK_ROWS if options.quick else ROWS)
    if options.tune:
        options.json = options.json or TUNE_JSON
        options.paths = options.paths or PATHS_JSON
    elif options.json is None:
        parser.error("--json is needed")
    options.deadline = time.monotonic() + options.limit_seconds
    return options


def measure(options: argparse.Namespace, device_limits: dict[str, Any], done: set[Cell]) -> Iterator[dict[str, Any]]:
    """Cell after cell: its report, or why there is none."""
    timer = timer_for(options.device)
    contenders, absent = find_contenders(options.device, tuple(options.contenders))
    print("absent:", "; ".join(f"{name} ({why})" for name, why in absent.items()) or "nobody", flush=True)
    dtype = DTYPES[options.dtype]
    tuner = None
    if options.tune:
        from kernel_tune import Tuner

        tuner = Tuner(options.shapes, options.rows, dtype, options.device)
    elif options.device.type == "cuda":
        for job, error in compile_ahead(shipped_jobs(options.shapes, options.rows, dtype, options.device)).items():
            print(f"does not compile: {job}: {error}", flush=True)
    longest = 0.0
    for hidden_size, vocab_size in options.shapes:
        cells = [Cell(rows, hidden_size, vocab_size) for rows in options.rows]
        weights: list[torch.Tensor] = []
        for cell in cells:
            if cell in done:
                continue
            if time.monotonic() + longest > options.deadline:
                yield {**_names(cell, options), "skipped": "no time left"}
                continue
            started = time.monotonic()
            weights = weights or make_weights(cell, dtype, options.device, timer.cache_bytes)
            try:
                if tuner is not None:
                    report = tuner.tune_cell(cell, weights, timer, device_limits, options.rounds)
                else:
                    report = measure_cell(cell, weights, timer, contenders, device_limits, options.rounds)
            except RuntimeError as error:
                report = {"failed": f"{type(error).__name__}: {error}"[:500]}
            seconds = time.monotonic() - started
            longest = max(longest, seconds)
            print(f"{cell}: {seconds:.1f} s {report.get('failed') or report.get('errors') or ''}", flush=True)
            yield {**_names(cell, options), **report}
            if not timer.alive():
                _start_anew(options)
        del weights


def _names(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_rows": cell.num_rows,
        "hidden_size": cell.hidden_size,
        "vocab_size": cell.vocab_size,
        "dtype": str(DTYPES[options.dtype]).removeprefix("torch."),
    }


def _start_anew(options: argparse.Namespace) -> None:
    """After an error that this process cannot recover from (an illegal address, say): the cells left, in a new one."""
    left = options.deadline - time.monotonic()
    print("The device has failed in this process; going on in a new one", flush=True)
    arguments = [*sys.argv, "--resume", "--limit-seconds", str(max(left, 0.0))]
    os.execv(sys.executable, [sys.executable, *arguments])


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every contender of ours agrees with the truth in every cell that was measured."""
    options = parse(arguments)
    if options.wheels is not None:
        use_wheels(options.wheels)
    # After the wheels: the environment's record may need one of them.
    import json

    from environment import environment, one_line, write_json
    from kernel_report import merge_paths, show_comparison, show_tuning

    if options.device.type == "cuda":
        faulthandler.dump_traceback_later(options.limit_seconds + 45, exit=True)
    where = environment()
    setting = {"device": str(options.device), "tiny": options.tiny, "dtype": options.dtype, "rounds": options.rounds}
    before: dict[str, Any] = {"cells": []}
    if options.resume and options.json.exists():
        before = json.loads(options.json.read_text(encoding="utf-8"))
    device_limits = before.get("device_limits") or measure_device(timer_for(options.device), options.device)
    cells: list[dict[str, Any]] = [cell for cell in before["cells"] if "skipped" not in cell]
    done = {Cell(cell["num_rows"], cell["hidden_size"], cell["vocab_size"]) for cell in cells}
    result = {"environment": where, "setting": setting, "device_limits": device_limits, "cells": cells}
    print(f"{one_line(where)}\ncopy {device_limits['copy_bytes_per_s'] / 1e12:.3g} TB/s", flush=True)
    for report in measure(options, device_limits, done):
        cells.append(report)
        write_json(options.json, result)
    if options.paths is not None:
        merge_paths(options.paths, device_limits["name"], cells)
    print(f"\n{one_line(where)}\n{show_tuning(cells) if options.tune else show_comparison(cells, device_limits)}")
    wrong = [cell for cell in cells if "failed" in cell or cell.get("agrees") is False]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
