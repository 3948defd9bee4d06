"""Pairs in, scores out."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastscore.aggregate import Scores, scored_row
from fastscore.cache_file import CacheAt
from fastscore.checkpoint import Checkpoint
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
    ScoreConfig,
    ScorerConfig,
    TaskConfig,
)
from fastscore.context import max_context
from fastscore.fingerprint import ScoreIdentity
from fastscore.identity import describe_run
from fastscore.kept_scores import RunCache, Work, make_work
from fastscore.language_model import LanguageModel, Plan
from fastscore.launch import Launch, Progress
from fastscore.row_stream import RowStream
from fastscore.run_stats import RunStats
from fastscore.tasks import output_row
from fastscore.tokenization import PairTokenizer
from fastscore.types import AnswerScore, InputError, Pair, Row, RowPairs, ScoredRow, ScoringRequest
from fastscore.windows import OnBadRow, Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Scorer:
    """Scores answers with a language model.

    Args are those of :class:`fastscore.config.ScorerConfig`, and ``cache``, a file in which scores are kept and looked
    up (see :mod:`fastscore.cache`; it is made where there is none). The tokenizer and the model's config are read
    here, so that a wrong name fails at once; the weights are loaded when first needed, or by :meth:`load`. ``stats``
    counts what was scored; ``tokenizer`` and ``hf_config`` are Hugging Face's, ``model_path`` is where the model lies.

    Raises:
        ValueError: a bad argument, or (as ``InputError``) a model that is not there. What scores raises it too when the
            cache can't be opened.
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
        tensor_parallel: bool = False,
        cache: str | Path | None = None,
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
            tensor_parallel=tensor_parallel,
        )
        self._checkpoint: Checkpoint | None = Checkpoint(self.config)
        tokenizer, path = self._checkpoint.tokenizer(), self._checkpoint.path
        self._set_up(self._checkpoint.settings, tokenizer, path, None if cache is None else CacheAt(Path(cache)))

    def _set_up(self, hf_config: Any, tokenizer: Any, model_path: str, cache: CacheAt | None = None) -> None:
        self.tokenizer = tokenizer
        self.model_path = model_path
        self.stats = RunStats()
        self._cache = self.cache_at(cache)
        self._identity: ScoreIdentity | None = None
        self._pair_tokenizer = PairTokenizer(
            tokenizer,
            vocab_size=hf_config.get_text_config().vocab_size,
            max_context=max_context(hf_config),
            overflow=self.config.overflow,
            is_encoder_decoder=hf_config.is_encoder_decoder,
        )
        self._rows = RowStream(self._pair_tokenizer, self.config, self.stats, self.load, self._work)

    @classmethod
    def from_config(cls, config: ScorerConfig, cache: str | Path | None = None) -> Scorer:
        """A scorer from a frozen ``config``, with ``cache`` as for the class; raises as the class does."""
        return cls(**{name: getattr(config, name) for name in ScorerConfig.__slots__}, cache=cache)

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
        parts of one. ``tokenizer`` is the model's, other arguments are those of :class:`fastscore.config.ScorerConfig`.

        Raises:
            ValueError: a bad argument, or (as ``InputError``) a model whose LM head is of an unknown kind.
        """
        if not hasattr(model, "get_output_embeddings"):
            raise InputError("from_model takes a model of transformers: Scorer.hugging_face_model(), not load().model")
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
        scorer._checkpoint = None
        scorer.hf_config = model.config
        scorer._set_up(model.config, tokenizer, name)
        from fastscore.models import prepare_model

        scorer._model = prepare_model(model, scorer.config)
        return scorer

    def load(self) -> LanguageModel:
        """Load the weights now (they are loaded on first use otherwise) and return the loaded model."""
        return self._model

    def hugging_face_model(self) -> PreTrainedModel:
        """The loaded model as transformers has it, for what needs more of it than scores."""
        if self._checkpoint is not None and self._checkpoint.forget():
            self.__dict__.pop("_model", None)
        model: Any = self._model.model
        return model

    @cached_property
    def hf_config(self) -> Any:
        """The model's Hugging Face config."""
        assert self._checkpoint is not None, "a model in memory brings its own"
        return self._checkpoint.hf_config

    @cached_property
    def _model(self) -> LanguageModel:
        assert self._checkpoint is not None, "a model in memory is loaded"
        return self._checkpoint.load()

    def score(self, pairs: Iterable[tuple[str, str]]) -> list[AnswerScore]:
        """Score text ``pairs`` ``(prompt, answer)``; the answer follows the prompt as it stands, space included.

        Raises:
            InputError: a pair without a scorable answer, or one that does not fit the model's context.
        """
        return self._score_pairs([Pair(prompt, answer) for prompt, answer in pairs])

    def score_tokens(
        self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]], on_progress: Progress | None = None
    ) -> list[AnswerScore]:
        """Score token-id ``pairs`` ``(prompt_ids, answer_ids)``, used as they are: nothing is added.

        Each may be a list, an array or a tensor of one dimension. ``on_progress`` gets the counters so far.

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
        """Score ``requests`` that were tokenised before. Where ``plan`` is given they were planned too, and no cache is
        asked. ``on_progress`` gets the counters so far.

        Raises:
            RuntimeError: a score that is no number.
        """
        work = self._work(requests) if plan is None else Work(plan, requests)
        return Launch(self._model, work, self.stats, on_progress).scores("pair {}".format)

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
        chat_template: bool = False,
        system_prompt: str | None = None,
        max_length: int | None = None,
        score: ScoreConfig | None = None,
    ) -> list[dict[str, Any]]:
        """``rows`` as dictionaries, with ``teacher_scores`` added; the rest as in :class:`fastscore.config.TaskConfig`.

        ``teacher_scores[i]`` is the mean log-probability in nats of the answer given candidate i, in the order
        ``pos + neg`` (or ``history``, or ``choices``); higher is better. ``score`` asks for other definitions.
        Preference rows get the sums ``ref_chosen_logps`` and ``ref_rejected_logps`` instead.

        Raises:
            InputError: naming the row (counted from 1) and its field.
        """
        score = score or ScoreConfig()
        config = TaskConfig(
            task, template, answers, combine, seed, key_max_length, chat_template, system_prompt, max_length, score
        )
        stream = self.stream_rows((Row(dict(row), line=line) for line, row in enumerate(rows, start=1)), config)
        return [output_row(scored.row, config, scored.teacher_scores, scored.teacher_raw) for scored in stream]

    def stream_rows(
        self,
        rows: Iterable[Row],
        task_config: TaskConfig,
        *,
        on_bad_row: OnBadRow | None = None,
        on_progress: Progress | None = None,
        cache: RunCache | None = None,
    ) -> Generator[ScoredRow, None, None]:
        """Score ``rows`` as they come, a window at a time, in input order; ``task_config`` says how they become pairs.

        A bad row raises, or is handed to ``on_bad_row`` and left out. On any device but a CPU, ``rows`` are read and
        ``on_bad_row`` is called in a thread that is one window ahead; it ends with this iterator (close it to leave
        early). ``cache`` takes the place of the scorer's own; ``on_progress`` gets the counters so far.
        """
        stream = self.stream_scores(rows, task_config, on_bad_row=on_bad_row, on_progress=on_progress, cache=cache)
        with closing(stream):
            for pairs, scores in stream:
                yield scored_row(pairs, scores, task_config)

    def stream_scores(
        self,
        rows: Iterable[Row],
        task_config: TaskConfig,
        *,
        on_bad_row: OnBadRow | None = None,
        on_progress: Progress | None = None,
        cache: RunCache | None = None,
    ) -> Generator[tuple[RowPairs, Scores], None, None]:
        """The same with the scores of each row's pairs as they are; ``rows`` may be parts of rows.

        ``task_config``, ``on_bad_row``, ``on_progress`` and ``cache`` as for :meth:`stream_rows`.
        """
        return self._rows.scores(rows, task_config, on_bad_row, on_progress, cache)

    def plan_windows(
        self, rows: Iterable[Row], task_config: TaskConfig, *, on_bad_row: OnBadRow | None = None
    ) -> Iterator[tuple[Window, Plan]]:
        """What :meth:`stream_rows` would score, same arguments, without a cache; and the plans. Loads the model."""
        return self._rows.plans(rows, task_config, on_bad_row)

    def cache_at(self, place: CacheAt | None) -> RunCache:
        """A cache of this scorer's scores, opened when it is first used; close it. Without a place nothing is kept."""
        return RunCache(place, self.identity)

    def identity(self) -> ScoreIdentity:
        """What scores of this scorer are known by in a cache. Loads the model, and reads its files once.

        Raises:
            InputError: the model's files can't be found or read, or are not those that were loaded.
        """
        if self._checkpoint is None:
            raise InputError("what is in a model in memory is unknown: its scores can't be kept in a cache")
        if self._identity is None:
            self._identity = self._checkpoint.identity(self._model)
        return self._identity

    def check_task(self, config: TaskConfig) -> None:
        """See that the tokenizer has what ``config`` asks for: a chat template, an EOS token. Loads no weights.

        Raises:
            InputError: it has not.
        """
        self._rows.check(config)

    def describe(self) -> dict[str, Any]:
        """What runs here and how, for logs and for a run's metadata. Loads the model."""
        commit = None if self._checkpoint is None else self._checkpoint.commit
        return describe_run(self._model, self.config, self.model_path, commit)

    def _work(self, requests: Sequence[ScoringRequest], cache: RunCache | None = None) -> Work:
        return make_work(self._model, requests, (cache or self._cache).open())

    def _score_pairs(self, pairs: Sequence[Pair], on_progress: Progress | None = None) -> list[AnswerScore]:
        requests: list[ScoringRequest] = []
        for index, result in enumerate(self._pair_tokenizer.encode(pairs)):
            if isinstance(result, InputError):
                raise InputError(f"pair {index}: {result}") from result
            requests.append(result)
        return self.score_requests(requests, on_progress=on_progress)


def _ids(token_ids: Any) -> tuple[int, ...]:
    return tuple(token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids)
