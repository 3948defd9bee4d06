"""A row in parts, one for each candidate: what the processes that score may share out among them.

A part is a row too, with fewer candidates; which of the whole row's pairs it stands for is said by its ``numbers``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastscore.config import TaskConfig
from fastscore.tasks import RowPlan, plan_row
from fastscore.types import InputError, Row

CHARS_PER_TOKEN = 4
"""A guess, and only for sizes: text is tokenised by whoever scores it."""
_TEXT_FIELDS, _TOKEN_FIELDS = ("pos", "neg"), ("pos", "neg", "score_inputs")

Prompt = str | tuple[int, ...]


@dataclass(slots=True)
class RowParts:
    """A row and its parts: pairs that have one prompt.

    prompts: of each part, as far as it is known without a tokenizer: candidates are not truncated, and a chat template
        is not yet there. They tell which parts share a beginning.
    answers_size: characters of the answers of each part. A token id counts as a token's worth of them.
    """

    row: Row
    prompts: Sequence[Prompt]
    answers_size: int
    _candidates: Sequence[Any] = ()
    _field: str = ""
    _kept: dict[str, Any] = field(default_factory=dict)
    _num_answers: int = 0
    _num_baselines: int = 0

    def part(self, index: int) -> Row:
        """The part of that number; the row itself where it is the only one. The first has the row's baseline."""
        if not self._candidates:
            return self.row
        count = self._num_answers
        numbers = range(index * count, (index + 1) * count)
        end = len(self._candidates) * count
        of_row = (*numbers, *range(end, end + (self._num_baselines if index == 0 else 0)))
        data = {**self._kept, self._field: [self._candidates[index]]}
        return Row(data, self.row.path, self.row.line, of_row)


def split_row(row: Row, config: TaskConfig) -> RowParts:
    """The parts of a row, in the order of its pairs.

    Rows whose pairs have one prompt are one part, and so are those that can't be scored: whoever scores them says why.
    """
    try:
        plan = plan_row(row, config)
    except InputError:
        return RowParts(row, [""], 0)
    if plan.preference is not None:
        answers = (plan.preference.chosen, plan.preference.rejected)
        return RowParts(row, [_text(plan.preference.prompt)], sum(len(_text(answer)) for answer in answers))
    pairs = plan.build(plan.keys)
    size = sum(prompt_size(pair.answer) for pair in pairs)
    if plan.conversation is not None:
        return RowParts(row, [_text(plan.conversation)], size)
    if plan.candidate_field is None or plan.num_candidates == 1:
        return RowParts(row, [pairs[0].prompt], size)
    prompts = [pair.prompt for pair in pairs[: plan.num_candidates * plan.num_answers : plan.num_answers]]
    return RowParts(
        row,
        prompts,
        size // plan.num_candidates,
        plan.keys or row.data[plan.candidate_field],
        plan.candidate_field,
        _without_candidates(row, plan),
        plan.num_answers,
        plan.num_baselines,
    )


def prompt_size(text: Prompt) -> int:
    """In characters."""
    return len(text) if isinstance(text, str) else CHARS_PER_TOKEN * len(text)


def _text(said: Any) -> str:
    """A text, or what stands for a conversation: those that begin alike have a beginning in common."""
    return said if isinstance(said, str) else json.dumps(said, default=str)


def _without_candidates(row: Row, plan: RowPlan) -> dict[str, Any]:
    """What all parts of a row have: not the field that a template reads as a text beside the candidates."""
    left_out = {"pos": _TEXT_FIELDS, "score_inputs": _TOKEN_FIELDS}.get(plan.candidate_field or "", ())
    return {name: value for name, value in row.data.items() if name not in left_out}
