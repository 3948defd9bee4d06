"""JSON Lines or a JSON array, plain or gzip, cut into the texts of its records without reading it whole."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastscore.types import InputError

CHUNK_BYTES = 1 << 18
MAX_RECORD_BYTES = 1 << 28
"""A quote or a line end gone missing can turn the rest of a file into one record: it must not fill the memory."""

SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
_QUOTE, _BACKSLASH = b'"\\'
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))

_BLANK = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb'[^ \t\r\n,\[\]{}"]*')
# The bounds on repetition keep the regex engine's own stack small; the loop around them goes on where they stop.
# Only short strings are matched in passing: bytes.find is many times quicker over a long one.
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]+|"[^"\\]{0,32}"){0,512}')
_TO_QUOTE = re.compile(rb'[^"\\]*(?:\\.[^"\\]*){0,512}', re.DOTALL)


class Record(NamedTuple):
    """The text of one record and where it begins; ``line`` and ``column`` (characters) count from 1."""

    line: int
    column: int
    text: bytes


class _Raw(io.RawIOBase):
    """An open file whose faults are told in words."""

    def __init__(self, file: io.BufferedIOBase | gzip.GzipFile, beneath: io.BufferedIOBase) -> None:
        self._file = file
        self._beneath = beneath

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._file.readinto(buffer)
        except EOFError as error:
            raise InputError("the gzip data ends too early: the file is truncated") from error
        except (zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"the gzip data is damaged: {error}") from error
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}") from error

    def close(self) -> None:
        self._file.close()
        self._beneath.close()
        super().close()


def open_stream(path: str | Path) -> io.BufferedReader:
    """The file's bytes, unpacked when they begin like gzip, whatever the file is called.

    Raises:
        InputError: there is no such file, or it can't be opened.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - the reader that is returned closes it
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        packed = file.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)
    except OSError as error:
        file.close()
        raise InputError(f"cannot be read: {error.strerror or error}") from error
    unpacked = gzip.GzipFile(fileobj=file, mode="rb") if packed else file
    return io.BufferedReader(_Raw(unpacked, file), CHUNK_BYTES)


def iter_records(stream: io.BufferedReader) -> Iterator[Record]:
    """The records of a stream; whether it is an array is told by its first character that is not white space.

    Raises:
        InputError: the file as a whole is at fault, so that its further records can't be told apart.
    """
    if stream.peek(len(_BOM)).startswith(_BOM):
        stream.read(len(_BOM))
    place = _Place()
    if _skip_blank(stream, place) == b"[":
        stream.read(1)
        place.column += 1
        yield from scan_array(_chunks(stream, place), place)
    else:
        yield from _iter_lines(stream, place)


def _skip_blank(stream: io.BufferedReader, place: _Place) -> bytes:
    """Read up to the first character that is not white space; that character, or nothing at the end of the file."""
    while head := stream.peek(1):
        text = head.lstrip(SPACE)
        blank = len(head) - len(text)
        place.advance(head, 0, blank)
        stream.read(blank)
        if text:
            return text[:1]
    return b""


def _chunks(stream: io.BufferedReader, place: _Place) -> Iterator[bytes]:
    while True:
        try:
            chunk = stream.read(CHUNK_BYTES)
        except InputError as error:
            raise error.at(line=place.line) from error
        if not chunk:
            return
        yield chunk


def _iter_lines(stream: io.BufferedReader, place: _Place) -> Iterator[Record]:
    line, column = place.line, place.column
    while True:
        try:
            text = stream.readline(MAX_RECORD_BYTES + 1)
        except InputError as error:
            raise error.at(line=line) from error
        if not text:
            return
        _check_size(len(text), line)
        if record := text.rstrip(SPACE):
            yield Record(line, column, record)
        line, column = line + 1, 1


def _check_size(size: int, line: int) -> None:
    if size > MAX_RECORD_BYTES:
        raise InputError(
            f"the record that begins here is longer than {MAX_RECORD_BYTES >> 20} MiB: "
            "a quote, bracket or line end seems to be missing",
            line=line,
        )


class _Place:
    """Where reading stands in the file."""

    def __init__(self, line: int = 1, column: int = 1) -> None:
        self.line = line
        self.column = column

    def advance(self, chunk: bytes, start: int, stop: int) -> None:
        newlines = chunk.count(b"\n", start, stop)
        if newlines:
            self.line += newlines
            self.column = 1
            start = chunk.rindex(b"\n", start, stop) + 1
        self.column += _num_characters(chunk[start:stop])


def _num_characters(text: bytes) -> int:
    """Characters that begin in a piece of UTF-8, which may be cut anywhere."""
    return len(text) if text.isascii() else len(text.translate(None, _CONTINUATION_BYTES))


