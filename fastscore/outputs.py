"""Where the rows of a job go, and as what: the format of its rows and the kind of its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastscore.config import TaskConfig
from fastscore.output_formats import OutputFormat
from fastscore.rows import RowWriter
from fastscore.table_rows import check_extra
from fastscore.table_schema import TableColumns, check_json_can_hold
from fastscore.tasks import make_task
from fastscore.types import InputError, Row, ScoredRow, is_table

if TYPE_CHECKING:
    from fastscore.table_writer import TableWriter


class Output:
    """One output. It is shown every row of the first pass, so that what can't be written is found before scoring.

    Raises:
        InputError: the name is of no file that can be written, or the format can't hold such scores.
    """

    def __init__(self, path: Path, output_format: OutputFormat, task_config: TaskConfig) -> None:
        output_format.check_scores(task_config)
        self.path = path
        self._format = output_format
        self._task_config = task_config
        self._columns: TableColumns | None = None
        self._tables: set[str] = set()
        self._seen: set[str] = set()
        if path.name.endswith(".gz") and is_table(path.stem):
            raise InputError("Parquet and Arrow files are not packed once more: leave out .gz", path=str(path))
        if is_table(path):
            check_extra(path)
            self._columns = TableColumns(path)

    def check(self, row: Row) -> None:
        """See that a row can be written in this format.

        Raises:
            InputError: naming the row and the field.
        """
        self._format.check(row, self._task_config)

    def expect(self, row: Row) -> None:
        """A row that will be written to this kind of file.

        Raises:
            InputError: its columns can't be, whether it is skipped or not.
        """
        if self._columns is not None:
            self._seen.add(make_task(self._task_config, row).name)
            self._columns.add(row, self._format.kept(row, self._task_config))
        elif is_table(row.path) and row.path not in self._tables:
            self._tables.add(str(row.path))
            check_json_can_hold(row, list(self._format.kept(row, self._task_config)))

    def settle(self) -> None:
        """After the first pass."""
        if self._columns is not None:
            self._schema = self._columns.schema(self._format.added(self._task_config, self._seen))

    def writer(self) -> RowWriter | TableWriter:
        """The file, to be entered."""
        if self._columns is None:
            return RowWriter(self.path)
        from fastscore.table_writer import TableWriter

        return TableWriter(self.path, self._schema)

    def write(self, scored: ScoredRow, out: RowWriter | TableWriter) -> None:
        """Write a scored row."""
        for data in self._format.rows(scored, self._task_config):
            out.write(data)
