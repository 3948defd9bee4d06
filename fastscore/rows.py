"""Stream rows in, write results out atomically."""

from __future__ import annotations

import gzip
import json
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

from fastscore.dataset_folder import JSON_SUFFIXES, dataset_files
from fastscore.json_stream import Record, iter_records, open_stream
from fastscore.table_rows import read_table
from fastscore.types import InputError, Row, is_table

OnError = Callable[[InputError, "str | None"], None]
_File = TypeVar("_File", bound="WholeFile")

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_rows(path: str | Path, on_error: OnError | None = None) -> Iterator[Row]:
    """The rows of a file, or of a dataset's folder (:func:`fastscore.dataset_folder.dataset_files`), one at a time.

    A file is a table where its name says so (:func:`fastscore.table_rows.read_table`), otherwise JSON Lines or a
    JSON array, plain or gzip. Memory depends on the largest record, not on the file. ``on_error`` gets each bad
    record (the error and, of JSON, the record's text) and reading goes on; without it the first bad record raises.

    Raises:
        InputError: a bad record, or a fault of the whole file: unreadable, truncated, an array that does not close,
            no rows at all.
    """
    num_records = 0

    def count(error: InputError, text: str | None) -> None:
        nonlocal num_records
        num_records += 1
        if on_error is None:
            raise error
        on_error(error, text)

    for file in dataset_files(path) if os.path.isdir(path) else [path]:
        for row in (read_table if is_table(file) else _read_json)(file, count):
            num_records += 1
            yield row
    if num_records == 0:
        raise InputError(f"no rows: the {'folder' if os.path.isdir(path) else 'file'} holds no record", path=str(path))


def _read_json(path: str | Path, on_error: OnError) -> Iterator[Row]:
    name = str(path)
    try:
        with open_stream(path) as stream:
            for record in iter_records(stream):
                try:
                    row = Row(_parse(record), name, record.line)
                except InputError as error:
                    on_error(error.at(path=name, line=record.line), record.text.decode("utf-8", "backslashreplace"))
                else:
                    yield row
    except InputError as error:
        raise error.at(path=name) from error


def _parse(record: Record) -> dict[str, Any]:
    try:
        data = json.loads(record.text.decode("utf-8"))
    except UnicodeDecodeError as error:
        before = record.text[: error.start]
        raise InputError(
            f"not valid UTF-8: {error.reason} (byte 0x{record.text[error.start]:02x})",
            line=record.line + before.count(b"\n"),
        ) from error
    except json.JSONDecodeError as error:
        column = error.colno + (record.column - 1 if error.lineno == 1 else 0)
        raise InputError(
            f"not valid JSON: {error.msg} (column {column})", line=record.line + error.lineno - 1
        ) from error
    except RecursionError as error:
        raise InputError("brackets are nested too deeply") from error
    except ValueError as error:  # Python reads whole numbers up to a number of digits only
        raise InputError(f"a number is too long: {str(error).partition(';')[0]}") from error
    if not isinstance(data, dict):
        raise InputError(f"expected a JSON object, found {_kind(data)}")
    # Half of a surrogate pair can be written as an escape only, and could not be written out again.
    if _SURROGATE_ESCAPE.search(record.text):
        _check_encodable(data)
    return data


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "a list"
    return "a string" if isinstance(value, str) else "a number"


def _check_encodable(data: Mapping[str, Any]) -> None:
    """Raise for the first text with a lone surrogate. Not recursive: data may be nested as deep as json reads it."""
    stack: list[tuple[str, object]] = [(str(key), value) for key, value in reversed(list(data.items()))]
    for key in data:
        _check_text(str(key), str(key))
    while stack:
        field, value = stack.pop()
        if isinstance(value, str):
            _check_text(value, field)
        elif isinstance(value, Mapping):
            for key in value:
                _check_text(str(key), field)
            stack += [(f"{field}.{key}", inner) for key, inner in reversed(list(value.items()))]
        elif isinstance(value, list | tuple):
            stack += [(f"{field}[{index}]", value[index]) for index in reversed(range(len(value)))]


def _check_text(text: str, field: str) -> None:
    if found := _SURROGATE.search(text):
        raise InputError(f"contains the lone surrogate U+{ord(found[0]):04X} at character {found.start()}", field=field)


