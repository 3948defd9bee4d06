"""A stream of rows through tokenizer and model: the scores of their pairs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing

from fastscore.aggregate import Scores, by_row
from fastscore.chat import check_chat_template
from fastscore.config import ScorerConfig, TaskConfig
from fastscore.devices import choose_device
from fastscore.kept_scores import RunCache, Work
from fastscore.language_model import LanguageModel, Plan
from fastscore.launch import Launch, Progress
from fastscore.pipeline import Load, runs_beside_host, score_beside, score_in_turn
from fastscore.run_stats import RunStats
from fastscore.tokenization import PairTokenizer
from fastscore.types import Row, RowPairs, ScoringRequest
from fastscore.windows import OnBadRow, Window, read_windows

MakeWork = Callable[[Sequence[ScoringRequest], RunCache | None], Work]


class RowStream:
    """What a scorer does with rows: ``load`` gives its model, ``make_work`` looks requests up and plans the rest."""

    def __init__(
        self, tokenizer: PairTokenizer, config: ScorerConfig, stats: RunStats, load: Load, make_work: MakeWork
    ) -> None:
        self._tokenizer = tokenizer
        self._spare_tokenizers: list[PairTokenizer] = []
        self._config = config
        self._stats = stats
        self._load = load
        self._make_work = make_work

    def scores(
        self,
        rows: Iterable[Row],
        task_config: TaskConfig,
        on_bad_row: OnBadRow | None,
        on_progress: Progress | None,
        cache: RunCache | None,
    ) -> Generator[tuple[RowPairs, Scores], None, None]:
        """As :meth:`fastscore.Scorer.stream_scores`."""
        self.check(task_config)
        beside = runs_beside_host(choose_device(self._config.device))
        tokenizer = self._tokenizer
        if beside:  # the thread's own: this one is the user's, and its settings change from call to call
            tokenizer = self._spare_tokenizers.pop() if self._spare_tokenizers else copy.deepcopy(tokenizer)

        def prepare(rows: Iterable[Row], load: Load) -> Iterator[tuple[Window, Work]]:
            for window in read_windows(rows, task_config, tokenizer, self._config.window_tokens, on_bad_row):
                load()
                yield window, self._make_work(window.requests, cache)
                del window  # not in memory while the next is read

        def launch(work: Work) -> Launch:
            return Launch(self._model, work, self._stats, on_progress)

        with ExitStack() as stack:
            if beside:
                stack.callback(self._spare_tokenizers.append, tokenizer)
            score = score_beside if beside else score_in_turn
            for window, scores in stack.enter_context(closing(score(rows, prepare, self._load, launch))):
                yield from by_row(window.rows, scores)
                del window, scores  # not in memory while the next are waited for

    def plans(
        self, rows: Iterable[Row], task_config: TaskConfig, on_bad_row: OnBadRow | None
    ) -> Iterator[tuple[Window, Plan]]:
        """As :meth:`fastscore.Scorer.plan_windows`."""
        self.check(task_config)
        for window in read_windows(rows, task_config, self._tokenizer, self._config.window_tokens, on_bad_row):
            yield window, self._model.plan(window.requests)
            del window  # not in memory while the next is read

    def check(self, config: TaskConfig) -> None:
        """As :meth:`fastscore.Scorer.check_task`."""
        check_chat_template(self._tokenizer.tokenizer, config)
        if config.score.append_eos:
            self._tokenizer.check_eos()

    @property
    def _model(self) -> LanguageModel:
        return self._load()
