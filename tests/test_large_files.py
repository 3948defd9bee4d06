"""Large files: a bad last line ends the run before torch is imported, and memory does not grow with the rows."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

ROW = {"query": "where does it run", "answers": ["the town"], "pos": ["The old town."], "neg": ["42"], "task": "qa"}
NUM_ROWS = 100_000
WITHOUT_TORCH = """
import sys
from fastscore.cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"torch", "transformers", "numpy"} & sys.modules.keys()))
"""


def lines(number: int, start: int = 0) -> str:
    """Rows that are told apart by their ids and questions, so that nothing is shared between them but the template."""
    row = json.dumps(ROW).replace('"where', '"%d where').replace("{", '{"query_id": %d, ', 1)
    return "".join(row % (index, index) + "\n" for index in range(start, start + number))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_bad_last_row_of_many_is_refused_before_torch_is_imported(suffix: str, tmp_path: Path) -> None:
    text = lines(NUM_ROWS) + '{"task": "qa", "query": 7}\n'
    if suffix == ".json":
        text = "[\n" + text.rstrip("\n").replace("\n", ",\n") + "]"
    rows = tmp_path / f"rows{suffix}"
    rows.write_text(text)
    command = [sys.executable, "-c", WITHOUT_TORCH, "score", str(rows), "-m", "./no-such-model"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - started
    line = NUM_ROWS + (1 if suffix == ".jsonl" else 2)
    assert done.returncode == 2
    assert done.stderr == f"fastscore: {rows}:{line}: field 'query': expected a string, found 7\n"
    assert done.stdout == "[]\n", "imported before the rows were seen to be right"
    assert seconds < 30, "a few seconds on a machine with nothing else to do"
    assert [path.name for path in tmp_path.iterdir()] == [rows.name]


PEAK = """
import sys
from fastscore.cli import main
try:
    main(["score", sys.argv[1], "-m", sys.argv[2], "-q", "--dtype", "fp32", "--window-tokens", "20000"])
finally:
    # Not getrusage: that begins with the peak of the process which started this one.
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Five times the rows, each file many windows long; 25 MB of text are only carried along."""
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=1)
    peaks = []
    for number in (1_000, 5_000):
        rows = tmp_path / f"{number}.jsonl"
        rows.write_text(lines(number).replace('{"query_id"', '{"pad": "' + "x" * 5_000 + '", "query_id"'))
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(rows), str(model)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
        with open(tmp_path / f"{number}.scored.model.jsonl", encoding="utf-8") as scored:
            assert sum(1 for _ in scored) == number
    assert peaks[1] - peaks[0] < 12, f"{peaks} MB"
