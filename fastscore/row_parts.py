"""A row in parts, one for each candidate: what the processes that score may share out among them.

A part is a row too, with fewer candidates; which of the whole row's pairs it stands for is said by its ``numbers``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastscore.config import TaskConfig
from fastscore.tasks import plan_row
from fastscore.types import InputError, Row

CHARS_PER_TOKEN = 4
"""A guess, and only for sizes: text is tokenised by whoever scores it."""

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowParts:
    """A row and its ``count`` parts: pairs that have one prompt."""

    row: Row
    count: int = 1
    _candidates: Sequence[Any] = ()
    _field: str = ""
    _read: dict[str, Any] = field(default_factory=dict)
    _num_answers: int = 0
    _num_baselines: int = 0

    def part(self, index: int) -> Row:
        """The part of that number; the row itself where it is the only one. The last has the row's baseline."""
        if self.count == 1:
            return self.row
        start, stop, end = (place * self._num_answers for place in (index, index + 1, self.count))
        baselines = range(end, end + (self._num_baselines if stop == end else 0))
        data = {**self._read, self._field: [self._candidates[index]]}
        return Row(data, self.row.path, self.row.line, (*range(start, stop), *baselines))


@dataclass(frozen=True, slots=True)
class SplitRow:
    """A row's parts, with what tells which of them share a beginning; nobody needs that once they are dealt.

    prompts: as far as they are known without a tokenizer: candidates are not truncated, and a chat template is not yet
        there.
    answers_size: characters of the answers of each part. A token id counts as a token's worth of them.
    """

    parts: RowParts
    prompts: Sequence[Prompt]
    answers_size: int


def split_row(row: Row, config: TaskConfig) -> SplitRow:
    """The parts of a row, in the order of its pairs.

    Rows whose pairs have one prompt are one part, and so are those that can't be scored: whoever scores them says why.
    """
    try:
        plan = plan_row(row, config)
    except InputError:
        return SplitRow(RowParts(row), [""], 0)
    if plan.preference is not None:
        answers = (plan.preference.chosen, plan.preference.rejected)
        return SplitRow(RowParts(row), [_text(plan.preference.prompt)], sum(len(_text(answer)) for answer in answers))
    pairs = plan.build(plan.keys)
    size = sum(prompt_size(pair.answer) for pair in pairs)
    if plan.conversation is not None:
        return SplitRow(RowParts(row), [_text(plan.conversation)], size)
    if plan.candidate_field is None or plan.num_candidates == 1:
        return SplitRow(RowParts(row), [pairs[0].prompt], size)
    prompts = [pair.prompt for pair in pairs[: plan.num_candidates * plan.num_answers : plan.num_answers]]
    candidates = plan.keys or row.data[plan.candidate_field]
    read = {name: row.data[name] for name in plan.read_fields if name in row.data}
    count = plan.num_candidates
    parts = RowParts(row, count, candidates, plan.candidate_field, read, plan.num_answers, plan.num_baselines)
    return SplitRow(parts, prompts, size // count)


def prompt_size(text: Prompt) -> int:
    """In characters."""
    return len(text) if isinstance(text, str) else CHARS_PER_TOKEN * len(text)


def _text(said: Any) -> str:
    """A text, or what stands for a conversation: those that begin alike have a beginning in common."""
    return said if isinstance(said, str) else json.dumps(said, default=str)
