"""Rows cut into blocks for several workers: pairs that share a prefix stay together, and all workers end together."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fastscore.config import TaskConfig
from fastscore.row_parts import CHARS_PER_TOKEN, Prompt, RowParts, SplitRow, prompt_size, split_row
from fastscore.tokenization import common_length
from fastscore.types import Row

MAX_BLOCK_TOKENS = 1_000_000
"""Small enough to be done again by another worker. What its pairs share counts once."""
MIN_BLOCK_TOKENS = 2_000
"""A smaller one would fill no pack; a worker waits for the others no longer than one takes."""
MAX_DEPTH = 200
"""Brackets within brackets; pickle, which sends rows, takes a few hundred."""
_NEAR = 32
"""Most neighbours differ so soon, or are the same for long."""
_EARLIEST_CUT = 0.75
"""A block ends between this part of its size and the whole of it, where it shares least with what follows."""
_COMPUTED_TWICE = 1 / 16
"""It goes on when it would share more than this part of itself, since another worker would compute that again; unless
workers would have nothing to do meanwhile."""
_READ_AHEAD = 1.5
"""In windows: so that what is left for the last is not little, and is dealt in time."""


@dataclass(frozen=True, slots=True)
class Block:
    """Parts of rows that one worker scores; ``index`` counts the blocks of a job from 0."""

    index: int
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class Cut:
    """What is going to be a block: of each part the place of its row in the window, and which of its parts it is."""

    places: Sequence[int]
    parts: Sequence[int]


@dataclass(frozen=True, slots=True)
class CutWindow:
    """Neighbouring rows, and their pairs in blocks. A row may be in several of them, a candidate is in one."""

    rows: Sequence[RowParts]
    cuts: Sequence[Cut]


def cut_windows(rows: Iterable[Row], config: TaskConfig, workers: int, max_tokens: int) -> Iterator[CutWindow]:
    """The rows in windows of ``max_tokens``, or of a block for each worker where that is more; each cut into blocks.

    The pairs of a window are sorted by their prompts, so that neighbours share what can be shared, and cut where they
    share little: a prefix is computed by one worker, wherever in the window its rows stand. A block has a
    ``2 * workers``-th of the window, and in the last one of what is left of it, so that all workers end together
    (guided self-scheduling, Polychronopoulos and Kuck, 1987; one worker has nobody to end together with, and takes
    all). It has at least :data:`MIN_BLOCK_TOKENS` and at most :data:`MAX_BLOCK_TOKENS`, where what its pairs share
    counts once, and its texts at most ``max_tokens``, a worker's own window. Tokens are guessed from texts' length. The
    last window may be half as large as others, or half as large again.

    Raises:
        InputError: a row can't be sent to another process.
    """
    wanted = max(max_tokens, workers * min(max_tokens, MAX_BLOCK_TOKENS)) * CHARS_PER_TOKEN
    ahead, sizes, total = deque[SplitRow](), deque[int](), 0
    for row in rows:
        split = split_row(row, config)
        ahead.append(split)
        sizes.append(max(text_size(row, is_sent=split.parts.count == 1), _size_of_all(split)))
        total += sizes[-1]
        while total >= wanted * _READ_AHEAD and len(ahead) > 1:  # one is left, which may be the last
            count, size = 0, 0
            while count < len(sizes) - 1 and (not count or size + sizes[count] <= wanted):
                size += sizes[count]
                count += 1
            for _ in range(count):
                sizes.popleft()
            total -= size
            yield _cut([ahead.popleft() for _ in range(count)], workers, max_tokens, is_last=False)
    if ahead:
        last = [ahead.popleft() for _ in range(len(ahead))]
        yield _cut(last, workers, max_tokens, is_last=True)


def text_size(row: Row, is_sent: bool = True) -> int:
    """Characters of all texts in it. A token id counts as a token's worth of them.

    Raises:
        InputError: it ``is_sent`` to another process as it is, and nested too deep for that.
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
            if is_sent:
                raise row.error(f"nested more than {MAX_DEPTH} deep: it can't be sent to another process")
            break
        level, depth = inner, depth + 1
    return size


