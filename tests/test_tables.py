"""Parquet and Arrow files: what goes in comes out, in flat memory, whole or not at all."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastscore.integrations.upstream import collate_scores
from fastscore.rows import RowWriter, read_rows
from fastscore.table_schema import TableColumns
from fastscore.table_writer import TableWriter
from fastscore.types import InputError, Row

KINDS = ("parquet", "arrow", "feather")


def schema_of(path: Path, rows: Iterable[dict[str, Any]], first_line: int = 1, source: str = "rows.jsonl") -> pa.Schema:
    columns = TableColumns(path)
    for line, row in enumerate(rows, start=first_line):
        columns.add(Row(row, source, line), row)
    return columns.schema({})


def write_all(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> Path:
    with TableWriter(path, schema) as out:
        for row in rows:
            out.write(row)
    return path


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a run writes them: once seen, once written."""
    return write_all(path, schema_of(path, rows), rows)


def data(path: Path) -> list[dict[str, Any]]:
    return [row.data for row in read_rows(path)]


def ordered(path: Path) -> list[str]:
    """Lines of JSON; the order of keys may differ from row to row in JSON, and not in a table."""
    return [json.dumps(json.loads(line), sort_keys=True) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def fault(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(path))
    return str(caught.value)


def by_another_reader(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".feather":
        return pyarrow.feather.read_table(path).to_pylist()
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        return reader.read_all().to_pylist()


# Every column has one type, and every row all columns: what a table can hold, and then holds exactly.
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_VALUES: st.SearchStrategy[st.SearchStrategy[Any]] = st.recursive(
    st.sampled_from(
        [_TEXT, st.integers(-(2**63), 2**63 - 1), st.booleans(), st.floats(allow_nan=False), st.just(None)]
    ).map(lambda values: st.none() | values),
    lambda inner: (
        inner.map(lambda values: st.none() | st.lists(values, max_size=3))
        | st.dictionaries(_TEXT, inner, min_size=1, max_size=3).map(lambda fields: st.fixed_dictionaries(fields))
    ),
    max_leaves=6,
)
_ROWS = st.dictionaries(_TEXT, _VALUES, min_size=1, max_size=4).flatmap(
    lambda columns: st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=5)
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=_ROWS)
def test_json_to_table_and_back(rows: list[dict[str, Any]], kind: str, tmp_path: Path) -> None:
    before, table, after = tmp_path / "a.jsonl", tmp_path / f"b.{kind}", tmp_path / "c.jsonl"
    with RowWriter(before) as out:
        for row in rows:
            out.write(row)
    write_table(table, data(before))
    with RowWriter(after) as out:
        for row in read_rows(table):
            out.write(row.data)
    assert ordered(after) == ordered(before)
    assert by_another_reader(table) == rows
    assert [(row.path, row.line) for row in read_rows(table)] == [(str(table), n + 1) for n in range(len(rows))]


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_and_what_comes_late(kind: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"n": n, "late": None if n < 1500 else [f"{n}"], "wide": 1 if n < 900 else 0.5, "extra": {"a": n}}
        for n in range(2000)
    ]
    rows[1999] |= {"extra": {"a": 1, "b": True}, "last": "白"}
    found = data(write_table(tmp_path / f"rows.{kind}", rows))
    assert found == [{**row, "extra": {"b": None, **row["extra"]}, "last": row.get("last")} for row in rows]
    assert all(type(row["wide"]) is float for row in found)


