"""Eight times the rows: eight times the work, and no more memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

ROWS = 200
TOKENS_EACH = 200
SCRIPT = """
import json, random, resource, sys, time, tracemalloc
import torch
from fastscore import Scorer, row_stream as room, windows
from fastscore.config import TaskConfig
from fastscore.types import Row

model, beside, count, tokens = sys.argv[1], sys.argv[2] == "beside", int(sys.argv[3]), int(sys.argv[4])
if beside:
    room.runs_beside_host = lambda device: True
torch.set_num_threads(1)  # threads that wait for one another count as busy
scorer = Scorer(model, dtype="fp32", device="cpu", window_tokens=8_000, max_batch_tokens=1000)
config = TaskConfig("lrlm")
windows.TOKENISED_PAIRS = 20  # less than a window, as it is outside of tests


def rows(count):
    draw = random.Random(count)
    for line in range(count):
        ids = [[draw.randrange(3, 500) for _ in range(tokens - 20)]]
        yield Row({"score_inputs": ids, "context_inputs": [5], "query_inputs": [6] * 15, "answer_inputs": [7] * 4})


def measure(count):
    tracemalloc.reset_peak()
    before, started = scorer.stats.tokens_computed, time.process_time()
    rows_out = sum(1 for _ in scorer.stream_rows(rows(count), config))
    seconds = time.process_time() - started
    objects, process = tracemalloc.get_traced_memory()[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tokens_out = scorer.stats.tokens_computed - before
    return {"rows": rows_out, "tokens": tokens_out, "seconds": seconds, "objects": objects, "process": process}


measure(count)  # buffers that are kept
tracemalloc.start()
measure(count)
print(json.dumps([measure(count), measure(8 * count)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in-turn", "beside"])
def test_cost_grows_with_the_rows_and_memory_does_not(how: str, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    folder = make_tiny_model(tmp_path / "llama")
    command = [sys.executable, "-c", SCRIPT, str(folder), how, str(ROWS), str(TOKENS_EACH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    once, eight_times = json.loads(done.stdout)
    assert (once["rows"], eight_times["rows"]) == (ROWS, 8 * ROWS)
    assert eight_times["tokens"] == pytest.approx(8 * once["tokens"], rel=0.01)
    # Python's and NumPy's memory to the byte; that of the process has room for nothing like the hidden states.
    assert eight_times["objects"] < 1.5 * once["objects"]
    assert eight_times["process"] - once["process"] < 4 * 64 * eight_times["tokens"] / 3
    assert eight_times["seconds"] / 8 < 1.5 * once["seconds"]
