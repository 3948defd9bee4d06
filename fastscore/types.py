"""The frozen dataclasses that travel between the rooms, and the one error users meet."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:  # --help and the first pass over the input must not wait for torch
    import torch

    from fastscore.ranges import Ints


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` and the like, as models' configs have it."""
    return str(dtype).removeprefix("torch.")


TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
"""Names of files that hold a table. Their records have numbers, no lines."""


ColumnType: TypeAlias = "str | dict[str, str]"
"""Of a table's column, in Arrow's words (``list<double>``); a dictionary is an object with fields of these types."""


def is_table(path: object) -> bool:
    """Whether a file is a table, by its name."""
    return str(path).lower().endswith(TABLE_SUFFIXES)


class InputError(ValueError):
    """Bad input from a person: a row, a flag, a path or a model name.

    The message names file, line and field as far as they are known, for example
    ``train.jsonl:17: field 'answers': expected a non-empty list of strings, found []``; in a table, the row
    (``train.parquet: row 17: ...``).
    The command line prints it as one line and exits with status 2. ``path``, ``line`` (counted from 1) and ``field``
    are None where they are not known; ``message`` is the text without them.
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
        before_line = ": row " if is_table(self.path) else ":"
        where = before_line.join(str(part) for part in (self.path, self.line) if part is not None)
        parts = [part for part in (where, f"field {self.field!r}" if self.field else "", self.message) if part]
        return ": ".join(parts)

    def at(self, *, path: str | None = None, line: int | None = None, field: str | None = None) -> InputError:
        """The same error with ``path``, ``line`` and ``field`` filled in where it does not name them yet."""
        return InputError(
            self.message,
            path=self.path if self.path is not None else path,
            line=self.line if self.line is not None else line,
            field=self.field if self.field is not None else field,
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One record of an input file; ``path`` is None for rows given in Python.

    ``line`` counts from 1; in a table, rows are counted.
    """

    data: dict[str, Any]
    path: str | None = None
    line: int | None = None
    numbers: tuple[int, ...] | None = None
    """Of a part of a row, whose data has fewer candidates: which of the whole row's pairs it stands for."""

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, whose own way with frozen dataclasses takes several times as long."""
        return Row, (self.data, self.path, self.line, self.numbers)

    def error(self, message: str, field: str | None = None) -> InputError:
        """An error that names this row's file and line."""
        return InputError(message, path=self.path, line=self.line, field=field)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and the answer to score after it: both text, or both token ids (then used as they are)."""

    prompt: str | tuple[int, ...]
    answer: str | tuple[int, ...]
    is_chat: bool = False
    """The prompt comes from a chat template, which writes the special tokens itself: the tokenizer adds none."""

    def __reduce__(self) -> tuple[Any, ...]:
        """As for :class:`Row`."""
        return Pair, (self.prompt, self.answer, self.is_chat)

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of the answer as it is scored, the space that joins it to the prompt included.

        The space's probability is in the score too. None for token ids.
        """
        return len(self.answer.encode("utf-8")) if isinstance(self.answer, str) else None

    @property
    def num_chars(self) -> int | None:
        """Characters (code points) of the same text."""
        return len(self.answer) if isinstance(self.answer, str) else None


@dataclass(frozen=True, slots=True)
class RowPairs:
    """The pairs of one row, candidate by candidate: pair ``c * num_answers + a`` is candidate c with answer a.

    With a baseline, ``num_answers`` more follow: each answer without any candidate.
    """

    row: Row
    pairs: tuple[Pair, ...]
    num_candidates: int
    num_answers: int
    summed: bool = False
    """A pair's score is the sum over its answer's tokens, not their mean."""

    def __reduce__(self) -> tuple[Any, ...]:
        """As for :class:`Row`."""
        return RowPairs, (self.row, self.pairs, self.num_candidates, self.num_answers, self.summed)

    @property
    def has_baseline(self) -> bool:
        """Whether the answers also come without a passage, after all other pairs."""
        return len(self.pairs) > self.num_candidates * self.num_answers

    def place(self, index: int) -> str:
        """Where in the input the pair of that index came from: file, line and candidate (of the whole row)."""
        if index >= self.num_candidates * self.num_answers:
            return str(self.row.error("the baseline"))
        number = index if self.row.numbers is None else self.row.numbers[index]
        return str(self.row.error(f"candidate {number // self.num_answers}"))


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
        """How many tokens are scored."""
        return len(self.token_ids) - self.answer_start


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """What the model thinks of one answer. Log-probabilities are in nats, fp32, at most 0; higher is better."""

    token_logprobs: tuple[float, ...]
    is_greedy: bool
    """True when every answer token is the model's own first choice (lowest id wins a tie)."""

    def __reduce__(self) -> tuple[Any, ...]:
        """As for :class:`Row`."""
        return AnswerScore, (self.token_logprobs, self.is_greedy)

    @property
    def num_tokens(self) -> int:
        """Answer tokens, at least 1."""
        return len(self.token_logprobs)

    @property
    def logprob(self) -> float:
        """Sum over the answer tokens, nats; summed in fp64."""
        return float(sum(self.token_logprobs))

    @property
    def mean_logprob(self) -> float:
        """Mean over the answer tokens, nats: the ``teacher_scores`` entry unless another definition is asked for."""
        return self.logprob / self.num_tokens


