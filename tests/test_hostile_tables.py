"""Tables and datasets' folders made to do harm. Arrow follows what a damaged file says about places in memory, and a
process that it kills cannot be caught: these run in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import assert_ended_well, run, tree

ROWS = {
    "query": ["where", "who"] * 8,
    "answers": [["the town", "é"], ["a"]] * 8,
    "pos": [["x"], ["y", "z"]] * 8,
    "number": [1, None] * 8,
    "kind": pa.array(["u", "v"] * 8).dictionary_encode(),
    "more": [{"a": 1, "b": "q"}] * 16,
}
DAMAGE = """
import random, sys
from pathlib import Path
from fastscore.rows import RowWriter, read_rows
from fastscore.types import InputError

whole = Path(sys.argv[1])
data = whole.read_bytes()
ended = {"read": 0, "refused": 0}
for seed in range(int(sys.argv[2])):
    chance = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.randrange(len(damaged))
        flipped = bytes([damaged[at] ^ 1 << chance.randrange(8)])
        patch = chance.choice([flipped, b"\\xff\\xff\\xff\\x7f", chance.randbytes(8), b"\\0"])
        damaged[at : at + len(patch)] = patch
    path = whole.with_name(f"{seed}-{whole.name}")
    path.write_bytes(damaged[: chance.randrange(len(data))] if chance.random() < 0.1 else damaged)
    try:
        with RowWriter(whole.with_name("written"), default=str) as out:
            for row in read_rows(path, lambda error, text: None):
                out.write(row.data)
        ended["read"] += 1
    except InputError as error:
        assert "\\n" not in str(error)
        ended["refused"] += 1
print(ended["read"], ended["refused"])
"""


def write(path: Path, kind: str) -> Path:
    table = pa.table(ROWS)
    if kind == "parquet":
        pq.write_table(table, path)
        return path
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as out:
        out.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_damaged_tables_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    whole = write(tmp_path / f"whole.{'parquet' if kind == 'parquet' else 'arrow'}", kind)
    number = 200
    command = [sys.executable, "-c", DAMAGE, str(whole), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"ended by {done.returncode}: {done.stderr[-2000:]}"
    read, refused = map(int, done.stdout.split())
    assert read + refused == number
    assert min(read, refused) > 10, "damage that is seen, and damage that changes a value only"


def describe(folder: Path, **files: Any) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def state(name: str) -> dict[str, Any]:
    return {"dataset_info": {}, "state": {"_data_files": [{"filename": name}]}}


FOLDERS = {
    "above": state("../secret.arrow"),
    "absolute": state("/etc/secret.arrow"),
    "itself": state("."),
    "nested": {"dataset_info": {}, "state": "[" * 100_000},
    "split-above": {"dataset_dict": {"splits": ["../other"]}},
    "split-itself": {"dataset_dict": {"splits": ["."]}},
    "split-nested": {"dataset_dict": "[" * 100_000},
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_lead_elsewhere(case: str, tmp_path: Path) -> None:
    write(tmp_path / "secret.arrow", "stream")
    folder = describe(tmp_path / "folder", **FOLDERS[case])
    before = tree(tmp_path)
    ended = run("score", folder, "-o", tmp_path / "out.jsonl", "--task", "qa", "-m", "./no-such-model")
    assert_ended_well(ended, (2,))
    assert ended.err.startswith(f"fastscore: {folder}/"), ended.err
    assert tree(tmp_path) == before


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    folder = describe(tmp_path / "folder")
    os.mkfifo(folder / "rows.jsonl")
    ended = run("score", folder, "-o", tmp_path / "out.jsonl", "-m", "./no-such-model")
    assert_ended_well(ended, (2,))
    assert ended.err == f"fastscore: {folder}/rows.jsonl: expected a regular file\n"
