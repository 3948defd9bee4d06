"""Several processes against one: ``python bench/scale_out.py DATA.jsonl --queries 64 --json OUT``.

The same rows are scored by ``fastscore score`` alone, under torchrun and with ``--engine ray``, with one and two
workers each, one thread in every process, no cache, by turns. Scores are compared first: with ``--deterministic`` bit
by bit, otherwise within 1e-3.

What an engine costs beyond the plain run is taken from inside its run, where the machine's changes of speed cancel:
tokens that two workers both compute, and the part of the workers' time that is not spent in the model (waiting for
rows, for each other at the end, sending, and on CPUs tokenising, which a plain run does too and is not taken off). The
speed of a worker beside a plain run's in the same round is told with its range; two workers share a machine's memory.
Starting is measured by runs of one row.

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
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from environment import environment, one_line, write_json
from processes import run_python
from rounds import table

from fastscore.block_scores import BlockScores, without_texts
from fastscore.blocks import Block, cut_windows
from fastscore.config import DEFAULT_MODEL, DEFAULT_WINDOW_TOKENS, TaskConfig
from fastscore.dealt import Dealt, hand_on
from fastscore.rows import RowWriter, read_rows
from fastscore.tasks import expand_row, output_row, validate_row
from fastscore.types import AnswerScore

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
FEED_ROWS, FED_WORKERS = 2000, 8


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--task", default="qa")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--queries", type=int, default=64, help="rows of a run")
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
    lines = list(islice(_lines(options.data), options.queries))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "one.jsonl").write_text(lines[0], "utf-8")
        (folder / "all.jsonl").write_text("".join(lines), "utf-8")
        names = ["plain", *(name for name in options.contenders if name != "plain")]
        rounds: list[dict[str, dict[str, float | None]]] = []
        for _ in range(options.rounds):
            rounds.append({name: measure(name, folder, options) for name in names})
            print(show(summary(rounds)), flush=True)
        fed = feed(folder, lines, options.task)
    print(f"one process feeds workers with {fed:,.0f} pairs/s")
    if options.json is not None:
        kept = ("task", "model", "dtype", "queries", "rounds", "deterministic")
        told = {"data": options.data.name, **{name: str(getattr(options, name)) for name in kept}}
        found = {"results": summary(rounds), "rounds": rounds, "fed pairs/s": fed}
        write_json(options.json, {"environment": where, "options": told, **found})


def measure(contender: str, folder: Path, options: argparse.Namespace) -> dict[str, float | None]:
    """A run of one row and one of all; what they wrote is compared with what the plain one did."""
    workers, before, after = CONTENDERS[contender]
    for size in ("one", "all"):
        output = folder / f"{size}.{contender.replace(' ', '-')}.jsonl"
        given = ["score", str(folder / f"{size}.jsonl"), "-o", str(output), "--task", options.task, "-q", "--no-cache"]
        given += ["--model", options.model, "--dtype", options.dtype, *after]
        given += ["--deterministic"] if options.deterministic else []
        seconds = run_python(*before, "-m", "fastscore", *given).seconds
        if size == "one":
            start = seconds
        _check(folder / f"{size}.plain.jsonl", output, 0.0 if options.deterministic else TOLERANCE)
    meta = json.loads(output.with_name(f"{output.name}.meta.json").read_text())
    stats, scorer = meta["stats"], meta["scorer"]
    if "engine" not in scorer:  # one process, which torchrun's only one is as well
        in_model, busy = stats["seconds"], None
    else:
        in_model, busy = sum(scorer["seconds_by_worker"].values()), scorer["busy"]
        if len(scorer["seconds_by_worker"]) != workers:
            raise SystemExit(f"{contender}: {len(scorer['seconds_by_worker'])} workers scored; are the rows too few?")
    return {
        "seconds": seconds,
        "start": start,
        "pairs": stats["pairs"],
        "tokens": stats["tokens_computed"],
        "in model": in_model,
        "busy": busy,
    }


def summary(rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each contender its medians, and the ratios to the plain run of the same round.

    overhead: what a worker's time comes to beyond computing the plain run's tokens at its own speed.
    worker: tokens/s of a worker in the model, as a multiple of the plain run's.
    speed-up: both together, for all workers.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        runs, plain = [each[name] for each in rounds], [each["plain"] for each in rounds]
        worker = [
            (run["tokens"] / run["in model"]) / (alone["tokens"] / alone["in model"])
            for run, alone in zip(runs, plain, strict=True)
        ]
        is_one = runs[0]["busy"] is None
        kept = [(run["busy"] or 1.0) * alone["tokens"] / run["tokens"] for run, alone in zip(runs, plain, strict=True)]
        found[name] = {key: None if is_one and key == "busy" else median(run[key] for run in runs) for key in runs[0]}
        found[name] |= {
            "kept": median(kept),
            "overhead": None if is_one else 1 / median(kept) - 1,
            "worker": median(worker),
            "worker by round": worker,
            "speed-up": median(CONTENDERS[name][0] * a * b for a, b in zip(kept, worker, strict=True)),
        }
    return found


def show(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each contender."""
    rows = [
        [
            name,
            f"{run['seconds']:.1f}",
            f"{run['start']:.1f}",
            f"{run['tokens']:,.0f}",
            *("" if run[key] is None else f"{run[key]:.1%}" for key in ("busy", "overhead")),
            f"{run['worker']:.2f} ({min(run['worker by round']):.2f}-{max(run['worker by round']):.2f})",
            f"{run['speed-up']:.2f}",
        ]
        for name, run in results.items()
    ]
    return table(["", "seconds", "start, s", "tokens", "in model", "overhead", "speed of a worker", "speed-up"], rows)


