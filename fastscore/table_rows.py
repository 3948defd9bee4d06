"""Rows of Parquet and Arrow files, streamed a small piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastscore.types import InputError, Row

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 256
"""Rows that are Python objects at a time; a batch of a file may hold a hundred thousand."""
_BUFFER_BYTES = 1 << 20
_IPC_FILE_MAGIC = b"ARROW1"


def check_extra(path: str | Path) -> None:
    """Raise InputError where pyarrow is missing."""
    if find_spec("pyarrow") is None:
        raise InputError("Parquet and Arrow files need pyarrow: pip install 'fastscore[tables]'", path=str(path))


def read_table(path: str | Path, on_error: Callable[[InputError, str | None], None] | None = None) -> Iterator[Row]:
    """The rows of a ``.parquet``, ``.arrow`` or ``.feather`` file; ``line`` is the row's number, from 1.

    Arrow files may be of the streaming or of the file format, whatever they are called. Values are plain Python:
    dates, decimals and bytes stay what they are. ``on_error`` gets each row of a Parquet file that can't be read, as in
    :func:`fastscore.rows.read_rows`; in an Arrow file, such a row is a fault of the file.

    Raises:
        InputError: a row or the file can't be read, or pyarrow is missing.
    """
    name, number = str(path), 0
    with _told(name), _open(path) as (schema, batches):
        _check_names(schema, name)
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                piece = batch.slice(start, ROWS_AT_ONCE)
                for data in _plain(piece):
                    number += 1
                    if isinstance(data, InputError):
                        located = data.at(path=name, line=number)
                        if on_error is None:
                            raise located
                        on_error(located, None)
                    else:
                        yield Row(data, name, number)


def table_schema(path: str | Path) -> pa.Schema:
    """The columns of a file.

    Raises:
        InputError: it can't be read, or pyarrow is missing.
    """
    with _told(str(path)), _open(path) as (schema, _):
        return schema


def _plain(piece: pa.RecordBatch) -> list[Any]:
    """One dictionary for each row; an InputError instead where a value is none that Python can hold."""
    try:
        return piece.to_pylist()
    except (ValueError, ArithmeticError, NotImplementedError):  # Arrow's errors are of these classes too
        return [_plain_row(piece, index) for index in range(piece.num_rows)]


def _plain_row(piece: pa.RecordBatch, index: int) -> dict[str, Any] | InputError:
    data = {}
    for name, column in zip(piece.schema.names, piece.columns, strict=True):
        try:
            data[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            return InputError(f"not valid UTF-8: {error.reason}", field=name)
        except (ValueError, ArithmeticError, NotImplementedError) as error:
            return InputError(f"cannot be read: {first_line(error)}", field=name)
    return data


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    check_extra(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Python's own open, for its words where that fails.
    with open(path, "rb") as file:
        if str(path).lower().endswith(".parquet"):
            parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            yield parquet.schema_arrow, parquet.iter_batches(ROWS_AT_ONCE, use_threads=False)
            return
        whole = file.read(len(_IPC_FILE_MAGIC)) == _IPC_FILE_MAGIC
        with pa.memory_map(str(path)) as source:
            if whole:
                reader = pa.ipc.open_file(source)
                yield reader.schema, map(_sound, map(reader.get_batch, range(reader.num_record_batches)))
            else:
                stream = pa.ipc.open_stream(source)
                yield stream.schema, map(_sound, stream)


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """An Arrow file is memory as it was; what it says about lengths and places would be followed anywhere."""
    batch.validate(full=True)
    return batch


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Faults of a file in the words of every other input."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError, MemoryError) as error:  # Arrow's as well
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"cannot be read: {reason}", path=name) from error


def _check_names(schema: pa.Schema, path: str) -> None:
    if twice := [name for name in schema.names if schema.names.count(name) > 1]:
        raise InputError("two columns have this name", path=path, field=twice[0])


def first_line(error: BaseException) -> str:
    """What an error of Arrow's says, without the lines that repeat it."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
