"""The columns of a table that is going to be written, known before the first of its rows is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastscore.fields import describe
from fastscore.table_rows import first_line, table_schema
from fastscore.types import ColumnType, InputError, Row, is_table

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 512
"""Rows whose values are looked at together."""
MISFITS = (ValueError, TypeError, ArithmeticError, NotImplementedError)
"""What Arrow raises for values of several types; its own errors are of these classes too."""
_FEATURES = b"huggingface"
"""Where ``datasets`` keeps its own types of the columns."""
_MOST_EXACT = 2**53
"""Larger whole numbers are not all there in a column of floating-point numbers, and Arrow refuses to write them."""


class TableColumns:
    """Learns the columns from the first pass over the rows: their types from a table, or else from the values.

    A column of a table has one type: null goes with any, whole numbers with others, keys of objects are put together
    (missing ones become null), and anything else is refused.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._types: dict[str, pa.Field] = {}
        self._metadata: dict[bytes, bytes] = {}
        self._waiting: list[tuple[Row, Mapping[str, Any]]] = []
        self._inexact: dict[str, Row] = {}
        self._table = ""
        self._table_fields: dict[str, pa.Field] = {}

    def add(self, row: Row, kept: Mapping[str, Any]) -> None:
        """A row that will be written, as far as it is known yet.

        Raises:
            InputError: it, or one given before, does not fit those before it.
        """
        if not is_table(row.path):
            self._waiting.append((row, kept))
            if len(self._waiting) == ROWS_AT_ONCE:
                self._infer()
            return
        if self._table != row.path:
            self._enter_table(str(row.path))
        for name in [name for name in self._table_fields if name in kept]:  # each once
            field = self._table_fields.pop(name)
            try:
                self._types[name] = _merged(self._types.get(name), field)
            except MISFITS as error:
                raise self._misfit(row, name, field, "the inputs before") from error

    def schema(self, added: Mapping[str, ColumnType]) -> pa.Schema:
        """The columns seen, and those that are added to the rows with their types' names; these take precedence.

        Raises:
            InputError: the rows given last don't fit, or the file can't hold a column.
        """
        import pyarrow as pa

        self._infer()
        types = {**self._types, **{name: pa.field(name, _type(kind)) for name, kind in added.items()}}
        if self._output.name.lower().endswith(".parquet"):
            for name, field in types.items():
                if _has_empty_struct(field.type):
                    raise InputError(
                        "Parquet can't hold objects that have no keys in any row", path=str(self._output), field=name
                    )
        return pa.schema(list(types.values()), self._metadata or None)

    def _enter_table(self, path: str) -> None:
        schema = table_schema(path)
        if schema.metadata and _FEATURES in schema.metadata:
            self._metadata.setdefault(_FEATURES, schema.metadata[_FEATURES])
        self._table, self._table_fields = path, {field.name: field for field in schema}

    def _infer(self) -> None:
        rows, self._waiting = self._waiting, []
        try:
            self._types = _with_values(self._types, [kept for _, kept in rows])
        except MISFITS:
            for row, kept in rows:  # one by one, for the place
                for name, value in kept.items():
                    try:
                        self._types |= _with_values(
                            {name: self._types[name]} if name in self._types else {}, [{name: value}]
                        )
                    except MISFITS as error:
                        raise self._misfit(row, name, value, "the rows before", error) from error
        self._check_exact(rows)

    def _check_exact(self, rows: Sequence[tuple[Row, Mapping[str, Any]]]) -> None:
        """Whole numbers and others go together only while the whole ones are small enough."""
        import pyarrow as pa

        for name, field in self._types.items():
            if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
                continue
            for row, kept in rows:
                value = kept.get(name)
                if isinstance(value, int) and abs(value) > _MOST_EXACT:
                    self._inexact.setdefault(name, row)
            if pa.types.is_floating(field.type) and name in self._inexact:
                raise self._inexact[name].error(
                    "a column of a table has one type, and one of fractions can't hold a whole number as large as this "
                    "(JSON Lines can hold both: -o NAME.jsonl)",
                    name,
                )

    def _misfit(self, row: Row, name: str, found: Any, where: str, error: BaseException | None = None) -> InputError:
        if name not in self._types or isinstance(error, OverflowError):
            reason = first_line(error) if error is not None else "of no type"
            return row.error(f"a table can't hold it: {reason}", name)
        kind = f"found {found.type if hasattr(found, 'type') else describe(found)}"
        return row.error(
            f"a column of a table has one type, which was {self._types[name].type} in {where}; {kind} "
            "(JSON Lines can hold both: -o NAME.jsonl)",
            name,
        )


def _with_values(types: Mapping[str, pa.Field], rows: Sequence[Mapping[str, Any]]) -> dict[str, pa.Field]:
    """The columns with those of the rows; raises one of ``MISFITS`` where they don't go together."""
    import pyarrow as pa

    merged = dict(types)
    for name in dict.fromkeys(name for row in rows for name in row):
        found = pa.array([row.get(name) for row in rows]).type
        merged[name] = _merged(merged.get(name), pa.field(name, found))
    return merged


def _merged(one: pa.Field | None, other: pa.Field) -> pa.Field:
    import pyarrow as pa

    if one is None or one.equals(other):
        return other
    return pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive").field(0)


def _type(kind: ColumnType) -> pa.DataType:
    import pyarrow as pa

    if isinstance(kind, dict):
        return pa.struct([pa.field(name, _type(inner)) for name, inner in kind.items()])
    inner = kind.removeprefix("list<")
    return pa.type_for_alias(kind) if inner == kind else pa.list_(_type(inner.removesuffix(">")))


def _has_empty_struct(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return any(pa.types.is_struct(inner) and inner.num_fields == 0 for inner in _inner_types(kind))


def _inner_types(kind: pa.DataType) -> Iterator[pa.DataType]:
    """The type, and all that it is made of."""
    import pyarrow as pa

    yield kind
    if pa.types.is_dictionary(kind):
        yield from _inner_types(kind.value_type)
    for index in range(kind.num_fields):
        yield from _inner_types(kind.field(index).type)


def check_json_can_hold(row: Row, names: Sequence[str]) -> None:
    """Check the columns of the table that a row is from.

    Raises:
        InputError: JSON has nothing for the values of one of them.
    """
    import pyarrow as pa

    is_plain = (
        pa.types.is_null,
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_struct,
        pa.types.is_dictionary,
    )
    for field in table_schema(str(row.path)):
        if field.name in names and not all(any(test(kind) for test in is_plain) for kind in _inner_types(field.type)):
            raise InputError(
                f"JSON can't hold values of type {field.type}: write Parquet or Arrow (-o NAME.parquet)",
                path=row.path,
                field=field.name,
            )