def odd_table() -> pa.Table:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901)
    columns: dict[str, pa.Array] = {
        "blob": pa.array([b"\xff\x00", None]),
        "seen": pa.array([moment, None], pa.timestamp("us", "Europe/Berlin")),
        "nanoseconds": pa.array([1_700_000_000_000_000_001, None], pa.timestamp("ns")),
        "day": pa.array([moment.date(), None]),
        "price": pa.array([decimal.Decimal("1.10"), None], pa.decimal128(9, 2)),
        "few": pa.array([7, None], pa.int8()),
        "many": pa.array([2**64 - 1, None], pa.uint64()),
        "kind": pa.array(["a", None], pa.dictionary(pa.int32(), pa.string())),
        "pairs": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        "vector": pa.array([[0.5, 1.5], None], pa.list_(pa.float32(), 2)),
        "nested": pa.array([{"raw": [b"x"]}, None]),
        "large": pa.array(["x", None], pa.large_string()),
    }
    return pa.table(columns)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_keeps_its_types(kind: str, tmp_path: Path) -> None:
    before = odd_table()
    pq.write_table(before, tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    columns = TableColumns(tmp_path / f"b.{kind}")
    for row in rows:
        columns.add(row, row.data)
    with TableWriter(tmp_path / f"b.{kind}", columns.schema({"teacher_scores": "list<double>"})) as out:
        for row in rows:
            out.write({**row.data, "teacher_scores": [-0.5]})
    if kind == "parquet":
        after = pq.read_table(tmp_path / "b.parquet")
    else:
        after = pa.ipc.open_stream(pa.OSFile(str(tmp_path / "b.arrow"))).read_all()
    assert after.drop_columns(["teacher_scores"]).equals(pq.read_table(tmp_path / "a.parquet"))
    assert after.schema.field("teacher_scores").type == pa.list_(pa.float64())


def test_pandas_and_types_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"query": datasets.Value("string"), "level": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"query": ["x", "y"], "level": [1, 0]}, features).to_parquet(tmp_path / "a.parquet")
    columns = TableColumns(tmp_path / "b.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    for row in rows:
        columns.add(row, row.data)
    with TableWriter(tmp_path / "b.parquet", columns.schema({"teacher_scores": "list<double>"})) as out:
        for row in rows:
            out.write({**row.data, "teacher_scores": [-0.5]})
    again = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "b.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert again.features["level"] == features["level"]
    assert again["teacher_scores"][:] == [[-0.5], [-0.5]]
    frame = pandas.DataFrame({"query": ["x", "y"]}, index=[5, 7])
    frame.to_parquet(tmp_path / "c.parquet")
    assert [row["query"] for row in data(tmp_path / "c.parquet")] == ["x", "y"]
    frame.reset_index().to_feather(tmp_path / "d.feather")
    assert data(tmp_path / "d.feather") == [{"index": 5, "query": "x"}, {"index": 7, "query": "y"}]


def test_arrow_of_either_format_under_either_name(tmp_path: Path) -> None:
    table = pa.table({"a": ["x", "y"]})
    for name in ("file.arrow", "file.feather"):
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert data(tmp_path / name) == [{"a": "x"}, {"a": "y"}]
    with pa.ipc.new_stream(str(tmp_path / "stream.FEATHER"), table.schema) as stream:
        stream.write_table(table)
    assert data(tmp_path / "stream.FEATHER") == [{"a": "x"}, {"a": "y"}]


def with_bad_last_row(path: Path) -> Path:
    texts, last = pa.array([f"text {n}" for n in range(999)]), b"caf\xe9"
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, len(last)], pa.int32()).buffers()[1], pa.py_buffer(last)]
    )
    pq.write_table(pa.table({"n": range(1000), "query": pa.concat_arrays([texts, bad])}), path)
    return path


def test_a_bad_last_row_is_named_or_skipped(tmp_path: Path) -> None:
    path = with_bad_last_row(tmp_path / "rows.parquet")
    message = "row 1000: field 'query': not valid UTF-8: "
    assert f"{path}: {message}" in fault(path)
    bad: list[InputError] = []
    assert len([row.data for row in read_rows(path, lambda error, _: bad.append(error))]) == 999
    assert [(error.path, error.line, error.field) for error in bad] == [(str(path), 1000, "query")]