TeacherScores: TypeAlias = tuple[float, ...] | tuple[tuple[float, ...], ...]
"""One per candidate: a number, or (``reduce="none"``) the log-probabilities of its answer's tokens."""


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row and its scores: one per candidate, and the raw score of every pair in RowPairs order."""

    row: Row
    teacher_scores: TeacherScores
    scores: tuple[AnswerScore, ...]
    teacher_raw: dict[str, Any] | None = None
    """What other definitions can be computed from, where the run keeps it."""
    pairs: tuple[Pair, ...] = ()
    """What was scored, in the order of ``scores``."""


@dataclass(frozen=True, slots=True)
class KeyRuns:
    """What each of S segments attends to, as runs of the pack's key space; its own tokens come last.

    Runs ``offset_S[s]:offset_S[s + 1]`` of ``start_P`` and ``length_P`` are segment s's, in the order of the text.
    """

    offset_S: Ints
    start_P: Ints
    length_P: Ints


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A run of a prefix tree's tokens as one padding-free sequence of T tokens in S segments.

    Keys and values of ``num_carried`` tokens are kept from the packs before; with the pack's own T they make the *key
    space*, ``num_carried + T`` rows. Queries of segment s are ``cu_seqlens_q[s]:cu_seqlens_q[s + 1]``; they are aligned
    to the end of its keys (bottom-right causal).
    """

    token_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    cu_seqlens_q: torch.Tensor
    """int32 ``[S + 1]``, as varlen attention wants it."""
    cu_seqlens_k: torch.Tensor
    """The same for the keys of every segment, gathered one segment after the other."""
    max_seqlen_q: int
    max_seqlen_k: int
    key_runs: KeyRuns
    query_start_S: Ints
    num_segment_tokens: int
    """The tokens after these fill the pack up to a fixed size and belong to no segment."""
    num_carried: int
    carry_rows: torch.Tensor
    """int64: rows of the key space that the next pack needs."""
    answer_row_A: torch.Tensor
    """int64: tokens whose hidden states predict answer tokens, each once."""
    target_Q: Ints
    """The token that each slot asks for."""
    slot_row_Q: Ints
    """Which of the A rows predicts each slot; ascending."""
    slot_Q: Ints
    """Where each slot's NLL belongs among those of the plan."""
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Index tensors that an attention provider makes of this pack once, for all layers."""

    @property
    def num_tokens(self) -> int:
        """Tokens that belong to a segment; T counts those as well that fill the pack."""
        return self.num_segment_tokens

    @property
    def num_segments(self) -> int:
        """S."""
        return len(self.query_start_S)

    def narrowed(self, sliding_window: int | None) -> int | None:
        """The window where it hides a key of this pack, otherwise None."""
        return sliding_window if sliding_window is not None and sliding_window < self.max_seqlen_k else None

    def to(self, device: torch.device) -> PackedBatch:
        """The same pack with its tensors on the device."""
        return _to_device(self, device)


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Requests for a causal model's padded path, padded on the right: ``[B, L]`` token ids.

    On the right, so that padding comes after everything that is scored: no causal model can see it, whatever its
    positions or its recurrent state.
    """

    token_ids_BL: torch.Tensor
    mask_BL: torch.Tensor
    answer_row_A: torch.Tensor
    """int64: rows of the flattened ``[B * L]`` hidden states."""
    target_Q: Ints
    slot_row_Q: Ints
    slot_Q: Ints
    num_tokens: int

    def to(self, device: torch.device) -> PaddedBatch:
        """The same batch with its tensors on the device."""
        return _to_device(self, device)


@dataclass(frozen=True, slots=True)
class Seq2SeqBatch:
    """Requests for an encoder-decoder, right-padded: prompts to the encoder ``[B, P]``, answers to the decoder.

    ``decoder_ids_BL`` is shifted right (it begins with the decoder's start token); row ``answer_row_A`` of the
    flattened ``[B * L]`` decoder states predicts ``target_Q``.
    """

    prompt_ids_BP: torch.Tensor
    prompt_mask_BP: torch.Tensor
    decoder_ids_BL: torch.Tensor
    answer_row_A: torch.Tensor
    target_Q: Ints
    slot_row_Q: Ints
    slot_Q: Ints
    num_tokens: int

    def to(self, device: torch.device) -> Seq2SeqBatch:
        """The same batch with its tensors on the device."""
        return _to_device(self, device)


Batch: TypeAlias = PackedBatch | PaddedBatch | Seq2SeqBatch
CarriedKeys: TypeAlias = "list[tuple[torch.Tensor, torch.Tensor]]"
"""Keys and values ``[C, K, d]`` that a pack leaves to the next, one entry per attention call of the forward pass."""


class PackForward(Protocol):
    """A model's forward pass over a pack: hidden states ``[A, D]`` of those rows (``[T, D]`` of all where None) after
    the last norm, and what the next pack needs. ``carried`` comes from the pack before."""

    def __call__(
        self, pack: PackedBatch, carried: CarriedKeys, rows_A: torch.Tensor | None
    ) -> tuple[torch.Tensor, CarriedKeys]: ...


def _to_device(batch: Any, device: torch.device) -> Any:
    from fastscore.transfer import to_device

    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if hasattr(getattr(batch, f.name), "is_cuda")}
    return replace(batch, **{name: to_device(tensor, device) for name, tensor in tensors.items()})
