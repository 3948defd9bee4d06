"""A stream of rows in windows: tokenised a small portion at a time, scored a large one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

from fastscore.chat import ChatTemplate
from fastscore.config import TaskConfig
from fastscore.tasks import RowPlan, expand_plan, plan_row
from fastscore.tokenization import PairTokenizer
from fastscore.types import InputError, Row, RowPairs, ScoringRequest

TOKENISED_PAIRS = 256
"""Pairs handed to the tokenizer at a time: enough for its threads, and soon done when the run is interrupted."""

OnBadRow = Callable[[Row, InputError], None]
Planned: TypeAlias = tuple[Row, RowPlan | InputError]
"""A row and what was found in it, or what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Window:
    """Rows that are scored together, and the requests of all their pairs, row by row."""

    rows: list[RowPairs] = field(default_factory=list)
    requests: list[ScoringRequest] = field(default_factory=list)

    def place(self, index: int) -> str:
        """Where in the input the request of that index came from.

        Raises:
            IndexError: there are fewer requests.
        """
        for row_pairs in self.rows:
            if index < len(row_pairs.pairs):
                return row_pairs.place(index)
            index -= len(row_pairs.pairs)
        raise IndexError(index)


def read_windows(
    rows: Iterable[Row],
    config: TaskConfig,
    tokenizer: PairTokenizer,
    max_tokens: int,
    on_bad_row: OnBadRow | None = None,
) -> Iterator[Window]:
    """Rows until their requests have ``max_tokens`` tokens.

    A bad row raises, or is handed to ``on_bad_row`` and left out.
    """
    window, size = Window(), 0
    for row_pairs, requests in _encoded(rows, config, tokenizer, on_bad_row):
        window.rows.append(row_pairs)
        window.requests.extend(requests)
        size += sum(len(request.token_ids) for request in requests)
        if size >= max_tokens:
            yield window
            window, size = Window(), 0
    if window.rows:
        yield window


def _encoded(
    rows: Iterable[Row], config: TaskConfig, tokenizer: PairTokenizer, on_bad_row: OnBadRow | None
) -> Iterator[tuple[RowPairs, list[ScoringRequest]]]:
    """Rows with the requests of their pairs, tokenised many at a time."""
    chat = ChatTemplate(tokenizer.tokenizer, config.system_prompt)
    for portion in _portions(_planned(rows, config), TOKENISED_PAIRS):
        expanded = list(_expanded(portion, config, tokenizer, chat))
        pairs = [pair for _, found in expanded if isinstance(found, RowPairs) for pair in found.pairs]
        encoded = iter(tokenizer.encode(pairs, config.score.append_eos))
        for row, found in expanded:
            if isinstance(found, RowPairs):
                results = list(islice(encoded, len(found.pairs)))
                requests = [result for result in results if isinstance(result, ScoringRequest)]
                if len(requests) == len(results):
                    yield found, requests
                    continue
                index, error = next((i, result) for i, result in enumerate(results) if isinstance(result, InputError))
                if index >= found.num_candidates * found.num_answers:
                    error = InputError(f"without a passage (--baseline no-context): {error}")
                found = error
            _report(row, found, on_bad_row)


def _planned(rows: Iterable[Row], config: TaskConfig) -> Iterator[Planned]:
    for row in rows:
        try:
            yield row, plan_row(row, config)
        except InputError as error:
            yield row, error


def _portions(rows: Iterable[Planned], max_pairs: int) -> Iterator[list[Planned]]:
    """Rows until they have ``max_pairs`` pairs."""
    portion: list[Planned] = []
    size = 0
    for row, plan in rows:
        portion.append((row, plan))
        size += plan.num_pairs if isinstance(plan, RowPlan) else 1
        if size >= max_pairs:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _expanded(
    portion: Sequence[Planned],
    config: TaskConfig,
    tokenizer: PairTokenizer,
    chat: ChatTemplate,
) -> Iterator[tuple[Row, RowPairs | InputError]]:
    """Each row's pairs; candidates are truncated all together."""
    keys = [key for _, plan in portion if isinstance(plan, RowPlan) for key in plan.keys]
    truncated = iter(tokenizer.truncate_keys(keys, config.key_max_length))
    for row, plan in portion:
        if isinstance(plan, InputError):
            yield row, plan
            continue
        cut = list(islice(truncated, len(plan.keys)))
        try:
            found = expand_plan(row, plan, config, cut, chat)
            if found.summed and tokenizer.is_encoder_decoder:
                raise InputError("the task preference needs a causal model, and this is an encoder-decoder")
        except InputError as error:
            yield row, error
        else:
            yield row, found


def _report(row: Row, error: InputError, on_bad_row: OnBadRow | None) -> None:
    located = error.at(path=row.path, line=row.line)
    if on_bad_row is None:
        raise located
    on_bad_row(row, located)
