"""The file behind the cache: one SQLite database that is opened, recognised, made, or set aside.

**Kills.** The journal is a write-ahead log with ``synchronous=NORMAL``: a committed transaction has been handed to the
operating system, so that it outlives the process whichever way that ends. Only when the machine itself goes down may
the last transactions be missing; the file is whole then as well.

**Processes.** Any number on one machine may share a file. Their shared memory does not reach over a network: on a
network file system one machine at a time may use a cache, and a line is logged.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from fastscore.mounts import network_file_system
from fastscore.types import InputError

logger = logging.getLogger("fastscore")

SUFFIX = ".cache.sqlite"
"""What names of caches end in where nobody chooses another."""
FORMAT = 1
APPLICATION_ID = int.from_bytes(b"fsSC", "big")
BUSY_SECONDS = 60.0
"""How long another process's transaction is waited for; the longest takes about a second in ten million scores."""

CACHE_SIZE = "cache_size=-262144"
"""256 MB of memory at most, as much as the index of ten million scores has: with less, each of its pages is read and
written over and over (a third fewer look-ups and inserts a second)."""

Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class CacheAt:
    """Where scores are kept. One that was asked for must be usable; one that is there by default need not."""

    path: Path
    is_asked_for: bool = True


SCHEMA = (
    "CREATE TABLE models (id INTEGER PRIMARY KEY, fingerprint BLOB NOT NULL UNIQUE, about TEXT NOT NULL)",
    # What was scored, in the order in which it came. Ids are never used twice.
    "CREATE TABLE blocks (id INTEGER PRIMARY KEY AUTOINCREMENT, entries INTEGER NOT NULL, crc INTEGER NOT NULL, "
    "model INTEGER NOT NULL, created INTEGER NOT NULL, data BLOB NOT NULL)",
    # The index: half of a key, and where its entry is. It covers the blocks up to the one in `indexed`.
    "CREATE TABLE places (key INTEGER PRIMARY KEY, place INTEGER NOT NULL)",
    "CREATE TABLE indexed (block INTEGER NOT NULL)",
)
_MADE_BY_SQLITE = {
    ("index", "sqlite_autoindex_models_1", None),
    ("table", "sqlite_sequence", "CREATE TABLE sqlite_sequence(name,seq)"),
}


class _Empty(InputError):
    """A database without anything in it, as a run leaves that is killed while it makes a cache."""


class DamagedCache(Exception):
    """The file is no cache that this version can read; the message says why."""


def real_path(path: str | Path) -> Path:
    """Where a cache is or will be, links followed.

    Raises:
        InputError: no file can have that name.
    """
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be a file: {error}", path=str(path)) from error


def open_cache(path: Path) -> tuple[sqlite3.Connection, Identity]:
    """Open a cache, or make one. One that is damaged, or of another format, is set aside with a warning.

    A file that is no cache is not touched, unless its name ends in :data:`SUFFIX`.

    Raises:
        InputError: nothing can be kept under that name.
        OSError: the disk is full or failing.
    """
    _check_place(path)
    with folder_lock(path.parent):
        # Under the lock, so that no other process renames what is being looked at.
        try:
            connection = _open_sound(path)
        except DamagedCache as error:
            set_aside(path, identity_of(path), str(error))
            connection = _open_sound(path)
        found = identity_of(path)
    if (kind := network_file_system(path)) is not None:
        logger.warning("%s lies on a network file system (%s): use it from one machine at a time", path, kind)
    assert found is not None, "it has just been opened"
    return connection, found


def check_cache(path: Path) -> None:
    """See before a long run whether a cache can be opened or made; nothing is made or set aside.

    Raises:
        InputError: nothing can be kept under that name.
        OSError: the disk is failing.
    """
    _check_place(path)
    if not path.exists():
        if not os.access(path.parent, os.W_OK):
            raise InputError("cannot be written: no right to, or on a read-only disk", path=str(path))
    elif path.stat().st_size:
        with suppress(DamagedCache, _Empty):  # it is set aside, or made, when its turn comes
            _open_sound(path, create=False).close()


def open_existing(path: Path) -> sqlite3.Connection:
    """Open a cache that is there, and leave it as it is if it can't be used.

    Raises:
        InputError: no such file, no cache, damaged, or of another format.
    """
    _check_place(path)
    if not path.exists():
        raise InputError("no such file", path=str(path))
    try:
        connection = _open_sound(path, create=False)
    except DamagedCache as error:
        raise InputError(f"cannot be used: {error}", path=str(path)) from error
    return connection


