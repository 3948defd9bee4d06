"""The frozen dataclasses that travel between the rooms, and the one error users meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class InputError(ValueError):
    """Bad input from a person: a row, a flag, a path or a model name.

    The message names file, line and field as far as they are known, for example
    ``train.jsonl:17: field 'answers': expected a non-empty list of strings, found []``.
    The command line prints it as one line and exits with status 2.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        self.message = message
        self.path = path
        self.line = line
        self.field = field
        super().__init__(message)

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.path, self.line) if part is not None)
        parts = [part for part in (where, f"field {self.field!r}" if self.field else "", self.message) if part]
        return ": ".join(parts)

    def at(self, *, path: str | None = None, line: int | None = None, field: str | None = None) -> InputError:
        """The same error with the places filled in that it does not name yet."""
        return InputError(
            self.message,
            path=self.path if self.path is not None else path,
            line=self.line if self.line is not None else line,
            field=self.field if self.field is not None else field,
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One record of an input file. ``line`` counts from 1; ``path`` is None for rows given in Python."""

    data: dict[str, Any]
    path: str | None = None
    line: int | None = None

    def error(self, message: str, field: str | None = None) -> InputError:
        return InputError(message, path=self.path, line=self.line, field=field)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and the answer to score after it: both text, or both token ids (then used as they are)."""

    prompt: str | tuple[int, ...]
    answer: str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowPairs:
    """The pairs of one row, candidate by candidate: pair ``c * num_answers + a`` is candidate c with answer a."""

    row: Row
    pairs: tuple[Pair, ...]
    num_candidates: int
    num_answers: int


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """One prompt and answer as token ids; ``token_ids[answer_start:]`` are scored.

    ``1 <= answer_start < len(token_ids)`` for a causal model: the first answer token needs something before
    it. For an encoder-decoder ``token_ids[:answer_start]`` go to the encoder.
    """

    token_ids: tuple[int, ...]
    answer_start: int

    @property
    def num_answer_tokens(self) -> int:
        return len(self.token_ids) - self.answer_start


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """What the model thinks of one answer. Log-probabilities are in nats, fp32, at most 0; higher is better."""

    token_logprobs: tuple[float, ...]
    is_greedy: bool
    """True when every answer token is the model's own first choice (lowest id wins a tie)."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_logprobs)

    @property
    def logprob(self) -> float:
        """Sum over the answer tokens."""
        return float(sum(self.token_logprobs))

    @property
    def mean_logprob(self) -> float:
        """Mean over the answer tokens: the ``teacher_scores`` entry."""
        return self.logprob / self.num_tokens


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row and its scores: one per candidate, and the raw score of every pair in RowPairs order."""

    row: Row
    teacher_scores: tuple[float, ...]
    scores: tuple[AnswerScore, ...]


@dataclass(slots=True)
class RunStats:
    """Counters of a run, for progress bars and the summary. Token counts are input tokens of the model."""

    pairs: int = 0
    answer_tokens: int = 0
    tokens_computed: int = 0
    tokens_unpadded: int = 0
    """Tokens of all requests, each counted alone, without any padding."""
    tokens_padded: int = 0
    """What batches of four in input order, padded to their longest, would have computed."""
    pack_tokens: int = 0
    """Sum of the token budgets of the packs run: ``tokens_computed / pack_tokens`` is the fill."""
    packs: int = 0
    seconds: float = 0.0
    _padding_group: list[int] = field(default_factory=list, repr=False)

    def count_padded(self, lengths: Sequence[int], group_size: int = 4) -> None:
        """Feed request lengths in input order to ``tokens_padded``."""
        for length in lengths:
            self._padding_group.append(length)
            if len(self._padding_group) == group_size:
                self.flush_padded()

    def flush_padded(self) -> None:
        """Count the last, possibly smaller group."""
        if self._padding_group:
            self.tokens_padded += max(self._padding_group) * len(self._padding_group)
            self._padding_group.clear()