class WholeFile:
    """Writes a file (gzip when the name ends in ``.gz``) that appears when it is whole, or not at all.

    The bytes go to a hidden file beside the target, which replaces the target on a clean exit and is removed after
    an exception. A symbolic link stays and what it points to is replaced; permissions are kept.

    Raises:
        InputError: on entry, when the target can't be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._out: BinaryIO | gzip.GzipFile | None = None

    def __enter__(self: _File) -> _File:
        try:
            self._open()
        except InputError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a name that the file system can't take
            raise self._error(f"cannot be written: {getattr(error, 'strerror', None) or error}") from error
        return self

    def _open(self) -> None:
        self._target = os.path.realpath(self.path)
        mode = self._existing_mode()
        self._temporary = os.path.join(
            os.path.dirname(self._target), f".fastscore-{os.getpid()}-{secrets.token_hex(8)}.tmp"
        )
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(self._temporary, flags, 0o666 if mode is None else mode)
        with ExitStack() as stack:
            stack.callback(self._remove_temporary)
            self._file = stack.enter_context(os.fdopen(descriptor, "wb", buffering=1 << 17))
            if mode is not None:
                os.chmod(self._temporary, mode)  # what the umask took away
            self._out = self._file
            if self.path.name.endswith(".gz"):
                self._out = stack.enter_context(
                    gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=self._file, mtime=0)
                )
            self._stack = stack.pop_all()

    def _existing_mode(self) -> int | None:
        """The permissions of the target, None when there is none yet."""
        try:
            found = os.stat(self._target)
        except FileNotFoundError:
            return None
        if stat.S_ISDIR(found.st_mode):
            raise self._error("cannot be written: it is a directory")
        if not stat.S_ISREG(found.st_mode):
            raise self._error("cannot be written: it is not a regular file")
        if not os.access(self._target, os.W_OK):
            raise self._error("cannot be written: it is read-only")
        return stat.S_IMODE(found.st_mode)

    def write_bytes(self, data: bytes) -> None:
        """Add these bytes.

        Raises:
            RuntimeError: before or after the with block.
        """
        if self._out is None:
            raise RuntimeError(f"{type(self).__name__} writes inside its with block only")
        self._out.write(data)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        out, self._out = self._out, None
        with self._stack:  # closes the file and removes it where it has not been moved into place
            if exc_type is not None or out is None:
                return
            if out is not self._file:
                out.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._target)

    def _remove_temporary(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def _error(self, message: str) -> InputError:
        return InputError(message, path=str(self.path))


class RowWriter(WholeFile):
    """A whole file of JSON Lines. ``default`` stands in for values that JSON can't hold; without it they raise.

    escapes: bytes of a file's name that are no UTF-8, and other lone surrogates, are written as JSON's ``\\udce9``;
        without it they raise.
    """

    def __init__(self, path: str | Path, default: Callable[[Any], Any] | None = None, escapes: bool = False) -> None:
        super().__init__(path)
        self._encode = json.JSONEncoder(ensure_ascii=False, default=default).encode
        self._errors = "backslashreplace" if escapes else "strict"

    def write(self, data: Mapping[str, Any]) -> None:
        """Add one row.

        Raises:
            InputError: a text that UTF-8 can't hold, or a value that JSON can't.
        """
        try:
            line = self._encode(dict(data)).encode("utf-8", self._errors)
        except UnicodeEncodeError:
            try:
                _check_encodable(data)
            except InputError as error:
                raise error.at(path=str(self.path)) from None
            raise
        except RecursionError as error:
            raise self._error("brackets are nested too deeply") from error
        except TypeError as error:
            raise self._error(f"JSON can't hold a value: {error}") from error
        self.write_bytes(line + b"\n")


def scored_path(input_path: str | Path, save_name: str) -> Path:
    """The reference system's name for a scored file: ``DIR/NAME.scored.SAVE_NAME.EXT`` beside the input.

    Of a folder, EXT is ``parquet`` where it holds tables, otherwise ``jsonl``.

    Raises:
        InputError: ``save_name`` is more than a part of a file name.
    """
    if save_name in ("", ".", "..") or any(c in "/\\" or unicodedata.category(c) == "Cc" for c in save_name):
        raise InputError(
            f"expected a part of a file name (no path, no control characters), found {save_name!r}", field="save_name"
        )
    path = Path(input_path)
    if is_folder := path.is_dir():
        path = Path(os.path.abspath(path)) if path.name in ("", "..") else path
    if not path.name:
        raise InputError("expected a file", path=str(input_path))
    if is_folder:
        suffix = ".parquet" if any(map(is_table, dataset_files(path))) else ".jsonl"
        return path.with_name(f"{path.name}.scored.{save_name}{suffix}")
    stem, suffix = path.stem, path.suffix
    if suffix == ".gz" and Path(stem).suffix in JSON_SUFFIXES:
        stem, suffix = Path(stem).stem, Path(stem).suffix + suffix
    return path.with_name(f"{stem}.scored.{save_name}{suffix}")


def refuse_same_file(
    output: str | Path, inputs: Iterable[str | Path], complaint: str = "the output would replace the input"
) -> None:
    """Raise InputError when the output is one of the inputs, also under another name or through a link, or in one."""
    for path in inputs:
        inside = False
        try:
            inside = os.path.isdir(path) and Path(os.path.realpath(path)) in Path(os.path.realpath(output)).parents
            same = os.path.samefile(output, path)
        except (OSError, ValueError):  # one of them is not there: reading or writing it says so
            same = os.path.abspath(output) == os.path.abspath(path)
        if inside:
            raise InputError(f"the output would lie in the input {path}", path=str(output))
        if same:
            raise InputError(f"{complaint} {path}", path=str(output))
