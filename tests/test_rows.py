"""Rows: what is read comes back as it was, and faults are named where they are."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscore import json_stream
from fastscore.json_stream import scan_array
from fastscore.rows import read_rows
from fastscore.types import InputError

RECORDS: list[dict[str, Any]] = [
    {"query": "naïve 😀 \u2028 \x85 line", "answers": ["a", "b"], "z": 1, "a": 2},
    {"big": 123456789012345678901234567890, "small": 1e-300, "neg": -0.0, "none": None, "yes": True},
    {"nested": {"list": [[], {}, [1, [2, [3]]]], "brackets": ']}[{,"\\', "escaped": '\\"\n\t\u0000/'}},
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fault(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        list(read_rows(path))
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)
    return caught.value


FORMS = {
    "lines": "\n".join(json.dumps(r) for r in RECORDS),
    "lines-crlf-utf8": "".join(json.dumps(r, ensure_ascii=False) + "\r\n" for r in RECORDS),
    "lines-blank": "\n \n" + "\n\n\t\n".join(json.dumps(r) for r in RECORDS) + "\n\n",
    "array": json.dumps(RECORDS),
    "array-utf8-tight": json.dumps(RECORDS, ensure_ascii=False, separators=(",", ":")),
    "array-pretty": "\n\n  " + json.dumps(RECORDS, indent=4) + "\r\n\n",
    "array-per-line": "[\n" + "\n,\n".join(json.dumps(r) for r in RECORDS) + "\n]",
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records(tmp_path: Path, form: str, bom: bytes, packed: bool) -> None:
    content = bom + FORMS[form].encode()
    path = write(tmp_path / "named.txt", gzip.compress(content) if packed else content)
    rows = list(read_rows(path))
    assert [row.data for row in rows] == RECORDS
    assert [list(row.data) for row in rows] == [list(record) for record in RECORDS]
    assert str(rows[1].data["neg"]) == "-0.0"
    assert {row.path for row in rows} == {str(path)}


def test_gzip_is_known_by_its_content_and_may_have_several_members(tmp_path: Path) -> None:
    assert [r.data for r in read_rows(write(tmp_path / "a.gz", '{"a": 1}'))] == [{"a": 1}]
    two = gzip.compress(b'{"a": 1}\n{"a"') + gzip.compress(b": 2}\n")
    assert [r.data for r in read_rows(str(write(tmp_path / "b.json", two)))] == [{"a": 1}, {"a": 2}]


def test_nan_and_infinity_are_read_as_python_reads_them(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path / "a", '{"x": [NaN, Infinity, -Infinity]}'))
    assert repr(row.data["x"]) == "[nan, inf, -inf]"


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('\n{"a": 1}\n\n{"a": 2}\r\n  {"a": 3}', [2, 4, 5]),
        ('\n[{"a": 1}, {"a": 2},\n{"a":\n\n3}, {"a": 4}\n,\n{"a": "\\n"}]', [2, 2, 3, 5, 7]),
    ],
    ids=["lines", "array"],
)
def test_line_is_where_the_record_begins(tmp_path: Path, content: str, lines: list[int]) -> None:
    assert [row.line for row in read_rows(write(tmp_path / "rows", content))] == lines


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7])
def test_lines_and_columns_do_not_depend_on_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk_bytes)
    last = ' {"é": "日本"}, {"a" 1}]'
    error = fault(write(tmp_path / "rows", '[{"é": "日本 \\" \\\\"}, {"a": "ß"},\n' + last))
    assert error.line == 2
    assert error.message == f"not valid JSON: Expecting ':' delimiter (column {last.index('1') + 1})"


DEEP = "[" * 100_000 + "]" * 100_000
BAD_RECORDS = {
    "bad-json": ('{"a": 1, }', "not valid JSON: "),
    "no-object-list": ("[1, 2]", "expected a JSON object, found a list"),
    "no-object-number": ("17", "expected a JSON object, found a number"),
    "no-object-string": ('"a,]}"', "expected a JSON object, found a string"),
    "no-object-null": ("null", "expected a JSON object, found null"),
    "no-object-true": ("true", "expected a JSON object, found true"),
    "no-json-word": ("abc", "not valid JSON: Expecting value"),
    "too-deep": (f'{{"a": {DEEP}}}', "brackets are nested too deeply"),
    "huge-int": ('{"a": ' + "9" * 5000 + "}", "a number is too long"),
    "lone-surrogate": ('{"a": "😀", "b": [{"c": "x\\ud83d"}]}', "contains the lone surrogate U+D83D at character 1"),
    "raw-tab": ('{"a": "x\ty"}', "not valid JSON: Invalid control character"),
    "mismatched": ('{"a": [1}, 2]', "not valid JSON: Expecting ',' delimiter"),
}


@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_named_and_can_be_skipped(tmp_path: Path, case: str, form: str) -> None:
    text, message = BAD_RECORDS[case]
    if form == "lines":
        content, line = f'{{"a": 1}}\n\n{text}\n{{"a": 2}}\n', 3
    else:
        content, line = f'[{{"a": 1}}\n,\n{text},\n{{"a": 2}}]', 3
    path = write(tmp_path / "rows.json", content)
    error = fault(path)
    assert error.line == line
    assert message in error.message
    assert f"rows.json:{line}: " in str(error)

    skipped: list[tuple[int | None, str | None]] = []
    rows = list(read_rows(path, lambda error, raw: skipped.append((error.line, raw))))
    assert [row.data for row in rows] == [{"a": 1}, {"a": 2}]
    assert skipped == [(line, text)]


def test_a_lone_surrogate_names_its_field_and_a_pair_is_none(tmp_path: Path) -> None:
    assert fault(write(tmp_path / "a", '{"q": "ok", "pos": ["a", {"t": "\\uDE00\\ud83d"}]}')).field == "pos[1].t"
    assert fault(write(tmp_path / "b", '{"\\udc00": 1}')).field == "\udc00"
    (row,) = read_rows(write(tmp_path / "c", '{"q": "\\ud83d\\ude00", "s": "\\\\ud83d"}'))
    assert row.data == {"q": "😀", "s": "\\ud83d"}


def test_json_errors_carry_the_line_and_column_in_the_file(tmp_path: Path) -> None:
    error = fault(write(tmp_path / "a", '{"a": 1}\n{"a": "é" "b"}'))
    assert (error.line, error.message) == (2, "not valid JSON: Expecting ',' delimiter (column 11)")
    error = fault(write(tmp_path / "b", '[\n  {"a": 1}, {"b": 2 3}]'))
    assert (error.line, error.message) == (2, "not valid JSON: Expecting ',' delimiter (column 21)")
    error = fault(write(tmp_path / "c", '[\n  {\n    "a": 1\n    "b": 2\n  }\n]'))
    assert (error.line, error.message) == (4, "not valid JSON: Expecting ',' delimiter (column 5)")


@pytest.mark.parametrize("form", ["lines", "array"])
def test_invalid_utf8_is_a_fault_of_its_record(tmp_path: Path, form: str) -> None:
    records = [b'{"a": 1}', b'{"a": "caf\xe9"}', b'{"a": 2}']
    content = b"\n".join(records) if form == "lines" else b"[" + b",\n".join(records) + b"]"
    path = write(tmp_path / "latin1", content)
    error = fault(path)
    assert (error.line, error.message) == (2, "not valid UTF-8: invalid continuation byte (byte 0xe9)")
    skipped: list[str | None] = []
    assert [r.data["a"] for r in read_rows(path, lambda _, raw: skipped.append(raw))] == [1, 2]
    assert skipped == ['{"a": "caf\\xe9"}']


def test_an_error_inside_the_callback_is_not_taken_for_a_fault_of_the_file(tmp_path: Path) -> None:
    def full(error: InputError, raw: str | None) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        list(read_rows(write(tmp_path / "a", "nonsense"), full))


FILE_FAULTS = {
    "missing-comma": ('[{"a": 1}\n{"a": 2}]', 2, "expected ',' or ']' after a record, found '{' (column 1)"),
    "no-comma-string": ('[{"a": 1} "x"]', 1, "expected ',' or ']' after a record, found '\"' (column 11)"),
    "two-commas": ('[{"a": 1},\n ,{"a": 2}]', 2, "expected a record after ',', found ',' (column 2)"),
    "first-comma": ("[,", 1, "expected a record after '[', found ',' (column 2)"),
    "last-comma": ('[{"a": 1},\n\n]', 3, "expected a record after ',', found ']' (column 1)"),
    "brace": ('[{"a": 1}}', 1, "expected ',' or ']' after a record, found '}' (column 10)"),
    "brace-first": ("[}", 1, "expected a record after '[', found '}' (column 2)"),
    "after-end": ('[{"a": 1}]\n\né', 3, "expected nothing after the array's end, found byte 0xc3 (column 1)"),
    "two-arrays": ('[{"a": 1}]\n[{"a": 1}]', 2, "expected nothing after the array's end, found '[' (column 1)"),
    "not-closed": ('[{"a": 1},\n{"a": 2}\n', 3, "the array is not closed: expected ']' at the end of the file"),
    "not-closed-comma": ('[{"a": 1},', 1, "the array is not closed"),
    "only-bracket": ("[", 1, "the array is not closed"),
    "cut-record": ('[{"a": 1},\n{"a": [2\n\n', 2, "the file ends inside the record that begins here"),
    "cut-string": ('[{"a": 1},\n{"a": "x}]', 2, "the file ends inside the record that begins here"),
    "cut-escape": ('[{"a": "x\\', 1, "the file ends inside the record that begins here"),
    "empty": ("", None, "no rows"),
    "bom-only": ("\ufeff", None, "no rows"),
    "blank": (" \n\n\t\r\n", None, "no rows"),
    "empty-array": ("\n[ \n]\n", None, "no rows"),
    "gzip-empty": (gzip.compress(b""), None, "no rows"),
    "gzip-header-only": (b"\x1f\x8b", 1, "truncated"),
    "gzip-no-gzip": (b"\x1f\x8bnonsense, not gzip at all", None, "the gzip data is damaged"),
    "gzip-text-after": (gzip.compress(b'{"a": 1}\n') + b"tail", None, "the gzip data is damaged"),
}


@pytest.mark.parametrize("case", FILE_FAULTS)
def test_a_fault_of_the_whole_file_raises_even_when_bad_records_are_skipped(tmp_path: Path, case: str) -> None:
    content, line, message = FILE_FAULTS[case]
    path = write(tmp_path / "rows", content)
    error = fault(path)
    assert message in error.message
    if line is not None and not case.startswith("gzip"):
        assert error.line == line
    with pytest.raises(InputError) as caught:
        list(read_rows(path, lambda error, raw: None))
    assert str(caught.value) == str(error)


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_truncated_gzip_gives_its_whole_records_then_the_line(tmp_path: Path, array: bool) -> None:
    texts = [json.dumps({"n": n, "noise": os.urandom(500).hex()}) for n in range(3000)]
    packed = gzip.compress(("[" + ",\n".join(texts) + "]" if array else "\n".join(texts)).encode(), 1)
    path = write(tmp_path / "rows.gz", packed[: len(packed) // 2])
    numbers: list[int] = []
    with pytest.raises(InputError, match="the file is truncated") as caught:
        numbers.extend(row.data["n"] for row in read_rows(path))
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 500
    assert caught.value.line is not None
    assert abs(caught.value.line - len(numbers)) < 1000
    assert str(path) in str(caught.value)


def test_damaged_gzip(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(json.dumps({"a": os.urandom(9000).hex()}).encode()))
    packed[-6] ^= 0xFF  # the checksum
    assert "the gzip data is damaged: CRC check failed" in fault(write(tmp_path / "rows.gz", bytes(packed))).message


def test_unreadable_paths(tmp_path: Path) -> None:
    assert "No such file" in fault(tmp_path / "missing.jsonl").message
    assert "a folder without data files" in fault(tmp_path).message
    assert "cannot be read: " in fault(tmp_path / "nul\0name").message
    assert "Not a directory" in fault(write(tmp_path / "file", "x") / "below").message


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions don't bind this user")
def test_no_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "secret", '{"a": 1}')
    path.chmod(0)
    assert "Permission denied" in fault(path).message


def test_a_record_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 1 << 20)
    for content in ('[{"a": 1},\n{"a": "' + "x" * 3_000_000, '{"a": 1}\n{"a": "' + "x" * 3_000_000):
        error = fault(write(tmp_path / "rows", content))
        assert error.line == 2
        assert "longer than 1 MiB" in error.message


def test_memory_is_bounded_by_the_record_and_not_the_file(tmp_path: Path) -> None:
    text = json.dumps({"query": "q" * 50, "pos": ["word ünd " * 400] * 10, "neg": []}, ensure_ascii=False).encode()
    path, count = tmp_path / "large.json.gz", 110_000_000 // len(text)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"[")
        for index in range(count):
            file.write(text + (b",\n" if index < count - 1 else b"]"))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path)) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.sampled_from('a"\\[]{},é ')), inner),
    max_leaves=12,
)


def cut(content: bytes, sizes: Iterable[int]) -> list[bytes]:
    chunks, start, sizes = [], 0, list(sizes)
    while start < len(content):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(content[start : start + size])
        start += size
    return chunks


@settings(max_examples=300, deadline=None)
@given(
    st.lists(values, max_size=6),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.booleans(),
)
def test_scanner_agrees_with_json(
    array: list[Any], indent: int | None, ascii_only: bool, sizes: list[int], per_byte: bool
) -> None:
    text = json.dumps(array, indent=indent, ensure_ascii=ascii_only)
    content = text.encode()
    records = list(scan_array(cut(content[1:], [1] if per_byte else sizes)))
    assert [json.loads(record.text) for record in records] == array
    lines = text.split("\n")
    for record in records:
        shift = 1 if record.line == 1 else 0  # the scanner was not given the opening bracket
        assert lines[record.line - 1][record.column - 1 + shift :].startswith(record.text.decode().split("\n")[0])


@settings(max_examples=300, deadline=None)
@given(st.lists(values, max_size=4), st.data())
def test_scanner_refuses_what_json_refuses_and_never_depends_on_the_chunks(
    array: list[Any], data: st.DataObject
) -> None:
    content = bytearray(json.dumps(array, ensure_ascii=False).encode())
    place = data.draw(st.integers(1, len(content)))
    removed = data.draw(st.integers(0, 2))
    content[place : place + removed] = data.draw(st.sampled_from([b"", *(c.encode() for c in '"\\,[]{} ')]))
    outcomes = []
    for sizes in ([1], [3, 2], [len(content) + 1]):
        try:
            outcomes.append([tuple(record) for record in scan_array(cut(bytes(content[1:]), sizes))])
        except InputError as error:
            outcomes.append([(str(error), error.line)])
    assert outcomes[0] == outcomes[1] == outcomes[2]
    try:
        expected = json.loads(content)
    except ValueError:
        pass
    else:
        assert [json.loads(record[2]) for record in outcomes[0]] == expected
