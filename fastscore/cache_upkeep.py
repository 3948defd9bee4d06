"""What is in a cache, and making it smaller."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastscore.cache_blocks import BLOCK_ENTRIES
from fastscore.cache_file import FORMAT, DamagedCache, open_existing, real_path, sqlite_errors, transaction
from fastscore.types import InputError

_SHORTEST_FINGERPRINT = 8


@dataclass(frozen=True, slots=True)
class ModelScores:
    """What a cache holds of one model. Dates are seconds since 1970; ``bytes`` are those of its scores."""

    fingerprint: str
    about: dict[str, Any]
    entries: int
    bytes: int
    first: int | None
    last: int | None

    @property
    def name(self) -> str:
        """The model as a person named it."""
        return str(self.about.get("model", "?"))


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """A cache at one moment. ``file_bytes`` includes the log that belongs to it."""

    path: str
    format: int
    file_bytes: int
    models: tuple[ModelScores, ...]

    @property
    def entries(self) -> int:
        """Scores of all models."""
        return sum(model.entries for model in self.models)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or with ``dry_run`` would be; then ``bytes_after`` is None."""

    removed: int
    kept: int
    bytes_before: int
    bytes_after: int | None


def cache_info(path: str | Path) -> CacheInfo:
    """What is in a cache.

    Raises:
        InputError: there is none of this format, or it is damaged.
    """
    with _opened(path) as (connection, real):
        return _info(connection, real)


def prune_cache(
    path: str | Path,
    *,
    model: str | None = None,
    before: float | None = None,
    keep_bytes: int | None = None,
    dry_run: bool = False,
) -> Pruned:
    """Remove scores and give their room back. A score must meet every condition that is given.

    A run that uses the cache at the same time goes on, and computes again what it misses. While the file is written
    anew, it needs its own size once more on the disk, and so does the folder for temporary files.

    Args:
        model: the name by which the model was given, or the first 8 or more digits of its fingerprint.
        before: scores stored before this moment, in seconds since 1970.
        keep_bytes: the oldest, until the file has at most this size.

    Raises:
        InputError: as for :func:`cache_info`, no condition, or a model of which there is nothing.
        OSError: the disk is full or failing, or another process holds the file.
    """
    if model is None and before is None and keep_bytes is None:
        raise InputError("nothing says what to remove: give a model, an age or a size", path=str(path))
    with _opened(path) as (connection, real):
        info = _info(connection, real)
        which, values = _condition(connection, info, model, before)
        removed = 0
        while True:
            ids = _oldest(connection, which, values, keep_bytes)
            connection.execute("CREATE TEMP TABLE IF NOT EXISTS gone (id INTEGER PRIMARY KEY)")
            connection.executemany("INSERT INTO gone VALUES (?)", ((number,) for number in ids))
            entries = "SELECT coalesce(sum(entries), 0) FROM blocks WHERE id IN gone"
            removed += connection.execute(entries).fetchone()[0]
            if dry_run:
                return Pruned(removed, info.entries - removed, info.file_bytes, None)
            _remove(connection)
            after = _file_bytes(real)
            # The size is foreseen from the average only.
            if keep_bytes is None or not ids or after <= keep_bytes:
                return Pruned(removed, _info(connection, real).entries, info.file_bytes, after)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[sqlite3.Connection, Path]]:
    real = real_path(path)
    with closing(open_existing(real)) as connection:
        try:
            with sqlite_errors(real):
                yield connection, real
        except DamagedCache as error:
            raise InputError(f"is damaged: {error}", path=str(path)) from error


def _info(connection: sqlite3.Connection, path: Path) -> CacheInfo:
    rows = connection.execute(
        "SELECT fingerprint, about, coalesce(sum(entries), 0), coalesce(sum(length(data)), 0), min(created), "
        "max(created) FROM models LEFT JOIN blocks ON model = models.id GROUP BY models.id ORDER BY min(created)"
    )
    models = tuple(_model_scores(*row) for row in rows)
    return CacheInfo(str(path), FORMAT, _file_bytes(path), models)


def _model_scores(fingerprint: object, about: object, *counts: object) -> ModelScores:
    try:
        known = json.loads(about)  # type: ignore[arg-type]
    except (TypeError, ValueError, RecursionError):
        known = None
    entries, size, first, last = (count if isinstance(count, int) else 0 for count in counts)
    if not (isinstance(fingerprint, bytes) and isinstance(known, dict) and first >= 0 and last >= 0):
        raise DamagedCache("what it says of a model cannot be read")
    return ModelScores(fingerprint.hex(), known, entries, size, first or None, last or None)


def _file_bytes(path: Path) -> int:
    log = Path(f"{path}-wal")
    return path.stat().st_size + (log.stat().st_size if log.exists() else 0)


def _condition(
    connection: sqlite3.Connection, info: CacheInfo, model: str | None, before: float | None
) -> tuple[str, list[Any]]:
    """What follows WHERE, and its values."""
    conditions: list[str] = ["true"]
    values: list[Any] = []
    if model is not None:
        is_start = len(model) >= _SHORTEST_FINGERPRINT
        meant = [m for m in info.models if m.name == model or (is_start and m.fingerprint.startswith(model.lower()))]
        if not meant:
            names = ", ".join(sorted({repr(m.name) for m in info.models})) or "none"
            raise InputError(f"holds nothing of model {model!r}; its models: {names}", path=info.path)
        conditions.append(f"model IN (SELECT id FROM models WHERE hex(fingerprint) IN ({', '.join('?' * len(meant))}))")
        values += [m.fingerprint.upper() for m in meant]
    if before is not None:
        conditions.append("created < ?")
        values.append(before)
    return " AND ".join(conditions), values


def _oldest(connection: sqlite3.Connection, which: str, values: list[Any], keep_bytes: int | None) -> list[int]:
    """The blocks to remove, all that meet the condition or as many of the oldest as it takes."""
    rows = connection.execute(f"SELECT id, length(data) FROM blocks WHERE {which} ORDER BY created, id", values)
    if keep_bytes is None:
        return [number for number, _ in rows]
    pages, free, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    used = (pages - free) * page_bytes
    total = connection.execute("SELECT coalesce(sum(length(data)), 0) FROM blocks").fetchone()[0]
    too_much = total * (used - keep_bytes) / used
    ids: list[int] = []
    for number, size in rows:
        if too_much <= 0:
            break
        ids.append(number)
        too_much -= size
    return ids


def _remove(connection: sqlite3.Connection) -> None:
    with transaction(connection):
        connection.execute("DELETE FROM blocks WHERE id IN gone")
        connection.execute(
            f"DELETE FROM places WHERE NOT EXISTS (SELECT 1 FROM blocks WHERE id = place / {BLOCK_ENTRIES})"
        )
        connection.execute("DELETE FROM models WHERE NOT EXISTS (SELECT 1 FROM blocks WHERE model = models.id)")
        connection.execute("DELETE FROM gone")
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