def _size_of_all(row: SplitRow) -> int:
    """Characters of all its prompts, which have its query each, and of all its answers."""
    return sum(map(prompt_size, row.prompts)) + len(row.prompts) * row.answers_size


class _Order:
    """The parts of a window, sorted by their prompts.

    whole: of each, all its characters; shared: those of them that the one before begins with.
    """

    def __init__(self, rows: Sequence[SplitRow]) -> None:
        places = [place for place, row in enumerate(rows) for _ in row.prompts]
        parts = [part for row in rows for part in range(len(row.prompts))]
        prompts = [prompt for row in rows for prompt in row.prompts]
        # Texts and token ids have no order between them.
        kinds = [[i for i, prompt in enumerate(prompts) if isinstance(prompt, kind)] for kind in (str, tuple)]
        order = [i for kind in kinds for i in sorted(kind, key=prompts.__getitem__)]
        self.places = [places[i] for i in order]
        self.parts = [parts[i] for i in order]
        self.shared = [0, *(_shared(prompts[before], prompts[after]) for before, after in pairwise(order))]
        answers = [row.answers_size for row in rows]
        self.whole = [prompt_size(prompts[i]) + answers[places[i]] for i in order]

    def end_of_block(self, start: int, wanted: int, enough: float, most: int) -> int:
        """Where a block ends that begins at ``start``: where least is shared with what follows, at the latest of
        several such places.

        wanted: characters that are not shared within the block. enough: of those that nobody else has, after which it
        ends in any case. most: of all its texts.
        """
        best, least_shared = 0, -1
        size, whole = self.shared[start], 0  # the first has nobody to share with
        for stop in range(start + 1, len(self.whole)):
            whole += self.whole[stop - 1]
            size += self.whole[stop - 1] - self.shared[stop - 1]
            shared = self.shared[stop]
            must_end = whole >= most * _EARLIEST_CUT or (size - self.shared[start] >= enough and size >= 2 * shared)
            may_end = size >= wanted * _EARLIEST_CUT and shared <= size * _COMPUTED_TWICE
            if (may_end or must_end) and (least_shared < 0 or shared <= least_shared):
                best, least_shared = stop, shared
            if best and (size >= wanted or whole >= most):
                return best
        return len(self.whole)


def _cut(rows: Sequence[SplitRow], workers: int, max_tokens: int, is_last: bool) -> CutWindow:
    """A window in blocks: each a ``2 * workers``-th of it, or of what is left."""
    order = _Order(rows)
    left = sum(order.whole) - sum(order.shared)
    least, most = (CHARS_PER_TOKEN * min(max_tokens, size) for size in (MIN_BLOCK_TOKENS, MAX_BLOCK_TOKENS))
    enough = left / workers if workers > 1 else math.inf
    shares = 2 * workers if workers > 1 else 1
    found, start = [], 0
    while start < len(order.whole):
        wanted = max(least, min(most, left // shares))
        stop = order.end_of_block(start, wanted, max(wanted, enough), max_tokens * CHARS_PER_TOKEN)
        if is_last:
            left -= sum(order.whole[start:stop]) - sum(order.shared[start:stop])
        found.append(Cut(order.places[start:stop], order.parts[start:stop]))
        start = stop
    return CutWindow([row.parts for row in rows], found)


def _shared(before: Prompt, after: Prompt) -> int:
    """How much of the prompt is what the one before begins with, in characters."""
    if type(before) is not type(after):
        return 0
    length = common_length(before[:_NEAR], after[:_NEAR])
    if length == _NEAR:
        length = common_length(before, after)
    return length if isinstance(after, str) else CHARS_PER_TOKEN * length
