"""Blocks dealt out to workers, and what comes of them put together: rows, in their order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from fastscore.aggregate import Scores, scored_row
from fastscore.block_scores import BlockScores
from fastscore.blocks import Block, Cut, CutWindow
from fastscore.config import TaskConfig
from fastscore.row_parts import RowParts
from fastscore.types import InputError, Row, RowPairs, ScoredRow
from fastscore.windows import OnBadRow

OPEN_WINDOWS = 2
"""Whose rows are not all written: while the last blocks of one are scored, those of the next are dealt."""


@dataclass(frozen=True, slots=True)
class FinishedRow:
    """A row all of whose pairs have been scored, or that is bad (``error``)."""

    row: Row
    pairs: RowPairs | None = None
    scores: Scores = ()
    error: InputError | None = None


@dataclass(slots=True)
class _OpenRow:
    """A row of which something may still be missing."""

    parts: RowParts
    missing: int
    found: list[tuple[tuple[int, ...], RowPairs, Scores]] = field(default_factory=list)
    errors: list[tuple[int, InputError]] = field(default_factory=list)

    def finished(self) -> FinishedRow:
        """The row, when nothing is missing."""
        if self.errors:
            return FinishedRow(self.parts.row, error=min(self.errors, key=lambda error: error[0])[1])
        by_number = {
            number: (pair, score)
            for numbers, pairs, scores in self.found
            for number, pair, score in zip(numbers, pairs.pairs, scores, strict=True)
        }
        pair_of, score_of = zip(*(by_number[number] for number in sorted(by_number)), strict=True)
        candidates = sum(pairs.num_candidates for _, pairs, _ in self.found)
        whole = replace(self.found[0][1], row=self.parts.row, pairs=pair_of, num_candidates=candidates)
        return FinishedRow(self.parts.row, whole, score_of)


def hand_on(
    rows: Iterator[FinishedRow], config: TaskConfig, on_bad_row: OnBadRow | None, reading: threading.Lock
) -> Iterator[ScoredRow]:
    """The rows with what they are given; of bad ones it is told while the lock is held."""
    for row in rows:
        if row.pairs is not None:
            yield scored_row(row.pairs, row.scores, config)
        elif row.error is not None and on_bad_row is not None:
            with reading:
                on_bad_row(row.row, row.error)


class Dealt:
    """Blocks that are with a worker or wait for their turn, and rows that wait for the rest of their scores.

    Not for several threads at once. ``is_ready`` says whether the next of the ``windows`` is there without waiting.
    """

    def __init__(self, windows: Iterator[CutWindow], is_ready: Callable[[], bool] = lambda: True) -> None:
        self._windows = windows
        self._is_ready = is_ready
        self._failure: Exception | None = None
        self._undealt: deque[tuple[Sequence[_OpenRow], Cut]] = deque()
        self._rows: deque[deque[_OpenRow]] = deque()
        self._blocks: dict[int, tuple[Sequence[_OpenRow], Sequence[Row]]] = {}
        self._results: deque[BlockScores] = deque()
        self._count = 0
        self._exhausted = False

    @property
    def is_exhausted(self) -> bool:
        """Whether all blocks have been dealt, and the end has been met by one more claim."""
        return self._exhausted

    @property
    def is_done(self) -> bool:
        """Nothing is left to be dealt, waited for or taken."""
        return self._exhausted and not self._rows and not self._results

    @property
    def may_claim(self) -> bool:
        """Whether there may be another block, nobody has to wait for it, and so few rows before it are unwritten that
        memory stays bounded."""
        if self._undealt:
            return True
        return not self._exhausted and len(self._rows) < OPEN_WINDOWS and self._is_ready()

    def claim(self) -> Block | None:
        """The next block, where there may be one.

        Raises:
            Exception: what reading the rows raised; again each time.
        """
        if self._failure is not None:
            raise self._failure
        if not self.may_claim:
            return None
        if not self._undealt:
            try:
                window = next(self._windows, None)
            except Exception as error:
                self._failure = error
                raise
            if window is None:
                self._exhausted = True
                return None
            self._open(window)
        of_window, cut = self._undealt.popleft()
        rows = [of_window[place] for place in cut.places]
        block = Block(self._count, [row.parts.part(part) for row, part in zip(rows, cut.parts, strict=True)])
        self._blocks[block.index] = rows, block.rows
        self._count += 1
        return block

    def _open(self, window: CutWindow) -> None:
        rows = [_OpenRow(parts, parts.count) for parts in window.rows]
        self._undealt.extend((rows, cut) for cut in window.cuts)
        self._rows.append(deque(rows))

    def finish(self, result: BlockScores) -> bool:
        """Take what came of a block; False for one that was done twice, which counts once."""
        if result.index not in self._blocks:
            return False
        rows, parts = self._blocks.pop(result.index)
        self._results.append(result)
        told = len(result.scored) + len(result.bad)
        assert result.error is not None or told == len(rows), "a block that has ended tells of all its rows"
        for place, pairs, scores in result.scored:
            numbers = parts[place].numbers or tuple(range(len(scores)))
            rows[place].found.append((numbers, pairs, scores))
            rows[place].missing -= 1
        for place, error in result.bad:
            rows[place].errors.append(((parts[place].numbers or (0,))[0], error))
            rows[place].missing -= 1
        return True

    def next_result(self) -> BlockScores | None:
        """What came of a block, each once, in the order in which they came."""
        return self._results.popleft() if self._results else None

    def next_row(self) -> FinishedRow | None:
        """The row whose turn it is, when nothing of it is missing."""
        while self._rows and not self._rows[0]:
            self._rows.popleft()
        if not self._rows or self._rows[0][0].missing:
            return None
        row = self._rows[0].popleft().finished()
        if not self._rows[0]:
            self._rows.popleft()
        return row
