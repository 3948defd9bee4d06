"""A dataset's folder is read as ``datasets`` reads it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastscore.dataset_folder import dataset_files
from fastscore.rows import read_rows, refuse_same_file, scored_path
from fastscore.types import InputError

ROWS = [{"n": n, "query": f"q {n} 白", "pos": ["a"] * (n % 3)} for n in range(10)]


def read(path: Path) -> list[dict[str, Any]]:
    return [row.data for row in read_rows(path)]


def fault(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(path))
    return str(caught.value)


def by_datasets(folder: Path, cache: Path) -> list[dict[str, Any]]:
    found = datasets.load_dataset(str(folder), split="train", cache_dir=str(cache))
    return [dict(row) for row in found]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_saved_to_disk(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(saved, num_shards=3)
    assert read(saved) == ROWS
    assert [(Path(str(row.path)).name, row.line) for row in read_rows(saved)][3:5] == [
        ("data-00000-of-00003.arrow", 4),
        ("data-00001-of-00003.arrow", 1),
    ]
    datasets.load_from_disk(str(saved)).select([7, 2]).save_to_disk(tmp_path / "selected")
    assert read(tmp_path / "selected") == [ROWS[7], ROWS[2]]


def test_splits_saved_to_disk(tmp_path: Path) -> None:
    splits = {"train": datasets.Dataset.from_list(ROWS[:6]), "test": datasets.Dataset.from_list(ROWS[6:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"train": splits["train"]}).save_to_disk(tmp_path / "one")
    assert f"holds the splits train and test: name one, for example {tmp_path / 'both' / 'train'}" in fault(
        tmp_path / "both"
    )
    assert read(tmp_path / "both" / "test") == ROWS[6:]
    assert read(tmp_path / "one") == ROWS[:6]


def parquet_shards(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    for number, rows in enumerate((ROWS[:4], ROWS[4:])):
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"train-{number:05}-of-00002.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


def json_files(folder: Path) -> None:
    (folder / "__drafts").mkdir(parents=True)
    (folder / "__drafts" / "no.jsonl").write_text("{")
    (folder / "a.jsonl").write_bytes(jsonl(ROWS[:2]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS[2:])))
    (folder / ".hidden.jsonl").write_text("{")


def folder_per_split(folder: Path) -> None:
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "part 1.jsonl").write_bytes(jsonl(ROWS[:5]))
    (folder / "train" / "part 2.jsonl").write_bytes(jsonl(ROWS[5:]))


@pytest.mark.parametrize("lay_out", [parquet_shards, json_files, folder_per_split])
def test_laid_out_as_on_the_hub(lay_out: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set[1]"
    lay_out(folder)
    lay_out(tmp_path / "plain")  # datasets takes brackets in a path for a pattern
    assert read(folder) == ROWS == by_datasets(tmp_path / "plain", tmp_path / "cache")


def test_what_a_run_leaves_beside_its_output_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "rows.jsonl.meta.json").write_text("{}")
    (tmp_path / "rows.jsonl.errors.jsonl").write_text("{}\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert [path.name for path in dataset_files(tmp_path)] == ["rows.jsonl"]


def test_which_split_is_meant_must_be_said(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "dev.jsonl", "more.jsonl"):
        (tmp_path / name).write_bytes(jsonl(ROWS))
    assert "holds the splits validation, train and one without a name (more.jsonl): give the files" in fault(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "a folder without data files (.parquet, .arrow, .feather, .json" in fault(tmp_path / "empty")
    # A word is one only where it stands by itself.
    (tmp_path / "other").mkdir()
    for name in ("trainer.jsonl", "contest.jsonl"):
        (tmp_path / "other" / name).write_bytes(jsonl(ROWS))
    assert len(read(tmp_path / "other")) == 20


def test_damaged_descriptions(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    state = tmp_path / "state.json"
    for text, message in (
        ("{", "cannot be read: "),
        ("[]", "expected a JSON object"),
        ("{}", "'_data_files': expected"),
    ):
        state.write_text(text)
        assert f"{state}: " in fault(tmp_path)
        assert message in fault(tmp_path)
    state.write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    assert fault(tmp_path) == f"{tmp_path / 'gone.arrow'}: cannot be read: No such file or directory"


def test_names_of_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_shards(tmp_path / "tables")
    json_files(tmp_path / "texts.v1")
    assert scored_path(tmp_path / "tables", "m") == tmp_path / "tables.scored.m.parquet"
    assert scored_path(tmp_path / "texts.v1", "m") == tmp_path / "texts.v1.scored.m.jsonl"
    assert scored_path("a.b.arrow", "m") == Path("a.b.scored.m.arrow")
    monkeypatch.chdir(tmp_path / "tables")
    assert scored_path(".", "m") == tmp_path / "tables.scored.m.parquet"
    with pytest.raises(InputError, match="the output would lie in the input"):
        refuse_same_file(tmp_path / "tables" / "data" / "new.parquet", [tmp_path / "tables"])
    refuse_same_file(tmp_path / "tables.parquet", [tmp_path / "tables"])
