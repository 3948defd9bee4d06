"""Does cost grow linearly, and memory not at all? ``python bench/linear.py --json OUT``.

Files of 1k, 4k and 16k pairs, each scored by the program ``fastscore score`` in a process of its own: seconds per pair
from file to file, and peak resident memory. A file is some copies of the first queries of ``nq_qa.jsonl``; every copy's
passages begin with a number of their own, so that copies share nothing and each pair costs the same in all files. What
the program takes for one pair is its start, and is taken off before seconds per pair are compared.

``--layers 2`` takes the model's first layers alone. That is a harder test, and takes minutes where the whole model on a
CPU would take an hour: whatever else the program does is a larger part of what it takes. ``--window-tokens`` goes to
the program: up to its window, memory does grow, and the usual one holds 16k pairs whole. With a window that holds less
than the smallest file, all files pay alike for the prefixes that occur in two windows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from environment import environment, one_line, write_json
from processes import Ended, run_python
from rounds import table
from workload import EXAMPLE, NQ_QA

from fastscore.config import DEFAULT_MODEL
from fastscore.model_source import resolve_model

COPIES = (1, 4, 16)
QUERIES = 64
"""Of 16 pairs each: 1,024, 4,096 and 16,384 pairs."""


def write_copies(path: Path, rows: Sequence[Mapping[str, Any]], copies: int) -> int:
    """Write so many copies that share no prefix, and say how many pairs they have."""
    pairs = 0
    with path.open("w", encoding="utf-8") as out:
        for copy in range(copies):
            for row in rows:
                marked = {name: [f"[{copy:02}] {passage}" for passage in row[name]] for name in ("pos", "neg")}
                pairs += len(marked["pos"]) + len(marked["neg"])
                out.write(json.dumps({**row, **marked}) + "\n")
    return pairs


def cut_short(model: str, layers: int, folder: Path) -> str:
    """A model of the first layers alone, with everything around them: its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    found = resolve_model(model)
    source = found.name_or_path
    most = AutoConfig.from_pretrained(source).num_hidden_layers
    if found.gguf_file or not 0 < layers <= most:
        raise SystemExit(f"--layers is for models that are no GGUF files, and from 1 to {most} with this one")
    AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=layers).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def measure(
    model: str, num_queries: int, copies: Sequence[int], rounds: int, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Seconds and bytes of every file, the smallest first; files take turns. ``options`` are the program's."""
    source = NQ_QA if NQ_QA.is_file() else EXAMPLE
    with source.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, num_queries)]
    one = {**rows[0], "pos": rows[0]["pos"][:1], "neg": []}
    _score([one], 1, model, options)  # warms the disk
    start: list[float] = []
    runs_of: dict[int, list[tuple[Ended, int, dict[str, Any]]]] = {count: [] for count in copies}
    for number in range(rounds):
        # There and back, so that a machine that becomes slower or faster does so for all of them.
        for count in copies if number % 2 == 0 else reversed(copies):
            start.append(_score([one], 1, model, options)[0].seconds)
            runs_of[count].append(_score(rows, count, model, options))
    files = []
    for runs in runs_of.values():
        pairs, stats = runs[0][1], runs[0][2]
        seconds = [ended.seconds for ended, *_ in runs]
        files.append(
            {
                "pairs": pairs,
                "tokens_computed": stats["tokens_computed"],
                "seconds": seconds,
                "median_seconds": statistics.median(seconds),
                "seconds_per_pair": (statistics.median(seconds) - statistics.median(start)) / pairs,
                "peak_bytes": max(ended.peak_bytes for ended, *_ in runs),
            }
        )
    first = files[0]
    for file in files:
        file["seconds_per_pair_times_first"] = file["seconds_per_pair"] / first["seconds_per_pair"]
        file["peak_bytes_times_first"] = file["peak_bytes"] / first["peak_bytes"]
    return {"source": source.name, "queries_per_copy": len(rows), "start_seconds": start, "files": files}


def show(report: Mapping[str, Any]) -> str:
    """A line for each file."""
    rows = [
        [
            f"{file['pairs']:,}",
            f"{file['tokens_computed']:,}",
            f"{file['median_seconds']:.1f}",
            f"{file['seconds_per_pair'] * 1e3:.2f}",
            f"{file['seconds_per_pair_times_first'] - 1:+.1%}",
            f"{file['peak_bytes'] / 2**20:,.0f}",
            f"{file['peak_bytes_times_first'] - 1:+.1%}",
        ]
        for file in report["files"]
    ]
    columns = ["pairs", "tokens computed", "seconds", "ms per pair", "to first", "peak MiB", "to first"]
    return f"{table(columns, rows)}\nstart {statistics.median(report['start_seconds']):.2f} s, taken off ms per pair"


def _score(
    rows: Sequence[Mapping[str, Any]], copies: int, model: str, options: Sequence[str]
) -> tuple[Ended, int, dict[str, Any]]:
    """One run of the program in a folder of its own, the pairs it scored, and its statistics."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder, "rows.jsonl"), Path(folder, "scored.jsonl")
        pairs = write_copies(path, rows, copies)
        usual = ["--task", "qa", "--model", model, "--quiet", "-o", str(out)]
        ended = run_python("-m", "fastscore", "score", str(path), *usual, *options)
        stats = json.loads(out.with_name(f"{out.name}.meta.json").read_text(encoding="utf-8"))["stats"]
        scores = sum(len(json.loads(line)["teacher_scores"]) for line in out.open(encoding="utf-8"))
        if not scores == stats["pairs"] == pairs:
            raise RuntimeError(f"{scores} scores of {pairs} pairs came back")
    return ended, pairs, stats


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--layers", type=int, help="of the model, the first ones (default: all)")
    parser.add_argument("--queries", type=int, default=QUERIES, help="in each copy")
    parser.add_argument("--copies", type=int, nargs="+", default=COPIES, help="one file for each number")
    parser.add_argument("--window-tokens", type=int, help="of the program's windows (default: the program's own)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    program = ["--dtype", options.dtype]
    if options.window_tokens is not None:
        program += ["--window-tokens", str(options.window_tokens)]

    where = environment()
    print(one_line(where), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model if options.layers is None else cut_short(options.model, options.layers, Path(folder))
        report = measure(model, options.queries, sorted(options.copies), options.rounds, program)
    print(show(report))
    if options.json is not None:
        setting = {"model": options.model, "layers": options.layers, "dtype": options.dtype}
        setting |= {"window_tokens": options.window_tokens, "rounds": options.rounds}
        write_json(options.json, {"environment": where, **setting, **report})
    return 0


if __name__ == "__main__":
    sys.exit(main())