def _open_sound(path: Path, create: bool = True) -> sqlite3.Connection:
    with sqlite_errors(path):
        # Whoever uses it from several threads sees to it that one waits for the other.
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        with sqlite_errors(path):
            _prepare(connection, path, create)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, create: bool) -> None:
    # In a damaged file a text may be no UTF-8.
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    try:
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON", CACHE_SIZE, "synchronous=NORMAL"):
            connection.execute(f"PRAGMA {pragma}")
        application, version = (_pragma(connection, name) for name in ("application_id", "user_version"))
        schema = set(connection.execute("SELECT type, name, sql FROM sqlite_master"))
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # SQLite's own message may quote what is no text
        if isinstance(error, sqlite3.Error) and not is_damage(error):
            raise
        raise _not_usable(path, path.name.endswith(SUFFIX), str(error)) from error
    is_empty = not application and not version and not schema
    if is_empty and not create:
        raise _Empty("is empty", path=str(path))
    if not is_empty:
        is_ours = application == APPLICATION_ID or path.name.endswith(SUFFIX)
        if application != APPLICATION_ID:
            raise _not_usable(path, is_ours, "it belongs to another program")
        if version != FORMAT:
            raise _not_usable(path, is_ours, f"it has format {version}, and this version of fastscore has {FORMAT}")
        if schema != _expected_schema():
            raise _not_usable(path, is_ours, "its tables are not those of a cache")
    if connection.execute("PRAGMA journal_mode=WAL").fetchone() != ("wal",):
        raise InputError("its file system can't hold a cache (no shared memory); choose another place", path=str(path))
    connection.execute("PRAGMA journal_size_limit=67108864")  # the log is cut back after a large transaction
    if create:
        with transaction(connection):  # also shows whether the file can be written
            if is_empty and not _pragma(connection, "user_version"):
                for statement in (*SCHEMA, "INSERT INTO indexed VALUES (0)"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version={FORMAT}")


def _expected_schema() -> set[tuple[str, str, str | None]]:
    return {("table", statement.split()[2], statement) for statement in SCHEMA} | _MADE_BY_SQLITE


def _not_usable(path: Path, is_ours: bool, reason: str) -> Exception:
    if is_ours:
        return DamagedCache(reason)
    return InputError(f"is not a cache of scores: {reason}; nothing is written there", path=str(path))


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    value: int = connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """One transaction that writes: all of it, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with suppress(sqlite3.Error):  # a failing disk: what went wrong first is told
                connection.execute("ROLLBACK")
        raise


def set_aside(path: Path, identity: Identity | None, reason: str) -> None:
    """Rename a cache to ``NAME.corrupt-N``, with its log; the caller holds :func:`folder_lock`.

    Nothing is done when the file is no longer the one with that identity: another process was faster.
    """
    if identity is None or identity_of(path) != identity:
        return
    aside = next(name for n in count(1) if not (name := path.with_name(f"{path.name}.corrupt-{n}")).exists())
    # The log first: left behind, SQLite would play it back into the next file of this name.
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    logger.warning("%s: %s; set aside as %s, and scores are computed again", path, reason, aside.name)


def identity_of(path: Path) -> Identity | None:
    """Which file has this name now; None when there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Held while a cache is opened or set aside. Of the folder, so that no lock file stays behind.

    Where there are no such locks (Windows, which can't rename open files anyway; some network file systems), two
    processes that set one file aside at the same moment are not kept apart.
    """
    descriptor = _locked(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(folder: Path) -> int | None:
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


_FULL, _BUSY = "database or disk is full", ("locked", "busy")
_READ_ONLY, _NOT_OPENED = "readonly database", "unable to open database file"
_DAMAGE = (
    *("malformed", "not a database", "corrupt", "unsupported file format", "no such table", "no such column"),
    *("string or blob too big", "constraint failed"),
)


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the content of the file is to blame. By SQLite's words: Python 3.10 does not give its codes."""
    return any(words in str(error) for words in _DAMAGE)


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as those of this room.

    Raises:
        DamagedCache: the file is no database, or a broken one.
        InputError: it cannot be opened or written, for want of rights.
        OSError: naming the file: the disk is full, another process holds it, or reading failed.
    """
    try:
        yield
    except UnicodeDecodeError as error:  # SQLite's own message quotes the file
        raise DamagedCache("malformed") from error
    except sqlite3.Error as error:
        message = str(error)
        if is_damage(error):
            raise DamagedCache(message) from error
        if _FULL in message:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if _READ_ONLY in message:
            raise InputError("cannot be written: it is read-only", path=str(path)) from error
        if _NOT_OPENED in message:
            raise InputError("cannot be written: no right to, or on a read-only disk", path=str(path)) from error
        if any(words in message for words in _BUSY):
            busy = f"another process has held it for {BUSY_SECONDS:.0f} seconds"
            raise OSError(errno.EBUSY, busy, str(path)) from error
        raise OSError(errno.EIO, message, str(path)) from error


def _check_place(path: Path) -> None:
    """Refuse what SQLite would say less clearly.

    The file itself is not opened here: closing it again would take away the locks that this process has on it.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise InputError("cannot be written: no such folder", path=str(path)) from None
        return
    except (OSError, ValueError) as error:  # no right to look, a name that the file system can't take
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot be written: {reason}", path=str(path)) from error
    if stat.S_ISDIR(mode):
        raise InputError("cannot be written: it is a directory", path=str(path))
    if not stat.S_ISREG(mode):
        raise InputError("cannot be written: it is not a regular file", path=str(path))
    if not os.access(path, os.W_OK):
        raise InputError("cannot be written: it is read-only", path=str(path))
