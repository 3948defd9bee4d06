"""Pairs in, scores out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from itertools import islice
from typing import Any

import torch
import transformers
from fastscore_kernels.answer_nll import answer_nll_path
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastscore.aggregate import teacher_scores
from fastscore.config import (
    DEFAULT_MODEL,
    DEFAULT_WINDOW_TOKENS,
    Answers,
    Combine,
    DType,
    Forward,
    Overflow,
    Quantize,
    Residual,
    ScorerConfig,
    TaskConfig,
)
from fastscore.garbage import collection_paused
from fastscore.language_model import LanguageModel, Plan
from fastscore.launch import Launch, Progress
from fastscore.model_source import resolve_model
from fastscore.models import choose_device, load_config, load_model, load_tokenizer, max_context, prepare_model
from fastscore.pipeline import runs_beside_host, score_beside, score_in_turn
from fastscore.tasks import output_row
from fastscore.tokenization import PairTokenizer
from fastscore.types import AnswerScore, InputError, Pair, Row, RunStats, ScoredRow, ScoringRequest
from fastscore.windows import OnBadRow, Window, read_windows


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
        allow_pickle: bool = False,
        attention: str = "auto",
        forward: Forward = "auto",
        residual: Residual = "auto",
        compiled: bool = False,
        quantize: Quantize | None = None,
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
            allow_pickle=allow_pickle,
            attention=attention,
            forward=forward,
            residual=residual,
            compiled=compiled,
            quantize=quantize,
            max_batch_tokens=max_batch_tokens,
            window_tokens=window_tokens,
            share_prefixes=share_prefixes,
            deterministic=deterministic,
            overflow=overflow,
            cache_dir=cache_dir,
            device_map=device_map,
        )
        self._source = resolve_model(model)
        with collection_paused():
            hf_config, tokenizer = (load(self._source, self.config) for load in (load_config, load_tokenizer))
        self._set_up(hf_config, tokenizer, self._source.path)

    def _set_up(self, hf_config: Any, tokenizer: Any, model_path: str) -> None:
        self.hf_config = hf_config
        self.tokenizer = tokenizer
        self.model_path = model_path
        self.stats = RunStats()
        self._spare_tokenizers: list[PairTokenizer] = []
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
        forward: Forward = "auto",
        residual: Residual = "auto",
        compiled: bool = False,
        max_batch_tokens: int | None = None,
        window_tokens: int = DEFAULT_WINDOW_TOKENS,
        share_prefixes: bool = True,
        deterministic: bool = False,
        overflow: Overflow = "error",
    ) -> Scorer:
        """A scorer around a Hugging Face model that is in memory already, where it is and in its dtype.

        The model is changed: its attention runs packs from now on, and weights that are multiplied together become
        parts of one.

        Raises:
            ValueError: a bad argument, or (as ``InputError``) a model whose LM head is of an unknown kind.
        """
        name = model.config.name_or_path or type(model).__name__
        scorer = cls.__new__(cls)
        scorer.config = ScorerConfig(
            name,
            device=str(model.device),
            attention=attention,
            forward=forward,
            residual=residual,
            compiled=compiled,
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

    def score_requests(
        self,
        requests: Sequence[ScoringRequest],
        plan: Plan | None = None,
        *,
        on_progress: Progress | None = None,
    ) -> list[AnswerScore]:
        """Score requests that were tokenised before, and planned where ``plan`` is given.

        Raises:
            RuntimeError: a score that is no number.
        """
        plan = self._model.plan(requests) if plan is None else plan
        return Launch(self._model, plan, requests, self.stats, on_progress).scores("pair {}".format)

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
        on_bad_row: OnBadRow | None = None,
        on_progress: Progress | None = None,
    ) -> Generator[ScoredRow, None, None]:
        """Score rows as they come, a window at a time, in input order.

        A bad row raises, or is handed to ``on_bad_row`` and left out. On any device but a CPU, ``rows`` are read and
        ``on_bad_row`` is called in a thread that is one window ahead; it ends with this iterator (close it to leave
        early).
        """
        beside = runs_beside_host(choose_device(self.config.device))
        tokenizer = self._pair_tokenizer
        if beside:  # the thread's own: this one is the user's, and its settings change from call to call
            tokenizer = self._spare_tokenizers.pop() if self._spare_tokenizers else copy.deepcopy(tokenizer)

        def prepare(rows: Iterable[Row], load: Callable[[], LanguageModel]) -> Iterator[tuple[Window, Plan]]:
            return self._prepare(rows, task_config, on_bad_row, tokenizer, load)

        def launch(window: Window, plan: Plan) -> Launch:
            return Launch(self._model, plan, window.requests, self.stats, on_progress)

        try:
            with closing((score_beside if beside else score_in_turn)(rows, prepare, self.load, launch)) as windows:
                for window, scores in windows:
                    yield from _scored_rows(window, scores, task_config.combine)
                    del window, scores  # not in memory while the next are waited for
        finally:
            if beside:
                self._spare_tokenizers.append(tokenizer)

    def plan_windows(
        self, rows: Iterable[Row], task_config: TaskConfig, *, on_bad_row: OnBadRow | None = None
    ) -> Iterator[tuple[Window, Plan]]:
        """The windows that :meth:`stream_rows` would score, and what each asks of the model. Loads the model."""
        return self._prepare(rows, task_config, on_bad_row, self._pair_tokenizer, self.load)

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
            "forward": model.forward_name,
            "quantize": self.config.quantize,
            "attention": model.provider.name if model.provider is not None else "model's own",
            "answer_nll": answer_nll_path(model.device),
            "max_batch_tokens": model.max_batch_tokens,
            "window_tokens": self.config.window_tokens,
            "share_prefixes": self.config.share_prefixes,
            "deterministic": self.config.deterministic,
            "overflow": self.config.overflow,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def _prepare(
        self,
        rows: Iterable[Row],
        task_config: TaskConfig,
        on_bad_row: OnBadRow | None,
        tokenizer: PairTokenizer,
        load: Callable[[], LanguageModel],
    ) -> Iterator[tuple[Window, Plan]]:
        for window in read_windows(rows, task_config, tokenizer, self.config.window_tokens, on_bad_row):
            yield window, load().plan(window.requests)
            del window  # not in memory while the next is read

    def _score_pairs(self, pairs: Sequence[Pair], on_progress: Progress | None = None) -> list[AnswerScore]:
        requests: list[ScoringRequest] = []
        for index, result in enumerate(self._pair_tokenizer.encode(pairs)):
            if isinstance(result, InputError):
                raise InputError(f"pair {index}: {result}") from result
            requests.append(result)
        return self.score_requests(requests, on_progress=on_progress)


def _scored_rows(window: Window, scores: Sequence[AnswerScore], combine: Combine) -> Iterator[ScoredRow]:
    remaining = iter(scores)
    for row_pairs in window.rows:
        row_scores = tuple(islice(remaining, len(row_pairs.pairs)))
        yield ScoredRow(row_pairs.row, teacher_scores(row_pairs, row_scores, combine), row_scores)


def _ids(token_ids: Any) -> tuple[int, ...]:
    return tuple(token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids)
