"""Rows into Parquet and Arrow files that are whole or not there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fastscore.rows import WholeFile
from fastscore.table_rows import check_extra, first_line
from fastscore.table_schema import MISFITS
from fastscore.types import InputError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 512
GROUP_BYTES = 1 << 25
"""Parquet's row groups: large enough to be read well, small enough to be held while they are gathered."""


class TableWriter(WholeFile):
    """A whole table: Parquet, Arrow's streaming format in ``.arrow`` (as ``datasets`` has it), or its file format in
    ``.feather``.

    A field that the schema does not name becomes a column if the first ``ROWS_AT_ONCE`` rows have it.

    Raises:
        InputError: on entry, when the target can't be written or pyarrow is missing.
    """

    def __init__(self, path: str | Path, schema: pa.Schema) -> None:
        check_extra(path)
        super().__init__(path)
        self._schema = schema
        self._table: Any = None
        self._rows: list[Mapping[str, Any]] = []
        self._num_written = 0
        self._group: list[pa.RecordBatch] = []

    def write(self, data: Mapping[str, Any]) -> None:
        """Add one row.

        Raises:
            InputError: a value of these or of the rows before does not fit its column.
        """
        self._rows.append(data)
        if len(self._rows) == ROWS_AT_ONCE:
            self._flush()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                self._flush()
                self._write_group()
                self._table.close()
        except BaseException as error:
            self._give_up()
            super().__exit__(type(error), error, error.__traceback__)
            raise
        if exc_type is not None:
            self._give_up()
        super().__exit__(exc_type, exc, traceback)

    def _give_up(self) -> None:
        """Close what Arrow holds: nobody reads the bytes, but it would write them when it is collected."""
        if self._table is not None:
            with suppress(OSError, *MISFITS):
                self._table.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._table is None:
            self._start()
        rows, self._rows = self._rows, []
        if unknown := next(((i, name) for i, row in enumerate(rows) for name in row if name not in self._names), None):
            index, name = unknown
            raise self._misfit(index, name, "the rows before have no such field")
        columns = []
        for field in self._schema:
            values = [row.get(field.name) for row in rows]
            try:
                columns.append(pa.array(values, field.type))
            except MISFITS:
                for index, value in enumerate(values):
                    try:
                        pa.array([value], field.type)
                    except MISFITS as error:
                        reason = f"does not fit the column's type {field.type}: {first_line(error)}"
                        raise self._misfit(index, field.name, reason) from error
                raise
        self._num_written += len(rows)
        self._group.append(pa.record_batch(columns, schema=self._schema))
        if sum(batch.nbytes for batch in self._group) >= GROUP_BYTES:
            self._write_group()

    def _start(self) -> None:
        """Complete the schema, which the first rows may add to, and begin the file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for name in dict.fromkeys(name for row in self._rows for name in row if name not in self._schema.names):
            values = [row.get(name) for row in self._rows]
            try:
                self._schema = self._schema.append(pa.field(name, pa.array(values).type))
            except MISFITS as error:
                raise InputError(
                    f"a table can't hold it: {first_line(error)}", path=str(self.path), field=name
                ) from error
        self._names = frozenset(self._schema.names)
        kind = self.path.suffix.lower()
        if kind == ".parquet":
            self._table = pq.ParquetWriter(self._file, self._schema)
        elif kind == ".arrow":
            self._table = pa.ipc.new_stream(self._file, self._schema)
        else:  # in this format, a dictionary can't change from batch to batch
            self._schema = pa.schema([_without_dictionary(field) for field in self._schema], self._schema.metadata)
            self._table = pa.ipc.new_file(self._file, self._schema)

    def _write_group(self) -> None:
        import pyarrow as pa

        if group := pa.Table.from_batches(self._group, self._schema):
            self._table.write_table(group)
        self._group.clear()

    def _misfit(self, index: int, name: str, reason: str) -> InputError:
        return InputError(reason, path=str(self.path), line=self._num_written + index + 1, field=name)


def _without_dictionary(field: pa.Field) -> pa.Field:
    import pyarrow as pa

    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
