"""A stream of rows in blocks: neighbours that share prefixes stay together, and several workers end together."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastscore.config import TaskConfig
from fastscore.tasks import expand_row, make_task
from fastscore.tokenization import common_length
from fastscore.types import InputError, Row

CHARS_PER_TOKEN = 4
"""A guess, and only for sizes: text is tokenised by whoever scores it."""
MAX_BLOCK_TOKENS = 1_000_000
"""Large enough that what neighbouring blocks both compute is nothing; small enough to be done again."""
MIN_BLOCK_TOKENS = 4_000
"""A smaller one would not fill a pack."""
MAX_DEPTH = 200
"""Brackets within brackets; pickle, which sends rows, takes a few hundred."""
_LATEST_CUT, _EARLIEST_CUT = 1.0, 0.75
"""A block ends between these parts of its size, where its rows share least with those that follow."""


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring rows; ``index`` counts the blocks of a job from 0."""

    index: int
    rows: list[Row]


def cut_blocks(rows: Iterable[Row], config: TaskConfig, workers: int, max_tokens: int) -> Iterator[Block]:
    """The rows in blocks: large ones first, and towards the end smaller ones, so that all workers end together.

    A block is a ``2 * workers``-th of what is known to be left (guided self-scheduling, Polychronopoulos and Kuck,
    1987; one worker has nobody to end together with, and takes all of it), at least :data:`MIN_BLOCK_TOKENS` and at
    most :data:`MAX_BLOCK_TOKENS` or ``max_tokens`` by a guess from the length of its texts; that many rows are read
    ahead. It ends where rows share little with those after them.
    """
    most = min(max_tokens, MAX_BLOCK_TOKENS) * CHARS_PER_TOKEN
    least = min(most, MIN_BLOCK_TOKENS * CHARS_PER_TOKEN)
    source, ahead, sizes, total = iter(rows), deque[Row](), deque[int](), 0
    index = 0
    while True:
        while total < 2 * workers * most and (row := next(source, None)) is not None:
            ahead.append(row)
            sizes.append(text_size(row))
            total += sizes[-1]
        if not ahead:
            return
        parts = 2 * workers if workers > 1 else 1
        count = _rows_of_block(ahead, sizes, max(least, min(most, total // parts)), config)
        total -= sum(sizes.popleft() for _ in range(count))
        yield Block(index, [ahead.popleft() for _ in range(count)])
        index += 1


def text_size(row: Row) -> int:
    """Characters of all texts in it. A token id counts as a token's worth of them.

    Raises:
        InputError: it is nested too deep to be sent to another process.
    """
    size, depth = 0, 0
    level: list[object] = [row.data]
    while level:
        inner: list[object] = []
        for value in level:
            if isinstance(value, str):
                size += len(value)
            elif isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                if value and isinstance(value[0], int):
                    size += CHARS_PER_TOKEN * len(value)
                else:
                    inner.extend(value)
        if inner and depth == MAX_DEPTH:
            raise row.error(f"nested more than {MAX_DEPTH} deep: it can't be sent to another process")
        level, depth = inner, depth + 1
    return size


def _rows_of_block(rows: Sequence[Row], sizes: Iterable[int], wanted: int, config: TaskConfig) -> int:
    """How many rows make a block of that size: the cut at which least is shared, the latest of several."""
    best, least_shared, size = len(rows), -1, 0
    before: list[Any] | None = None
    for count, row_size in enumerate(sizes, start=1):
        size += row_size
        if count == len(rows):
            # All that is left: one block, unless it was to be smaller.
            return count if size <= wanted * _LATEST_CUT or least_shared < 0 else best
        if size < wanted * _EARLIEST_CUT:
            continue
        before = _prompts(rows[count - 1], config) if before is None else before
        after = _prompts(rows[count], config)
        shared = shared_size(before, after)
        if least_shared < 0 or shared <= least_shared:
            best, least_shared = count, shared
        before = after
        if size >= wanted * _LATEST_CUT:
            return best
    return best


def _prompts(row: Row, config: TaskConfig) -> list[Any]:
    """The row's prompts in their order of sorting, without a chat template, which adds the same to all. Of a bad row
    none; nor of preferences, which only a tokenizer expands."""
    try:
        if make_task(config, row).name == "preference":
            return []
        pairs = expand_row(row, replace(config, chat_template=False, system_prompt=None), lambda keys: keys).pairs
    except InputError:
        return []
    return sorted({pair.prompt for pair in pairs})  # type: ignore[type-var]


def shared_size(before: Sequence[Any], after: Sequence[Any]) -> int:
    """How much of the prompts ``after`` is a beginning of one ``before``: characters (or tokens); both are sorted."""
    shared = 0
    for prompt in after:
        if not before or type(before[0]) is not type(prompt):
            continue
        place = bisect.bisect_left(before, prompt)
        # Whatever shares most with it stands next to it.
        shared += max(common_length(other, prompt) for other in before[max(0, place - 1) : place + 1])
    return shared
