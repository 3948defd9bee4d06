"""What keeping scores costs a run: ``python bench/cache_overhead.py DATA.jsonl --queries 10``.

The same rows are scored with a new cache and without any, by turns, in this process; each round gives the ratio of the
process's own seconds (which other work on the machine disturbs less than those of the clock) and of those of the
clock. Reading the model's files to know them again happens once for each model, and is given apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median

from environment import environment, one_line, write_json
from rounds import table

from fastscore import Scorer
from fastscore.cache_file import CacheAt
from fastscore.config import DEFAULT_MODEL, TaskConfig
from fastscore.fingerprint import content_identity
from fastscore.rows import read_rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--task", default="qa")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    where = environment()
    print(one_line(where))
    scorer = Scorer(options.model, deterministic=options.deterministic)
    rows = list(islice(read_rows(options.data), options.queries))
    scorer.identity()
    started = time.perf_counter()
    content_identity(scorer.model_path)
    hashing = time.perf_counter() - started

    def run(cache: Path | None) -> tuple[float, float]:
        held = scorer.cache_at(None if cache is None else CacheAt(cache))
        clock, own = time.perf_counter(), time.process_time()
        pairs = sum(len(row.scores) for row in scorer.stream_rows(rows, TaskConfig(options.task), cache=held))
        seconds = time.perf_counter() - clock, time.process_time() - own
        held.close()
        assert pairs
        return seconds

    with tempfile.TemporaryDirectory() as folder:
        run(None)
        rounds = []
        for number in range(options.rounds):
            order = [Path(folder, f"{number}"), None]
            both = {place: run(place) for place in (order if number % 2 else order[::-1])}
            assert scorer.stats.cached == 0, "each cache was new"
            rounds.append((both[order[0]], both[None]))
        again = run(Path(folder, "0"))
    ratios = [[cached[kind] / plain[kind] for cached, plain in rounds] for kind in (1, 0)]
    names = ("the process's own seconds", "seconds of the clock")
    lines = [
        [name, f"{median(values):.3f}", ", ".join(f"{value:.3f}" for value in values)]
        for name, values in zip(names, ratios, strict=True)
    ]
    print(table(["with a cache / without", "median", "rounds"], lines))
    without = median(plain[0] for _, plain in rounds)
    print(f"without: {without:.1f} s; all from the cache: {again[0]:.2f} s; reading the model's files: {hashing:.2f} s")
    if options.json is not None:
        found = {"ratios": dict(zip(names, ratios, strict=True)), "without": without, "again": again[0]}
        write_json(options.json, {"environment": where, "options": str(options), **found, "hashing": hashing})


if __name__ == "__main__":
    main()