def test_whole_files_at_fault(tmp_path: Path) -> None:
    good = pa.table({"a": ["x" * 100, "y"] * 1000})
    pq.write_table(good, tmp_path / "good.parquet", compression="none", use_dictionary=False)
    whole = (tmp_path / "good.parquet").read_bytes()
    cases = {
        "text.parquet": b'{"a": 1}\n',
        "empty.parquet": b"",
        "cut.parquet": whole[:-100],
        "headless.parquet": whole[2000:],
        "empty.arrow": b"",
        "text.arrow": b'{"a": 1, "b": "not a table at all"}\n',
        "cut.feather": b"ARROW1\0\0" + b"x" * 50,
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        message = fault(tmp_path / name)
        assert message.startswith(f"{tmp_path / name}: cannot be read: "), message
        assert "\n" not in message
    assert "No such file or directory" in fault(tmp_path / "missing.parquet")
    assert "cannot be read: " in fault(tmp_path / "nul\0.parquet")
    pq.write_table(good.slice(0, 0), tmp_path / "none.parquet")
    assert fault(tmp_path / "none.parquet") == f"{tmp_path / 'none.parquet'}: no rows: the file holds no record"
    pq.write_table(pa.table([["x"], ["y"]], names=["a", "a"]), tmp_path / "twice.parquet")
    assert "field 'a': two columns have this name" in fault(tmp_path / "twice.parquet")


MISFITS: dict[str, tuple[list[Any], str]] = {
    "a string among lists": ([["x"], ["y"], "z"], "row.jsonl:3: field 'a': a column of a table has one type"),
    "a list among strings": (["x", ["y"]], "which was string in the rows before; found a list of 1"),
    "a string among numbers": ([1, "2"], "which was int64 in the rows before; found '2'"),
    "a number among booleans": ([True, 1], "which was bool in the rows before; found 1"),
    "a number of 65 bits": ([1, 2**64], "row.jsonl:2: field 'a': a table can't hold it: "),
    "an object within": ([{"x": [1]}, {"x": ["y"]}], "row.jsonl:2: field 'a': a column of a table has one type"),
    "objects without keys": ([{}, {}], "field 'a': Parquet can't hold objects that have no keys in any row"),
    "half a surrogate pair": (["x", "\ud800"], "row.jsonl:2: field 'a': "),
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("before", [0, 1000], ids=["at once", "a thousand rows later"])
def test_what_does_not_fit_is_named_before_anything_is_written(name: str, before: int, tmp_path: Path) -> None:
    values, message = MISFITS[name]
    rows = [{"a": values[0]}] * before + [{"a": value} for value in values]
    with pytest.raises(InputError) as caught:
        schema_of(tmp_path / "out.parquet", rows, first_line=1 - before, source="row.jsonl")
    assert message in str(caught.value)


def test_a_value_that_turns_up_only_in_the_second_pass(tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    target.write_bytes(b"old")
    numbers = [{"a": n} for n in range(700)]
    schema = pa.schema([("a", pa.int64())])
    with pytest.raises(InputError, match=r"out.parquet: row 701: field 'a': does not fit the column's type int64: "):
        write_all(target, schema, [*numbers, {"a": "seven hundred"}])
    with pytest.raises(InputError, match=r"out.parquet: row 701: field 'b': the rows before have no such field"):
        write_all(target, schema, [*numbers, {"a": 1, "b": 2}])
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_table_has_its_columns(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{kind}"
    with TableWriter(path, pa.schema([("a", pa.string())])):
        pass
    assert by_another_reader(path) == []
    assert "no rows" in fault(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_run_leaves_nothing(kind: str, error: type[BaseException], tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from [{"a": "x" * 100}] * 2000
        raise error

    with pytest.raises(error):
        write_all(tmp_path / f"out.{kind}", pa.schema([("a", pa.string())]), rows())
    assert os.listdir(tmp_path) == []


LIMITED = """
import os, resource, signal, sys
import pyarrow as pa
from fastscore.table_writer import TableWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
with TableWriter(sys.argv[1], pa.schema([("a", pa.string())])) as out:
    for number in range(20_000):
        out.write({"a": os.urandom(4000).hex()})
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(os.name != "posix", reason="limits")
def test_a_full_disk_leaves_what_was_there(kind: str, tmp_path: Path) -> None:
    target = tmp_path / f"out.{kind}"
    target.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", LIMITED, target], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("File too large")
    assert "Exception ignored" not in done.stderr
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [target.name]


KILLED = """
import sys
import pyarrow as pa
from fastscore.table_writer import TableWriter
with TableWriter(sys.argv[1], pa.schema([("a", pa.string())])) as out:
    for number in range(10**9):
        out.write({"a": "x" * 1000})
        if number == 40_000:
            print("writing", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_in_the_middle_the_target_is_untouched(tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    target.write_bytes(b"old")
    with subprocess.Popen([sys.executable, "-c", KILLED, target], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert target.read_bytes() == b"old"


STREAMED = """
import resource, sys
from fastscore.rows import read_rows
from fastscore.table_writer import TableWriter
from fastscore.table_rows import table_schema
with TableWriter(sys.argv[2], table_schema(sys.argv[1])) as out:
    for number, row in enumerate(read_rows(sys.argv[1])):
        out.write(row.data)
        if number == 4000:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(number + 1, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path) -> None:
    """One row group of 160 MB in memory; what Arrow maps of a file counts, so it is read from a stream of batches."""
    rows, path = 40_000, tmp_path / f"in.{kind}"
    piece = pa.table({"n": pa.array(range(4000)), "text": [f"{n} " * 800 for n in range(4000)]})
    table = pa.concat_tables([piece] * (rows // 4000))
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=rows, use_dictionary=False)
    else:
        with pa.ipc.new_stream(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table, 1000)
    done = subprocess.run(
        [sys.executable, "-c", STREAMED, path, tmp_path / "out.parquet"], capture_output=True, text=True, check=True
    )
    count, growth = map(int, done.stdout.split())
    assert count == rows
    assert growth * 1024 < table.nbytes / 2, "kB"
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == rows


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "import fastscore.run_files\n"
        "from fastscore.rows import read_rows\n"
        "print(len(list(read_rows(sys.argv[1]))))"
    )
    example = Path(__file__).parent.parent / "examples" / "qa.jsonl"
    done = subprocess.run([sys.executable, "-c", code, example], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("12\n", "")
    monkeypatch.setattr("fastscore.table_rows.find_spec", lambda name: None)
    message = "need pyarrow: pip install 'fastscore[tables]'"
    assert message in fault(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=re.escape(message)):
        TableWriter(tmp_path / "a.parquet", None)


def test_saved_scores_are_joined_with_json_only() -> None:
    with pytest.raises(InputError, match=r"train.parquet: saved scores are joined with the rows of a JSON file only"):
        collate_scores("train.parquet", "m")


@pytest.mark.parametrize("apart", [1, 600], ids=["together", "far apart"])
@pytest.mark.parametrize("turned", [False, True], ids=["whole first", "fraction first"])
def test_whole_numbers_that_fractions_cannot_stand_for_are_found_before_scoring(apart: int, turned: bool) -> None:
    numbers = [2**53 + 1, *[1] * apart, 0.5]
    rows = [Row({"id": number}, "r.jsonl", line) for line, number in enumerate(numbers[:: -1 if turned else 1], 1)]

    def schema(some: list[Row]) -> pa.Schema:
        columns = TableColumns(Path("o.parquet"))
        for row in some:
            columns.add(row, row.data)
        return columns.schema({})

    with pytest.raises(InputError, match=rf"r\.jsonl:{len(rows) if turned else 1}: field 'id': .*as large as this"):
        schema(rows)
    assert str(schema(rows[1:] if turned else rows[:-1]).field("id").type) == "int64"
