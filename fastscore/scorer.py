"""Pairs in, scores out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
import transformers
from fastscore_kernels.answer_nll import answer_nll_path
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastscore.aggregate import is_finite, not_finite, split_answers, teacher_scores
from fastscore.answer_head import AnswerHead
from fastscore.config import (
    DEFAULT_MODEL,
    DEFAULT_WINDOW_TOKENS,
    Answers,
    Combine,
    DType,
    Overflow,
    ScorerConfig,
    TaskConfig,
)
from fastscore.language_model import LanguageModel
from fastscore.model_source import resolve_model
from fastscore.models import load_config, load_model, load_tokenizer, max_context, prepare_model
from fastscore.tasks import expand_row, output_row
from fastscore.tokenization import PairTokenizer
from fastscore.types import (
    AnswerScore,
    InputError,
    Pair,
    Row,
    RowPairs,
    RunStats,
    ScoredRow,
    ScoringRequest,
)
from fastscore.windows import TOKENISED_PAIRS, EncodedRow, chunks, windows

logger = logging.getLogger("fastscore")

Progress = Callable[[RunStats], None]


class Scorer:
    """Scores answers with a language model.

    Args are those of :class:`fastscore.config.ScorerConfig`. The tokenizer and the model's config are read here, so
    that a wrong name fails at once; the weights are loaded when first needed, or by :meth:`load`.

    Raises:
        ValueError: a bad argument, or (as ``InputError``) a model that is not there.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        dtype: DType = "auto",
        device: str = "auto",
        revision: str | None = None,
        adapter: str | None = None,
        trust_remote_code: bool = False,
        attention: str = "auto",
        max_batch_tokens: int | None = None,
        window_tokens: int = DEFAULT_WINDOW_TOKENS,
        share_prefixes: bool = True,
        deterministic: bool = False,
        overflow: Overflow = "error",
        cache_dir: str | None = None,
        device_map: str | None = None,
    ) -> None:
        self.config = ScorerConfig(
            model=model,
            dtype=dtype,
            device=device,
            revision=revision,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
            attention=attention,
            max_batch_tokens=max_batch_tokens,
            window_tokens=window_tokens,
            share_prefixes=share_prefixes,
            deterministic=deterministic,
            overflow=overflow,
            cache_dir=cache_dir,
            device_map=device_map,
        )
        self._source = resolve_model(model)
        hf_config = load_config(self._source, self.config)
        self._set_up(hf_config, load_tokenizer(self._source, self.config), self._source.path)

    def _set_up(self, hf_config: Any, tokenizer: Any, model_path: str) -> None:
        self.hf_config = hf_config
        self.tokenizer = tokenizer
        self.model_path = model_path
        self.stats = RunStats()
        self._pair_tokenizer = PairTokenizer(
            tokenizer,
            vocab_size=hf_config.get_text_config().vocab_size,
            max_context=max_context(hf_config),
            overflow=self.config.overflow,
            is_encoder_decoder=hf_config.is_encoder_decoder,
        )

    @classmethod
    def from_config(cls, config: ScorerConfig) -> Scorer:
        """A scorer from a frozen config."""
        options = {name: getattr(config, name) for name in ScorerConfig.__slots__}
        return cls(**options)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        attention: str = "auto",
        max_batch_tokens: int | None = None,
        window_tokens: int = DEFAULT_WINDOW_TOKENS,
        share_prefixes: bool = True,
        deterministic: bool = False,
        overflow: Overflow = "error",
    ) -> Scorer:
        """A scorer around a Hugging Face model that is in memory already, where it is and in its dtype.

        The model is changed: its attention runs packs from now on.

        Raises:
            ValueError: a bad argument, or (as ``InputError``) a model whose LM head is of an unknown kind.
        """
        name = model.config.name_or_path or type(model).__name__
        scorer = cls.__new__(cls)
        scorer.config = ScorerConfig(
            name,
            device=str(model.device),
            attention=attention,
            max_batch_tokens=max_batch_tokens,
            window_tokens=window_tokens,
            share_prefixes=share_prefixes,
            deterministic=deterministic,
            overflow=overflow,
        )
        scorer._set_up(model.config, tokenizer, name)
        scorer._model = prepare_model(model, scorer.config)
        return scorer

    def load(self) -> LanguageModel:
        """Load the weights now (they are loaded on first use otherwise) and return the loaded model."""
        return self._model

    @cached_property
    def _model(self) -> LanguageModel:
        return load_model(self._source, self.config, self.hf_config)

    def score(self, pairs: Iterable[tuple[str, str]]) -> list[AnswerScore]:
        """Score text pairs ``(prompt, answer)``; the answer follows the prompt as it stands, space included.

        Raises:
            InputError: a pair without a scorable answer, or one that does not fit the model's context.
        """
        return self._score_pairs([Pair(prompt, answer) for prompt, answer in pairs])

    def score_tokens(
        self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]], on_progress: Progress | None = None
    ) -> list[AnswerScore]:
        """Score token-id pairs ``(prompt_ids, answer_ids)``, used as they are: nothing is added.

        Each may be a list, an array or a tensor of one dimension.

        Raises:
            InputError: as for :meth:`score`, or an id outside the vocabulary.
        """
        return self._score_pairs([Pair(_ids(prompt), _ids(answer)) for prompt, answer in pairs], on_progress)

    def score_rows(
        self,
        rows: Iterable[Mapping[str, Any]],
        task: str | None = None,
        *,
        template: str | None = None,
        answers: Answers = "first",
        combine: Combine = "max",
        seed: int = 0,
        key_max_length: int = 512,
    ) -> list[dict[str, Any]]:
        """Rows as dictionaries (see :mod:`fastscore.tasks`), back with ``teacher_scores`` added.

        ``teacher_scores[i]`` is the mean log-probability in nats of the answer given candidate i, in the order
        ``pos + neg`` (or ``history``, or ``choices``); higher is better.

        Raises:
            InputError: naming the row (counted from 1) and its field.
        """
        config = TaskConfig(task, template, answers, combine, seed, key_max_length)
        numbered = (Row(dict(row), line=line) for line, row in enumerate(rows, start=1))
        return [output_row(scored.row, config, scored.teacher_scores) for scored in self.stream_rows(numbered, config)]

    def stream_rows(
        self,
        rows: Iterable[Row],
        task_config: TaskConfig,
        *,
        on_bad_row: Callable[[Row, InputError], None] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[ScoredRow]:
        """Score rows as they come, a window at a time, in input order.

        A bad row raises, or is handed to ``on_bad_row`` and left out.
        """
        for window in windows(self._encoded(rows, task_config, on_bad_row), self.config.window_tokens):
            together = [request for _, requests in window for request in requests]
            place = partial(_place, [row_pairs for row_pairs, _ in window])
            scores = iter(self._score_requests(together, place, on_progress))
            for row_pairs, requests in window:
                row_scores = tuple(islice(scores, len(requests)))
                yield ScoredRow(row_pairs.row, teacher_scores(row_pairs, row_scores, task_config.combine), row_scores)

    def describe(self) -> dict[str, Any]:
        """What runs here and how, for logs and for a run's metadata. Loads the model."""
        model = self._model
        return {
            "model": self.config.model,
            "model_path": self.model_path,
            "revision": self.config.revision,
            "commit": getattr(self.hf_config, "_commit_hash", None),
            "adapter": self.config.adapter,
            "architecture": type(model.model).__name__,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "mode": model.mode,
            "mode_reason": model.reason,
            "attention": model.provider.name if model.provider is not None else "model's own",
            "answer_nll": answer_nll_path(model.device),
            "max_batch_tokens": model.max_batch_tokens,
            "window_tokens": self.config.window_tokens,
            "share_prefixes": self.config.share_prefixes,
            "deterministic": self.config.deterministic,
            "overflow": self.config.overflow,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def _encoded(
        self, rows: Iterable[Row], config: TaskConfig, on_bad_row: Callable[[Row, InputError], None] | None
    ) -> Iterator[EncodedRow]:
        """Rows with the requests of their pairs, tokenised many at a time."""
        for chunk in chunks(self._expanded(rows, config, on_bad_row), TOKENISED_PAIRS):
            encoded = iter(self._pair_tokenizer.encode([pair for row_pairs in chunk for pair in row_pairs.pairs]))
            for row_pairs in chunk:
                results = list(islice(encoded, len(row_pairs.pairs)))
                requests = [result for result in results if isinstance(result, ScoringRequest)]
                if len(requests) == len(results):
                    yield row_pairs, requests
                else:
                    error = next(result for result in results if isinstance(result, InputError))
                    _report(row_pairs.row, error, on_bad_row)

    def _expanded(
        self, rows: Iterable[Row], config: TaskConfig, on_bad_row: Callable[[Row, InputError], None] | None
    ) -> Iterator[RowPairs]:
        truncate = partial(self._pair_tokenizer.truncate_keys, max_length=config.key_max_length)
        for row in rows:
            try:
                yield expand_row(row, config, truncate)
            except InputError as error:
                _report(row, error, on_bad_row)

    def _score_pairs(self, pairs: Sequence[Pair], on_progress: Progress | None = None) -> list[AnswerScore]:
        requests: list[ScoringRequest] = []
        for index, result in enumerate(self._pair_tokenizer.encode(pairs)):
            if isinstance(result, InputError):
                raise InputError(f"pair {index}: {result}") from result
            requests.append(result)
        return self._score_requests(requests, "pair {}".format, on_progress)

    def _score_requests(
        self,
        requests: Sequence[ScoringRequest],
        place: Callable[[int], str],
        on_progress: Progress | None = None,
    ) -> list[AnswerScore]:
        """Scores in the requests' order, every one a number. ``place`` says in an error where a request came from."""
        scores = self._run(requests, on_progress)
        bad = [index for index, score in enumerate(scores) if not is_finite(score)]
        for index in bad:
            # One that overflows spoils others of its pack (attention masks by zero, and zero times nan is nan).
            (by_itself,) = self._run([requests[index]], None)
            if not is_finite(by_itself):
                raise not_finite(by_itself, place(index))
        if bad:
            raise not_finite(scores[bad[0]], place(bad[0]))
        return scores

    def _run(self, requests: Sequence[ScoringRequest], on_progress: Progress | None) -> list[AnswerScore]:
        """tokens -> prefix tree -> packs -> hidden states of answer rows -> NLL -> scores, in the requests' order."""
        model, stats = self._model, self.stats
        started = time.perf_counter()
        stats.count_padded([len(request.token_ids) for request in requests])
        slots, batches = model.run(requests)
        head = AnswerHead(model.head, slots.count, fixed_rows=model.deterministic)
        share = len(requests) / max(1, slots.count)
        done = 0.0
        for batch, hidden_AD in batches:
            head.add(batch, hidden_AD)
            # A request is done with its last answer token; in between, pairs are counted by their share of the slots.
            done += share * len(batch.slot_Q)
            stats.tokens_computed += batch.num_tokens
            stats.packs += 1
            stats.pack_tokens += max(model.max_batch_tokens, batch.num_tokens)
            if on_progress is not None:
                elapsed = stats.seconds + time.perf_counter() - started
                on_progress(replace(stats, pairs=stats.pairs + int(done), seconds=elapsed))
        nll_Q, greedy_Q = head.finish()
        answers = split_answers(nll_Q[slots.slot].tolist(), greedy_Q[slots.slot].tolist(), slots.offset_R.tolist())
        stats.pairs += len(requests)
        stats.answer_tokens += len(slots.slot)
        stats.tokens_unpadded += sum(len(request.token_ids) for request in requests)
        stats.seconds += time.perf_counter() - started
        if on_progress is not None:
            on_progress(replace(stats))
        return list(answers)


def _place(rows: Sequence[RowPairs], index: int) -> str:
    """Where in the input the pair of that index came from."""
    for row_pairs in rows:
        if index < len(row_pairs.pairs):
            return str(row_pairs.row.error(f"candidate {index // row_pairs.num_answers}"))
        index -= len(row_pairs.pairs)
    raise IndexError(index)


def _ids(token_ids: Any) -> tuple[int, ...]:
    return tuple(token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids)


def _report(row: Row, error: InputError, on_bad_row: Callable[[Row, InputError], None] | None) -> None:
    located = error.at(path=row.path, line=row.line)
    if on_bad_row is None:
        raise located
    on_bad_row(row, located)
