"""A stream of rows in windows: tokenised a small portion at a time, scored a large one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from fastscore.chat import ChatTemplate
from fastscore.config import TaskConfig
from fastscore.tasks import expand_row
from fastscore.tokenization import PairTokenizer
from fastscore.types import InputError, Row, RowPairs, ScoringRequest

TOKENISED_PAIRS = 256
"""Pairs handed to the tokenizer at a time: enough for its threads, and soon done when the run is interrupted."""

OnBadRow = Callable[[Row, InputError], None]


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
                candidate = index // row_pairs.num_answers
                is_baseline = candidate == row_pairs.num_candidates
                return str(row_pairs.row.error("the baseline" if is_baseline else f"candidate {candidate}"))
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
    for portion in _portions(_expanded(rows, config, tokenizer, on_bad_row), TOKENISED_PAIRS):
        pairs = [pair for row_pairs in portion for pair in row_pairs.pairs]
        encoded = iter(tokenizer.encode(pairs, config.score.append_eos))
        for row_pairs in portion:
            results = list(islice(encoded, len(row_pairs.pairs)))
            requests = [result for result in results if isinstance(result, ScoringRequest)]
            if len(requests) == len(results):
                yield row_pairs, requests
            else:
                index, error = next((i, found) for i, found in enumerate(results) if isinstance(found, InputError))
                if index >= row_pairs.num_candidates * row_pairs.num_answers:
                    error = InputError(f"without a passage (--baseline no-context): {error}")
                _report(row_pairs.row, error, on_bad_row)


def _expanded(
    rows: Iterable[Row], config: TaskConfig, tokenizer: PairTokenizer, on_bad_row: OnBadRow | None
) -> Iterator[RowPairs]:
    truncate = partial(tokenizer.truncate_keys, max_length=config.key_max_length)
    chat = ChatTemplate(tokenizer.tokenizer, config.system_prompt)
    for row in rows:
        try:
            expanded = expand_row(row, config, truncate, chat)
            if expanded.summed and tokenizer.is_encoder_decoder:
                raise InputError("the task preference needs a causal model, and this is an encoder-decoder")
            yield expanded
        except InputError as error:
            _report(row, error, on_bad_row)


def _portions(rows: Iterable[RowPairs], max_pairs: int) -> Iterator[list[RowPairs]]:
    """Rows until they have ``max_pairs`` pairs."""
    portion: list[RowPairs] = []
    size = 0
    for row in rows:
        portion.append(row)
        size += len(row.pairs)
        if size >= max_pairs:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _report(row: Row, error: InputError, on_bad_row: OnBadRow | None) -> None:
    located = error.at(path=row.path, line=row.line)
    if on_bad_row is None:
        raise located
    on_bad_row(row, located)