class _OpenRecord:
    """A record of an array whose end has not been seen yet."""

    def __init__(self, place: _Place, first: int) -> None:
        self.line, self.column = place.line, place.column
        self._parts: list[bytes] = []
        self._size = 0
        self._scalar = first not in b'"{['
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, chunk: bytes, pos: int) -> tuple[int, Record | None]:
        """Take what belongs to the record from ``chunk[pos:]``: where that ends, and the record once it is whole."""
        stop, whole = self._scan_scalar(chunk, pos) if self._scalar else self._scan(chunk, pos)
        self._parts.append(chunk[pos:stop])
        self._size += stop - pos
        _check_size(self._size, self.line)
        return stop, Record(self.line, self.column, b"".join(self._parts)) if whole else None

    def _scan_scalar(self, chunk: bytes, pos: int) -> tuple[int, bool]:
        stop = _end(_SCALAR, chunk, pos)
        return stop, stop < len(chunk)

    def _scan(self, chunk: bytes, pos: int) -> tuple[int, bool]:
        size, depth, in_string = len(chunk), self._depth, self._in_string
        if self._escaped:
            self._escaped = False
            pos += 1
        while pos < size:
            if in_string:
                pos = _find_quote(chunk, pos)
                if pos == size:
                    break
                if chunk[pos] == _QUOTE:
                    in_string = False
                    pos += 1
                else:
                    self._escaped = pos + 1 == size
                    pos = min(pos + 2, size)
            else:
                if depth:  # otherwise this is the record's first byte
                    pos = _end(_TO_BRACKET, chunk, pos)
                    if pos == size:
                        break
                byte = chunk[pos]
                if byte == _QUOTE:
                    in_string = True
                elif byte in b"{[":
                    depth += 1
                elif byte in b"}]":
                    depth -= 1
                else:
                    continue
                pos += 1
            if depth == 0 and not in_string:
                return pos, True
        self._depth, self._in_string = depth, in_string
        return pos, False


def _find_quote(chunk: bytes, pos: int) -> int:
    """The quote that ends the string in which ``chunk[pos]`` stands, an earlier backslash, or the chunk's end."""
    stop = chunk.find(b'"', pos)
    if stop == pos or (stop > pos and chunk[stop - 1] != _BACKSLASH):
        return stop
    return _end(_TO_QUOTE, chunk, pos)


def _end(pattern: re.Pattern[bytes], chunk: bytes, pos: int) -> int:
    match = pattern.match(chunk, pos)
    assert match is not None, "the patterns match the empty text"
    return match.end()


def scan_array(chunks: Iterable[bytes], place: _Place | None = None) -> Iterator[Record]:
    """The records of a JSON array given in pieces of any size, without its opening bracket.

    Only boundaries are found here (brackets, strings, escapes); a record's own text is for a JSON parser to judge.

    Raises:
        InputError: commas or brackets between the records are wrong, or the array does not end where it should.
    """
    place = place or _Place()
    record: _OpenRecord | None = None
    before = "["  # the last thing seen between records: "[", "," or "]", or "record"
    for chunk in chunks:
        pos, size = 0, len(chunk)
        while pos < size:
            start = pos
            if record is not None:
                pos, whole = record.feed(chunk, pos)
                place.advance(chunk, start, pos)
                if whole is not None:
                    record, before = None, "record"
                    yield whole
                continue
            pos = _end(_BLANK, chunk, pos)
            place.advance(chunk, start, pos)
            if pos == size:
                break
            byte = chunk[pos : pos + 1]
            problem = _problem_between(before, byte)
            if problem is not None:
                found = repr(byte.decode()) if byte.isascii() else f"byte 0x{byte.hex()}"  # its rest may come later
                raise InputError(f"{problem}, found {found} (column {place.column})", line=place.line)
            if byte in b",]":
                before = byte.decode()
                pos += 1
                place.column += 1
            else:
                record = _OpenRecord(place, chunk[pos])
    if record is not None:
        raise InputError("the array is not closed: the file ends inside the record that begins here", line=record.line)
    if before != "]":
        raise InputError("the array is not closed: expected ']' at the end of the file", line=place.line)


def _problem_between(before: str, byte: bytes) -> str | None:
    """What is wrong with this byte between two records of an array, if anything."""
    if before == "]":
        return "expected nothing after the array's end"
    if before == "record":
        return None if byte in b",]" else "expected ',' or ']' after a record"
    if byte in b",}" or (byte == b"]" and before == ","):
        return f"expected a record after {before!r}"
    return None
