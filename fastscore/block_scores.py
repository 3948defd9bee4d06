"""Blocks of pairs through a scorer somewhere else, and what comes of them, fit to travel."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from fastscore.blocks import Block
from fastscore.cache_file import CacheAt
from fastscore.config import ScorerConfig, TaskConfig
from fastscore.run_stats import RunStats
from fastscore.types import AnswerScore, InputError, Pair, Row, RowPairs

_NO_ROW = Row({})


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

    scored, bad: by position in the block. Of pairs only what a score's definition asks for: not their prompts.
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
    scored: list[tuple[int, RowPairs, tuple[AnswerScore, ...]]] = field(default_factory=list)
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
    except Exception as error:  # noqa: BLE001 - raised where the results are put together
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

    for pairs, scores in scorer.stream_scores(
        block.rows,
        job.task_config,
        on_bad_row=on_bad_row if job.skip_bad_rows else None,
        on_progress=count,
        cache=cache,
    ):
        result.scored.append((position[id(pairs.row)], without_texts(pairs), scores))
    scorer.stats.flush_padded()
    result.stats = scorer.stats.minus(before)
    result.description = scorer.describe()
    result.ended = time.time()


def without_texts(pairs: RowPairs) -> RowPairs:
    """Without what whoever dealt the block has still, and nobody asks for."""
    light = tuple(Pair("", pair.answer, pair.is_chat) for pair in pairs.pairs)
    return RowPairs(_NO_ROW, light, pairs.num_candidates, pairs.num_answers, pairs.summed)


def sendable(result: BlockScores) -> BlockScores:
    """The result, fit to travel."""
    return result if result.error is None else replace(result, error=sendable_error(result.error))


def sendable_error(error: Exception) -> Exception:
    """Errors of other packages may be of any kind and hold anything: they travel as text."""
    if type(error) is InputError:
        return error
    first_line = next(iter(str(error).strip().splitlines()), "")
    return RuntimeError(first_line if type(error) is RuntimeError else f"{type(error).__name__}: {first_line}")
