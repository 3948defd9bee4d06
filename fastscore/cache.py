"""Scores that survive: a store from what was asked of which model to what it answered, in one SQLite file.

Scores are appended as blocks (:mod:`fastscore.cache_blocks`), a transaction for each call, and an index says where each
one is. The newest blocks are indexed in memory only, and added to the file's index many at a time: keys are random, so
that each one added to a large index costs a page of its own, unless many are added in ascending order together. Whoever
opens the file reads the blocks that the index does not cover yet.

A score that comes out is a score that was put in: keys are compared in full (128 bits), blocks carry a CRC. What is
damaged is computed again.

Shapes: R requests, A answer tokens.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

from fastscore.cache_blocks import BLOCK_ENTRIES, Blocks, Bools, Entries, Floats, Row, pack, request_keys, unpack
from fastscore.cache_file import (
    DamagedCache,
    folder_lock,
    identity_of,
    open_cache,
    real_path,
    set_aside,
    sqlite_errors,
    transaction,
)
from fastscore.fingerprint import ScoreIdentity
from fastscore.garbage import collection_paused
from fastscore.ranges import Ints
from fastscore.types import AnswerScore, ScoringRequest

logger = logging.getLogger("fastscore")

INDEX_AT_ONCE = 1 << 17
"""Entries that are indexed in memory before they are added to the index together: about 20 MB."""
_GET_AT_ONCE = 8192
_PER_QUERY = 500
"""Values in one query, the number at which look-ups were fastest; SQLite before 3.32 takes 999."""

_LARGEST_ID = 1 << 58
"""What is larger is damage, and its places would not be numbers of 64 bits."""

T = TypeVar("T")


class ScoreCache:
    """The scores of one model, in a file that may hold those of many.

    Any number of threads, and of processes of one machine, may share the file. :meth:`keys` once for a window's
    requests, :meth:`get` for what is known of them, :meth:`put` for what has been computed, as soon as it has been:
    when it returns, the scores outlive the process. Of scores that are put twice, by two processes, one is kept.

    Raises:
        InputError: nothing can be kept under that name.
        OSError: the disk is full or failing, or another process holds the file for a minute. What was put before
            is kept.
    """

    def __init__(self, path: str | Path, identity: ScoreIdentity) -> None:
        self.path = real_path(path)
        self._fingerprint = identity.fingerprint()
        self._about = json.dumps(identity.about(), sort_keys=True)
        self._warned = False
        self._lock = threading.Lock()
        self._open()

    def _open(self) -> None:
        self._connection, self._file = open_cache(self.path)
        # Where the entries of the blocks from self._indexed to self._seen are, by the first half of their keys.
        self._newest: dict[int, int] = {}
        self._indexed = self._seen = 0

    def keys(self, requests: Iterable[ScoringRequest]) -> Ints:
        """What the requests are known by, ``[R, 2]``."""
        return request_keys(self._fingerprint, requests)

    def get(self, key_R2: Ints) -> list[AnswerScore | None]:
        """The scores under those keys, None where there is none."""
        scores: list[AnswerScore | None] = []
        for first in range(0, len(key_R2), _GET_AT_ONCE):  # so that a thread that puts need not wait for all of it
            some_R2 = key_R2[first : first + _GET_AT_ONCE]
            # Of the many objects that a look-up makes none can be garbage yet.
            with collection_paused():
                scores += self._with_whole_file(partial(self._get, some_R2))
        return scores

    def put(self, key_R2: Ints, logprob_A: Floats, length_R: Ints, is_greedy_R: Bools) -> None:
        """Keep scores: the log-probabilities of each answer's tokens, one answer after another, and their number.

        One in which not every log-probability is a number is never kept.
        """
        if not len(length_R):
            return
        entries = Entries(key_R2, logprob_A, length_R, is_greedy_R).storable()
        if len(entries):
            self._with_whole_file(lambda: self._put(entries))

    def close(self) -> None:
        """Let go of the file; everything in it has been written before."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> ScoreCache:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _with_whole_file(self, work: Callable[[], T]) -> T:
        """Work on the file of that name; when it turns out to be damaged, on a new one in its place."""
        with self._lock:
            return self._with_whole_file_alone(work)

    def _with_whole_file_alone(self, work: Callable[[], T]) -> T:
        if identity_of(self.path) != self._file:
            logger.warning("%s was moved or removed; going on with the file that is there now, or a new one", self.path)
            self._connection.close()
            self._open()
        try:
            with sqlite_errors(self.path):
                return work()
        except DamagedCache as error:
            self._connection.close()
            with folder_lock(self.path.parent):
                set_aside(self.path, self._file, str(error))
        self._open()
        with sqlite_errors(self.path):
            return work()

    def _get(self, key_R2: Ints) -> list[AnswerScore | None]:
        self._catch_up()
        place_R = self._places(key_R2[:, 0])
        numbers = np.unique(place_R[place_R >= 0] // BLOCK_ENTRIES)
        rows = list(chain.from_iterable(self._select(_BLOCKS_OF, numbers)))
        scores = self._unpack(rows).scores(place_R, key_R2)
        if self._newest:
            # A place that led nowhere (damage, or it was pruned) is forgotten, so that the score can be put again.
            for index in np.flatnonzero(place_R >= 0).tolist():
                if scores[index] is None:
                    self._newest.pop(int(key_R2[index, 0]), None)
        return scores

    def _places(self, key_R: Ints) -> Ints:
        """Where the entries with those half keys are, -1 for nowhere."""
        keys = key_R.tolist()
        found = {key: self._newest[key] for key in keys if key in self._newest}
        elsewhere = key_R[[key not in found for key in keys]] if found else key_R
        for rows in self._select(_PLACES_OF, np.sort(elsewhere)):
            found.update(rows)
        try:
            return np.array([found.get(key, -1) for key in keys], dtype=np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise DamagedCache("its index holds something else than numbers") from error

    def _select(self, query: str, values: Ints) -> Iterator[sqlite3.Cursor]:
        """The rows for ascending values, so many at a time."""
        wanted = values.tolist()
        for first in range(0, len(wanted), _PER_QUERY):
            some = wanted[first : first + _PER_QUERY]
            # Always as many as the query has places; one twice changes nothing.
            yield self._connection.execute(query, some + some[-1:] * (_PER_QUERY - len(some)))

    def _put(self, entries: Entries) -> None:
        created = int(time.time())
        with transaction(self._connection):
            last = self._catch_up()
            new = np.array([key not in self._newest for key in entries.key_E2[:, 0].tolist()])
            entries = entries.take(np.flatnonzero(new))
            execute = self._connection.execute
            # Looked up each time: `fastscore cache prune` may have removed it.
            execute("INSERT OR IGNORE INTO models (fingerprint, about) VALUES (?, ?)", (self._fingerprint, self._about))
            (model,) = _one(execute("SELECT id FROM models WHERE fingerprint = ?", (self._fingerprint,)), "models")
            first = last + 1
            self._connection.executemany(
                "INSERT INTO blocks (id, entries, crc, model, created, data) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (number, count, crc, model, created, data)
                    for number, (count, crc, data) in enumerate(pack(entries), start=first)
                ),
            )
        start = first * BLOCK_ENTRIES
        self._newest.update(zip(entries.key_E2[:, 0].tolist(), range(start, start + len(entries)), strict=True))
        self._seen = first - 1 + -(-len(entries) // BLOCK_ENTRIES)
        if len(self._newest) >= INDEX_AT_ONCE:
            self._index()

    def _catch_up(self) -> int:
        """Learn of what other processes have put and indexed (or what was put before, when the file is opened).

        Returns the largest id that a block has had.
        """
        indexed, last = _one(self._connection.execute(_STATE), "indexed")
        if type(indexed) is not int or type(last) is not int or not 0 <= indexed <= last < _LARGEST_ID:
            raise DamagedCache("it says that blocks are indexed which are not there")
        if indexed != self._indexed:
            end = (indexed + 1) * BLOCK_ENTRIES
            self._newest = {key: place for key, place in self._newest.items() if place >= end}
            self._indexed, self._seen = indexed, max(self._seen, indexed)
        # No further than was true at that moment: others may be writing.
        while rows := self._connection.execute(_BLOCKS_BETWEEN, (self._seen, last)).fetchall():
            blocks = self._unpack(rows)
            self._newest.update(blocks.places())
            self._seen = rows[-1][0]
        return last

    def _index(self) -> None:
        """Add what is indexed in memory to the index of the file."""
        with transaction(self._connection):
            self._catch_up()
            places = sorted(self._newest.items())
            self._connection.executemany("INSERT OR REPLACE INTO places VALUES (?, ?)", places)
            self._connection.execute("UPDATE indexed SET block = ?", (self._seen,))
        self._newest = {}
        self._indexed = self._seen

    def _unpack(self, rows: Sequence[Row]) -> Blocks:
        blocks, damaged = unpack(rows)
        if damaged and not self._warned:
            # A few wrong bytes in a score do no harm; but into a file whose structure is broken nothing can be put.
            (verdict,) = _one(self._connection.execute("PRAGMA quick_check(1)"), "blocks")
            if verdict != "ok":
                raise DamagedCache(verdict.splitlines()[-1])
            logger.warning("%s is damaged in places: those scores are computed again", self.path)
            self._warned = True
        return blocks


def _one(rows: sqlite3.Cursor, table: str) -> tuple:
    row: tuple | None = rows.fetchone()
    if row is None:
        raise DamagedCache(f"a row is missing from its table {table}")
    return row


def _in(query: str) -> str:
    return f"{query} IN ({', '.join('?' * _PER_QUERY)})"


_BLOCK = "SELECT id, entries, crc, data FROM blocks WHERE id"
_BLOCKS_OF = f"{_in(_BLOCK)} ORDER BY id"
_BLOCKS_BETWEEN = f"{_BLOCK} > ? AND id <= ? ORDER BY id LIMIT {_PER_QUERY}"
_PLACES_OF = _in("SELECT key, place FROM places WHERE key")
_STATE = "SELECT block, coalesce((SELECT max(seq) FROM sqlite_sequence WHERE name = 'blocks'), 0) FROM indexed"
