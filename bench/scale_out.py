"""Several processes against one: ``python bench/scale_out.py DATA.jsonl --queries 8 --json OUT``.

The same rows are scored by ``fastscore score`` alone, under torchrun and with ``--engine ray``, with one and two
workers each, one thread in every process, no cache, from the program's start to its end. Each runs with some rows and
with twice as many; what the second half took is the time without starting anything. Ratios are to the plain run.
Scores are compared first: with ``--deterministic`` bit by bit, otherwise within 1e-3.

How fast one process reads rows, deals and takes back their blocks and writes them, without scoring, is measured too:
it feeds all workers. ``--estimate OUT --pairs 100000000 --workers 64`` says what a stored result would mean for such a
run, by the formula of docs/scale-out.md; that is no measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from environment import environment, one_line, write_json
from processes import run_python
from rounds import table

from fastscore.blocks import cut_blocks
from fastscore.config import DEFAULT_MODEL, DEFAULT_WINDOW_TOKENS, TaskConfig
from fastscore.rows import RowWriter, read_rows
from fastscore.tasks import output_row, validate_row

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
CONTENDERS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    # name: workers, before "-m fastscore", after its arguments
    "plain": (1, (), ()),
    "torchrun 1": (1, (*TORCHRUN, "1"), ()),
    "torchrun 2": (2, (*TORCHRUN, "2"), ()),
    "ray 1": (1, (), ("--engine", "ray", "--num-workers", "1")),
    "ray 2": (2, (), ("--engine", "ray", "--num-workers", "2")),
}
TOLERANCE = 1e-3
FEED_ROWS = 2000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--task", default="qa")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument(
        "--queries", type=int, default=8, help="rows of the smaller run; the larger one has twice as many"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--estimate", type=Path, help="a stored result; nothing is measured")
    parser.add_argument("--pairs", type=float, default=1e8)
    parser.add_argument("--workers", type=int, default=64)
    options = parser.parse_args(arguments)
    if options.estimate is not None:
        print(estimate(json.loads(options.estimate.read_text()), options.pairs, options.workers))
        return
    if options.data is None:
        parser.error("DATA is needed")

    os.environ["OMP_NUM_THREADS"] = "1"
    where = {**environment(), "threads": 1}
    print(one_line(where))
    lines = list(islice(_lines(options.data), 2 * options.queries))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, count in (("some", len(lines) // 2), ("twice", len(lines))):
            (folder / f"{size}.jsonl").write_text("".join(lines[:count]), "utf-8")
        names = ["plain", *(name for name in options.contenders if name != "plain")]
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for contender in names:
                rounds[contender].append(measure(contender, folder, options))
        fed = feed(folder, lines, options.task)
    found = {name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in rounds.items()}
    plain = found["plain"]
    rows = []
    for name, run in found.items():
        run["speed-up"] = plain["seconds per pair"] / run["seconds per pair"]
        run["efficiency"] = run["speed-up"] / CONTENDERS[name][0]
        rows.append(
            [
                name,
                f"{run['seconds']:.1f}",
                f"{plain['seconds'] / run['seconds']:.2f}",
                f"{1 / run['seconds per pair']:.1f}",
                f"{run['speed-up']:.2f}",
                f"{run['start']:.1f}",
                f"{run['tokens computed']:,.0f}",
            ]
        )
    columns = ["", "seconds", "ratio", "pairs/s without start", "ratio", "start, s", "tokens computed"]
    print(table(columns, rows))
    print(f"one process feeds workers with {fed:,.0f} pairs/s")
    if options.json is not None:
        told = {name: str(value) for name, value in vars(options).items()}
        write_json(options.json, {"environment": where, "options": told, "results": found, "fed pairs/s": fed})


def measure(contender: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Both runs of a contender; what they wrote is compared with what the plain one did."""
    _, before, after = CONTENDERS[contender]
    seconds, pairs, tokens = [], [], []
    for size in ("some", "twice"):
        output = folder / f"{size}.{contender.replace(' ', '-')}.jsonl"
        given = ["score", str(folder / f"{size}.jsonl"), "-o", str(output), "--task", options.task, "-q", "--no-cache"]
        given += ["--model", options.model, "--dtype", options.dtype, *after]
        given += ["--deterministic"] if options.deterministic else []
        seconds.append(run_python(*before, "-m", "fastscore", *given).seconds)
        stats = json.loads(output.with_name(f"{output.name}.meta.json").read_text())["stats"]
        pairs.append(stats["pairs"])
        tokens.append(stats["tokens_computed"])
        _check(folder / f"{size}.plain.jsonl", output, 0.0 if options.deterministic else TOLERANCE)
    per_pair = (seconds[1] - seconds[0]) / (pairs[1] - pairs[0])
    start = seconds[1] - per_pair * pairs[1]
    return {"seconds": seconds[1], "seconds per pair": per_pair, "start": start, "tokens computed": tokens[1]}


def feed(folder: Path, lines: Sequence[str], task: str) -> float:
    """Pairs per second through one process that reads, deals, takes back and writes, and scores nothing."""
    many = folder / "many.jsonl"
    many.write_text("".join(lines[index % len(lines)] for index in range(FEED_ROWS)), "utf-8")
    config, pairs = TaskConfig(task), 0
    started = time.perf_counter()
    for row in read_rows(many):  # the first pass
        pairs += validate_row(row, config)
    with RowWriter(folder / "fed.jsonl") as out:
        for block in cut_blocks(read_rows(many), config, 8, DEFAULT_WINDOW_TOKENS):
            for row in pickle.loads(pickle.dumps(block, protocol=5)).rows:
                out.write(output_row(row, config, [-1.0] * validate_row(row, config)))
    return pairs / (time.perf_counter() - started)


def estimate(result: dict[str, Any], pairs: float, workers: int) -> str:
    """What a stored result would mean for that many pairs on that many workers like the one measured."""
    plain, fed = result["results"]["plain"], result["fed pairs/s"]
    kept = {name: run["efficiency"] for name, run in result["results"].items() if CONTENDERS[name][0] > 1}
    lines = [f"an estimate, not a measurement, for {pairs:,.0f} pairs on {workers} workers like the plain run:"]
    for name, efficiency in kept.items():
        scoring = pairs * plain["seconds per pair"] / (workers * min(1.0, efficiency))
        hours = (max(scoring, pairs / fed) + result["results"][name]["start"]) / 3600
        what = "scoring" if scoring >= pairs / fed else "feeding"
        lines.append(f"{name.split()[0]}: {hours:,.1f} hours, bound by {what} (efficiency of {name}: {efficiency:.2f})")
    return "\n".join(lines)


def _lines(path: Path) -> Any:
    with path.open(encoding="utf-8") as file:
        yield from file


def _check(expected: Path, found: Path, tolerance: float) -> None:
    one, two = (
        [json.loads(line)["teacher_scores"] for line in path.read_text("utf-8").splitlines()]
        for path in (expected, found)
    )
    for number, (mine, other) in enumerate(zip(one, two, strict=True), start=1):
        if any(abs(a - b) > tolerance for a, b in zip(mine, other, strict=True)):
            raise SystemExit(f"{found.name}:{number}: {other} is not {mine} of the plain run")


if __name__ == "__main__":
    main()
