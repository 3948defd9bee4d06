"""How long until the first score, and until ``fastscore --help``? ``python bench/startup.py --json OUT``.

Each in new processes, by turns, by the wall clock: a Python that does nothing, the help, a program that imports
fastscore, loads the model from the cache and scores one pair (from its start to that score), the same with a model that
was never loaded before, so that nothing is noted of it, and ``fastscore score`` of one row, to its end. The first turn,
which warms the disk and leaves notes of the model, is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import environment, one_line, write_json
from processes import run_python
from rounds import table

from fastscore.config import DEFAULT_MODEL
from fastscore.model_source import cache_folder

NOTHING, HELP, ONE_ROW = "python -c pass", "fastscore --help", "fastscore score, one row"
FIRST_SCORE, NEW_MODEL = "first score", "first score, new model"
ROW = {"query": "The capital of France?", "pos": ["Paris is its capital."], "answers": ["Paris"]}
AIMS = {HELP: 0.5, FIRST_SCORE: 5.0}
"""Seconds."""

PROGRAM = """
import json, os, sys, time
if len(sys.argv) > 3:
    os.environ["FASTSCORE_CACHE"] = sys.argv[3]
begun = time.perf_counter()
from fastscore import Scorer
imported = time.perf_counter()
scorer = Scorer(sys.argv[1], dtype=sys.argv[2])
scorer.load()
loaded = time.perf_counter()
[score] = scorer.score([("The capital of France is", " Paris")])
scored = time.perf_counter()
parts = {"import": imported - begun, "load": loaded - imported, "score": scored - loaded}
print(json.dumps({**parts, "nats": score.logprob, "at": time.time()}))
"""


def measure(model: str, dtype: str, rounds: int) -> dict[str, Any]:
    """Seconds of each round, and the parts of the first score as the program itself sees them."""
    seconds: dict[str, list[float]] = {NOTHING: [], HELP: [], FIRST_SCORE: [], NEW_MODEL: [], ONE_ROW: []}
    parts: list[dict[str, float]] = []
    for turn in range(rounds + 1):
        nothing = run_python("-c", "pass")
        shown = run_python("-m", "fastscore", "--help")
        scored = run_python("-c", PROGRAM, model, dtype)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "models").symlink_to(cache_folder() / "models")  # converted, and no notes beside them
            new = run_python("-c", PROGRAM, model, dtype, folder)
            row = Path(folder) / "row.jsonl"
            row.write_text(json.dumps(ROW), "utf-8")
            options = ["--task", "qa", "--model", model, "--dtype", dtype, "-q", "-o", f"{folder}/scored.jsonl"]
            one_row = run_python("-m", "fastscore", "score", str(row), *options)
        if not any("score" in line for line in shown.lines):
            raise RuntimeError("fastscore --help did not name its commands")
        told, told_new = (json.loads(ended.lines[-1]) for ended in (scored, new))
        if not told["nats"] == told_new["nats"] < 0:
            raise RuntimeError("the first score is no log-probability, or another one of a new model")
        del told["nats"]
        first, first_new = told.pop("at") - scored.began, told_new["at"] - new.began
        if turn:
            for name, ended in ((NOTHING, nothing), (HELP, shown), (ONE_ROW, one_row)):
                seconds[name].append(ended.seconds)
            seconds[FIRST_SCORE].append(first)
            seconds[NEW_MODEL].append(first_new)
            parts.append(told)
    return {
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "first_score_parts": {name: statistics.median(each[name] for each in parts) for name in parts[0]},
        "aims": AIMS,
    }


def show(report: Mapping[str, Any]) -> str:
    rows = [
        [name, f"{seconds:.2f}", f"{report['aims'][name]:.1f}" if name in report["aims"] else ""]
        for name, seconds in report["median_seconds"].items()
    ]
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report["first_score_parts"].items())
    return f"{table(['', 'median s', 'aim s'], rows)}\nof the first score: {parts}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    where = environment()
    print(one_line(where), flush=True)
    report = measure(options.model, options.dtype, options.rounds)
    print(show(report))
    if options.json is not None:
        write_json(options.json, {"environment": where, "model": options.model, "rounds": options.rounds, **report})
    return 0


if __name__ == "__main__":
    sys.exit(main())
