"""What the fuzzer calls with bytes of its own making: each target reads them as the program would, and checks more
than that it survives. Only :class:`InputError` may come out of the code under test.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastscore.config import TASKS, TaskConfig
from fastscore.gguf_header import parse_gguf_header
from fastscore.json_stream import scan_array
from fastscore.rows import RowWriter, read_rows
from fastscore.tasks import expand_row, output_row, validate_row
from fastscore.templates import parse_template
from fastscore.types import InputError, Row

Target = Callable[[bytes], None]


def rows(data: bytes) -> None:
    """A file of rows, read to its end past bad records; every row of it through every task, and written out again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        path.write_bytes(data)
        found: list[Row] = []
        bad: list[InputError] = []
        with suppress(InputError):
            found.extend(read_rows(path, lambda error, _: bad.append(error)))
        for error in bad:
            assert error.path == str(path)
            assert error.line is not None
            assert 1 <= error.line <= data.count(b"\n") + 1 or data.startswith(b"\x1f\x8b")
        for row in found:
            assert isinstance(row.data, dict)
            _through_every_task(row)
        with RowWriter(Path(folder, "written")) as out:
            for row in found:
                out.write(row.data)
        if found:
            again = [row.data for row in read_rows(Path(folder, "written"))]
            assert _text(again) == _text([row.data for row in found]), "read, written and read again"
        assert set(os.listdir(folder)) == {"rows", "written"}


def _text(value: Any) -> str:
    return json.dumps(value)  # NaN is not equal to itself, its text is


def _through_every_task(row: Row) -> None:
    for task in TASKS:
        for answers in ("first", "all", "sample"):
            config = TaskConfig(task, answers=answers)  # type: ignore[arg-type]
            try:
                num_pairs = validate_row(row, config)
            except InputError:
                continue
            if task == "preference":  # tokenised at once
                continue
            made = expand_row(row, config, list)
            assert len(made.pairs) == num_pairs == made.num_candidates * made.num_answers
            assert num_pairs > 0
            assert all(len(pair.answer) > 0 for pair in made.pairs)
            scores = [-1.0] * made.num_candidates
            assert output_row(row, config, scores)["teacher_scores"] == scores


def gzipped_rows(data: bytes) -> None:
    """The same behind gzip, whole and with its last byte changed."""
    packed = gzip.compress(data, 1, mtime=0)
    rows(packed)
    rows(packed[: len(data) % len(packed)] if data else packed)


def json_stream(data: bytes) -> None:
    """An array cut into records: the same however it comes in pieces, and what a JSON parser finds when it is one."""
    whole, pieces = _scan([data]), _scan([data[i : i + 1] for i in range(len(data))])
    assert whole == pieces
    try:
        parsed = json.loads((b"[" + data).decode("utf-8"))  # of bytes it would guess the encoding
    except (ValueError, RecursionError):
        return
    records, problem = whole
    assert problem is None, "a JSON array was refused"
    assert _text([json.loads(text) for text in records]) == _text(parsed)


def _scan(chunks: list[bytes]) -> tuple[list[bytes], str | None]:
    found: list[bytes] = []
    try:
        for record in scan_array(chunks):
            found.append(record.text)
    except InputError as error:
        return found, str(error)
    return found, None


def templates(data: bytes) -> None:
    """A template: what is put into it comes out as it went in, and nothing else of it does anything."""
    source = data.decode("utf-8", "surrogateescape")
    try:
        template = parse_template(source)
    except InputError:
        return
    values = dict.fromkeys((*template.row_fields, "key"), "{answer}{{")
    text = template.prompt(values) + template.answer("}}{key}")
    literals = [literal for literal, _ in template.pieces] + [template.answer_prefix]
    filled = sum(field is not None for _, field in template.pieces)
    assert len(text) == sum(map(len, literals)) + filled * len("{answer}{{") + len("}}{key}")
    assert source.endswith("{answer}")
    data_row = {name: "x" for name in template.row_fields if name != "answer"}
    row = Row({**data_row, "answers": ["y"], "pos": ["z"]})
    with suppress(InputError):  # the template may name one of these for another purpose
        assert validate_row(row, TaskConfig(template=source)) == 1


def gguf_header(data: bytes) -> None:
    """The header of a GGUF file. What passes, the gguf package reads without hanging or refuses."""
    if not data.startswith(b"GGUF"):
        data = b"GGUF\3\0\0\0" + data
    try:
        header = parse_gguf_header(data)
    except InputError:
        return
    assert header.num_pairs * 13 + header.num_tensors * 24 <= len(data)
    import gguf

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        try:
            reader = gguf.GGUFReader(file.name)
        except (ValueError, KeyError, IndexError, TypeError, OverflowError):
            return
        assert len(reader.tensors) == header.num_tensors


TARGETS: dict[str, Target] = {
    target.__name__: target for target in (rows, gzipped_rows, json_stream, templates, gguf_header)
}


def seeds(name: str) -> list[bytes]:
    """Inputs to begin with: ones that are right, and ones that nearly are."""
    row = {"query": "where", "answers": ["the town", "a"], "pos": ["é"], "neg": ["42"], "task": "qa", "history": ["b"]}
    ids = {"score_inputs": [[1], [2]], "context_inputs": [3], "query_inputs": [], "answer_inputs": [4]}
    text = {"context": "a", "continuation": " b", "choices": ["c", " d"], "x": [None, True, 1.5, {"y": "\ud800"}]}
    lines = b"".join(json.dumps(each).encode() + b"\n" for each in (row, ids, text))
    array = json.dumps([row, ids, text]).encode()
    if name in ("rows", "gzipped_rows"):
        return [lines, array, b"\xef\xbb\xbf" + lines, lines[:-20], array[:-9], b"[" * 50, b'{"a": NaN}', b"\n\n[1]"]
    if name == "json_stream":
        return [array[1:], b"1, 2]", b'"a\\"b", [[]], {"c": "]"}]', b"[1,]", b'"\\', b" ] "]
    if name == "templates":
        return [b"{key}\nQ: {query}\nA: {answer}", b"{{}}{answer}", b"{a.b}{answer}", b"{answer}{", b"{x!r:>9}{answer}"]
    return [_gguf(), _gguf()[:60], b"GGUF\0\0\0\3" + bytes(16)]


def _gguf() -> bytes:
    """A header with a value of each kind, and a tensor."""

    def number(value: int, size: int = 8) -> bytes:
        return value.to_bytes(size, "little")

    def string(text: bytes) -> bytes:
        return number(len(text)) + text

    pairs = [
        string(b"general.architecture") + number(8, 4) + string(b"llama"),
        string(b"a") + number(4, 4) + number(32, 4),
        string(b"b") + number(9, 4) + number(8, 4) + number(2) + string(b"x") + string(b"yz"),
        string(b"c") + number(9, 4) + number(6, 4) + number(3) + bytes(12),
        string(b"d") + number(7, 4) + b"\1",
    ]
    tensor = string(b"t.weight") + number(2, 4) + number(4) + number(2) + number(0, 4) + number(0)
    header = b"GGUF" + number(3, 4) + number(1) + number(len(pairs)) + b"".join(pairs) + tensor
    return header + bytes(-len(header) % 32) + bytes(32)