def feed(folder: Path, lines: Sequence[str], task: str) -> float:
    """Pairs per second through one process that reads, deals, takes back and writes, and scores nothing."""
    many = folder / "many.jsonl"
    many.write_text("".join(lines[index % len(lines)] for index in range(FEED_ROWS)), "utf-8")
    config, pairs, written = TaskConfig(task), 0, 0
    started = time.perf_counter()
    for row in read_rows(many):  # the first pass
        pairs += validate_row(row, config)
    dealt = Dealt(cut_windows(read_rows(many), config, FED_WORKERS, DEFAULT_WINDOW_TOKENS))
    scoring = 0.0
    with RowWriter(folder / "fed.jsonl") as out:
        while not dealt.is_done:
            if (block := dealt.claim()) is not None:
                sent = pickle.dumps(block, protocol=5)
                began = time.perf_counter()
                found = pickle.dumps(_unscored(pickle.loads(sent), config), protocol=5)
                scoring += time.perf_counter() - began  # what a worker would do
                dealt.finish(pickle.loads(found))
            while dealt.next_result() is not None:
                pass
            for scored in hand_on(iter(dealt.next_row, None), config, None, threading.Lock()):
                out.write(output_row(scored.row, config, scored.teacher_scores))
                written += 1
    if written != FEED_ROWS:
        raise SystemExit(f"{written} of {FEED_ROWS} rows came back")
    return pairs / (time.perf_counter() - started - scoring)


def _unscored(block: Block, config: TaskConfig) -> BlockScores:
    """What would come of a block, without a model."""
    found, score = BlockScores(block.index, "0"), AnswerScore((-1.0,) * 4, False)
    for place, part in enumerate(block.rows):
        pairs = expand_row(part, config, list)
        found.scored.append((place, without_texts(pairs), (score,) * len(pairs.pairs)))
    return found


def estimate(result: Mapping[str, Any], pairs: float, workers: int) -> str:
    """What a stored result would mean for that many pairs on that many workers like the one measured."""
    plain, fed = result["results"]["plain"], result["fed pairs/s"]
    lines = [f"an estimate, not a measurement, for {pairs:,.0f} pairs on {workers} workers like the plain run:"]
    for name, run in result["results"].items():
        if CONTENDERS[name][0] == 1:
            continue
        kept = min(1.0, run["kept"])
        scoring = pairs * plain["in model"] / plain["pairs"] / (workers * kept)
        hours = (max(scoring, pairs / fed) + run["start"]) / 3600
        what = "scoring" if scoring >= pairs / fed else "feeding"
        lines.append(f"{name.split()[0]}: {hours:,.1f} hours, bound by {what} (efficiency of {name}: {kept:.3f})")
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
