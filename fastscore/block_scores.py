"""Blocks of rows through a scorer somewhere else, and what comes of them put together in the order of the rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastscore.blocks import Block
from fastscore.cache_file import CacheAt
from fastscore.config import ScorerConfig, TaskConfig
from fastscore.run_stats import RunStats
from fastscore.types import InputError, Row, ScoredRow


@dataclass(frozen=True, slots=True)
class Job:
    """What a scorer needs to know beside the rows."""

    scorer_config: ScorerConfig
    task_config: TaskConfig
    skip_bad_rows: bool
    cache: CacheAt | None = None


@dataclass(slots=True)
class BlockScores:
    """What came of a block, without the data of its rows, which whoever dealt it still has.

    scored, bad: by position in the block.
    error: why the block could not be scored to its end.
    worker: names the scorer.
    tries: how often the block was begun.
    cache_trouble: why a worker goes without a cache.
    began, ended: seconds since the epoch by the worker's clock; a block begins with its first batch, and not with
        loading a model. 0 where nothing was scored.
    """

    index: int
    worker: str
    tries: int = 1
    cache_trouble: str | None = None
    scored: list[tuple[int, ScoredRow]] = field(default_factory=list)
    bad: list[tuple[int, InputError]] = field(default_factory=list)
    stats: RunStats = field(default_factory=RunStats)
    error: Exception | None = None
    description: dict[str, Any] = field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0


def score_block(scorer: Any, cache: Any, job: Job, block: Block, on_progress: Any) -> BlockScores:
    """A block through a scorer and its cache; what goes wrong is part of what comes of it."""
    result = BlockScores(block.index, "")
    try:
        _score(scorer, cache, job, block, on_progress, result)
    except Exception as error:  # noqa: BLE001 - raised where the results are put together, in the order of the rows
        result.error = error
    return result


def _score(scorer: Any, cache: Any, job: Job, block: Block, on_progress: Any, result: BlockScores) -> None:
    position = {id(row): place for place, row in enumerate(block.rows)}
    before = replace(scorer.stats)

    def on_bad_row(row: Row, error: InputError) -> None:
        result.bad.append((position[id(row)], error))

    def count(stats: RunStats) -> None:
        done = stats.minus(before)
        result.began = result.began or time.time() - done.seconds
        on_progress(done)

    for scored in scorer.stream_rows(
        block.rows,
        job.task_config,
        on_bad_row=on_bad_row if job.skip_bad_rows else None,
        on_progress=count,
        cache=cache,
    ):
        place = position[id(scored.row)]
        result.scored.append((place, replace(scored, row=replace(scored.row, data={}))))
    scorer.stats.flush_padded()
    result.stats = scorer.stats.minus(before)
    result.description = scorer.describe()
    result.ended = time.time()


def sendable(result: BlockScores) -> BlockScores:
    """The result, fit to travel."""
    return result if result.error is None else replace(result, error=sendable_error(result.error))


def sendable_error(error: Exception) -> Exception:
    """Errors of other packages may be of any kind and hold anything: they travel as text."""
    if type(error) is InputError:
        return error
    first_line = next(iter(str(error).strip().splitlines()), "")
    return RuntimeError(first_line if type(error) is RuntimeError else f"{type(error).__name__}: {first_line}")


class Dealt:
    """Blocks that are with a worker or wait for their turn, and their results put together in the order of the rows.

    Not for several threads at once.
    """

    def __init__(self, blocks: Iterator[Block], limit: int) -> None:
        self._blocks = blocks
        self._limit = limit
        self._open: dict[int, Block] = {}
        self._results: dict[int, BlockScores] = {}
        self._turn = 0
        self._exhausted = False

    @property
    def is_exhausted(self) -> bool:
        """Whether all blocks have been dealt."""
        return self._exhausted

    @property
    def is_done(self) -> bool:
        """Nothing is left to be dealt or waited for."""
        return self._exhausted and not self._open

    @property
    def may_claim(self) -> bool:
        """Whether there may be another block, and so few before it are unfinished that memory stays bounded."""
        return not self._exhausted and len(self._open) < self._limit

    def claim(self) -> Block | None:
        """The next block, where there may be one."""
        if not self.may_claim:
            return None
        block = next(self._blocks, None)
        if block is None:
            self._exhausted = True
            return None
        self._open[block.index] = block
        return block

    def finish(self, result: BlockScores) -> None:
        """Take what came of a block; one that was done twice counts once."""
        if result.index in self._open:
            self._results.setdefault(result.index, result)

    def next_finished(self) -> tuple[Block, BlockScores] | None:
        """The block whose turn it is, when its result has come."""
        result = self._results.pop(self._turn, None)
        if result is None:
            return None
        self._turn += 1
        return self._open.pop(result.index), result


def hand_on_bad(block: Block, result: BlockScores, on_bad_row: Any) -> None:
    """Tell of the bad rows of a block."""
    for place, error in result.bad:
        on_bad_row(block.rows[place], error)


def scored_rows(block: Block, result: BlockScores) -> Iterator[ScoredRow]:
    """The scored rows of a block.

    Raises:
        Exception: what ended the block; rows before it come first.
    """
    for place, scored in result.scored:
        yield replace(scored, row=block.rows[place])
    if result.error is not None:
        raise result.error
