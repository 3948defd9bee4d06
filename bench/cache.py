"""How fast scores are put into the cache and found again, on one core: ``python bench/cache.py --json OUT``.

Keys are random, as digests are. Inserts come in portions as they do from the LM head; look-ups in the order of the
inserts (a run that is started again), in random order (the same rows, shuffled), and for keys that are not there (new
rows). Each is given per second of the clock and of this process's own time: on a machine that is busy with other work
only the second says something. Keys of requests are made from token ids, and model files are hashed, apart.
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment, one_line, write_json
from rounds import table

from fastscore.cache import ScoreCache
from fastscore.cache_blocks import request_keys
from fastscore.fingerprint import ScoreIdentity, content_identity
from fastscore.ranges import offsets
from fastscore.types import ScoringRequest

LOOK_UPS, WINDOW, REQUEST_TOKENS = 200_000, 25_000, 150
HASHED_BYTES = 1 << 28
IDENTITY = ScoreIdentity(
    model="benchmark",
    weights="none",
    dtype="bfloat16",
    device="cpu",
    mode="packed",
    attention="sdpa",
    forward="model",
    answer_nll="reference (PyTorch)",
    torch="2.13",
    transformers="5.23.0",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--portion", type=int, default=500, help="scores in one insert")
    parser.add_argument("--folder", type=Path, help="where the file is made; the folder for temporary files otherwise")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    where = environment()
    print(one_line(where))
    print(f"SQLite {sqlite3.sqlite_version}; inserts of {options.portion} scores, look-ups of {WINDOW:,} at a time")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        cells = [measure(count, options.portion, Path(folder, f"{count}")) for count in options.entries]
        other = [*hash_requests(), hash_file(Path(folder, "weights"))]
    rows = [
        [f"{cell['entries']:,}: {name}", f"{rate['per_second']:,.0f}", f"{rate['per_cpu_second']:,.0f}"]
        for cell in cells
        for name, rate in cell["rates"].items()
    ]
    print(table(["scores in the file", "per second", "per CPU second"], rows))
    print(", ".join(f"{cell['entries']:,} scores: {cell['bytes_per_entry']:.0f} bytes each" for cell in cells))
    for line in other:
        print(f"{line['what']}: {line['per_cpu_second']:,.0f} {line['unit']} per CPU second")
    if options.json is not None:
        setting = {"sqlite": sqlite3.sqlite_version, "portion": options.portion, "window": WINDOW}
        write_json(options.json, {"environment": where, **setting, "cells": cells, "other": other})


def measure(count: int, portion: int, path: Path) -> dict[str, Any]:
    """Rates with that many scores, of 1 to 11 answer tokens each. That the right ones come back is looked at."""
    draw = np.random.default_rng(0)
    key_E2 = random_keys(draw, count)
    length_E = draw.integers(1, 12, count)
    bounds = offsets(length_E)
    logprob_A, is_greedy_E = -draw.random(int(bounds[-1]), dtype=np.float32), draw.random(count) < 0.3
    with ScoreCache(path, IDENTITY) as store:

        def insert() -> None:
            for first in range(0, count, portion):
                last = min(first + portion, count)
                part = slice(first, last)
                store.put(key_E2[part], logprob_A[bounds[first] : bounds[last]], length_E[part], is_greedy_E[part])

        def look_up(keys: Any) -> Callable[[], int]:
            windows = [keys[first : first + WINDOW] for first in range(0, len(keys), WINDOW)]
            return lambda: sum(score is not None for window in windows for score in store.get(window))

        asked = min(count, LOOK_UPS)
        rates = {"inserts": timed(insert, count)[0]}
        contenders = {
            "look-ups in order": (key_E2[:asked], asked),
            "look-ups in random order": (key_E2[draw.permutation(count)[:asked]], asked),
            "look-ups in vain": (random_keys(draw, asked), 0),
        }
        for name, (keys, expected) in contenders.items():
            rates[name], found = timed(look_up(keys), asked)
            assert found == expected, f"{name}: {found} of {expected} scores came back"
        last = store.get(key_E2[-1:])[0]
        assert last is not None
        assert np.array_equal(np.float32(last.token_logprobs), logprob_A[bounds[-2] :])
    return {"entries": count, "rates": rates, "bytes_per_entry": path.stat().st_size / count}


def random_keys(draw: np.random.Generator, count: int) -> Any:
    return draw.integers(-(2**63), 2**63 - 1, (count, 2), dtype=np.int64)


def timed(run: Callable[[], Any], count: int) -> tuple[dict[str, float], Any]:
    started, started_cpu = time.perf_counter(), time.process_time()
    result = run()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    return {"seconds": seconds, "per_second": count / seconds, "per_cpu_second": count / cpu_seconds}, result


def hash_requests() -> list[dict[str, Any]]:
    """Keys from token ids."""
    ids = np.random.default_rng(0).integers(0, 50_000, (20_000, REQUEST_TOKENS)).tolist()
    requests = [ScoringRequest(tuple(row), REQUEST_TOKENS - 5) for row in ids]
    rate, _ = timed(lambda: request_keys(IDENTITY.fingerprint(), requests), len(requests))
    return [{"what": f"keys of requests of {REQUEST_TOKENS} tokens", "unit": "keys", **rate}]


def hash_file(path: Path) -> dict[str, Any]:
    """A file of weights, read once before, so that it comes from memory."""
    path.write_bytes(np.random.default_rng(0).bytes(HASHED_BYTES))
    rate, _ = timed(lambda: content_identity(path), HASHED_BYTES // 1_000_000)
    return {"what": "fingerprint of weights", "unit": "MB", **rate}


if __name__ == "__main__":
    main()
