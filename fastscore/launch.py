"""One plan on its way through the model: batches are queued, and scores read when the device has come to the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from fastscore.aggregate import is_finite, not_finite, split_answers
from fastscore.answer_head import AnswerHead, SlotScores
from fastscore.language_model import LanguageModel, Plan
from fastscore.types import AnswerScore, RunStats, ScoringRequest

Progress = Callable[[RunStats], None]


class Launch:
    """tokens -> packs -> hidden states of answer rows -> NLL -> scores, for the requests of one plan.

    On CUDA, :meth:`queue` gives work to the device and returns before it is done. ``stats`` count what was queued;
    their ``seconds`` are those spent in here, which is the device's time as long as its queue is not empty.
    """

    def __init__(
        self,
        model: LanguageModel,
        plan: Plan,
        requests: Sequence[ScoringRequest],
        stats: RunStats,
        on_progress: Progress | None = None,
    ) -> None:
        self._model = model
        self._plan = plan
        self._requests = requests
        self._lengths = [len(request.token_ids) for request in requests]
        self._stats = stats
        self._on_progress = on_progress
        self._steps = self._batches()
        self._slot_scores: SlotScores | None = None

    def queue(self, at_most: int | None = None) -> None:
        """Give the device the next batches; all that are left where no number is given."""
        for _ in islice(self._steps, at_most):
            pass

    def scores(self, place: Callable[[int], str]) -> list[AnswerScore]:
        """Wait for the device; scores in the order of the requests, every one a number.

        Raises:
            RuntimeError: the model gave something else; ``place`` says where the request of an index came from.
        """
        scores = self._scores()
        bad = [index for index, score in enumerate(scores) if not is_finite(score)]
        for index in bad:
            # One that overflows spoils others of its pack (attention masks by zero, and zero times nan is nan).
            alone = [self._requests[index]]
            (by_itself,) = Launch(self._model, self._model.plan(alone), alone, self._stats)._scores()
            if not is_finite(by_itself):
                raise not_finite(by_itself, place(index))
        if bad:
            raise not_finite(scores[bad[0]], place(bad[0]))
        return scores

    def _scores(self) -> list[AnswerScore]:
        self.queue()
        assert self._slot_scores is not None, "all batches are queued"
        started = time.perf_counter()
        nll_Q, greedy_Q = self._slot_scores.wait()
        slots = self._plan.slots
        answers = split_answers(nll_Q[slots.slot].tolist(), greedy_Q[slots.slot].tolist(), slots.offset_R.tolist())
        scores = list(answers)
        self._stats.seconds += time.perf_counter() - started
        if self._on_progress is not None:
            self._on_progress(replace(self._stats))
        return scores

    def _batches(self) -> Iterator[None]:
        model, slots, stats = self._model, self._plan.slots, self._stats
        started = time.perf_counter()
        stats.count_padded(self._lengths)
        head = AnswerHead(model.head, slots.count, fixed_rows=model.deterministic)
        share = len(self._lengths) / max(1, slots.count)
        done = 0.0
        for batch, hidden_AD in model.run(self._plan):
            head.add(batch, hidden_AD)
            # A request is done with its last answer token; in between, pairs are counted by their share of the slots.
            done += share * len(batch.slot_Q)
            stats.tokens_computed += batch.num_tokens
            stats.packs += 1
            stats.pack_tokens += max(model.max_batch_tokens, batch.num_tokens)
            stats.seconds += time.perf_counter() - started
            if self._on_progress is not None:
                self._on_progress(replace(stats, pairs=stats.pairs + int(done)))
            yield
            started = time.perf_counter()
        self._slot_scores = head.finish()
        stats.pairs += len(self._lengths)
        stats.answer_tokens += len(slots.slot)
        stats.tokens_unpadded += sum(self._lengths)
        stats.seconds += time.perf_counter() - started
