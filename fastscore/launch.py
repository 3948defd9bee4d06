"""One window's work on its way through the model: batches are queued, and scores read when the device is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

from fastscore.aggregate import is_finite, not_finite, split_answers
from fastscore.execution import Execution
from fastscore.interrupts import held_back
from fastscore.kept_scores import Work
from fastscore.language_model import LanguageModel
from fastscore.run_stats import RunStats
from fastscore.types import AnswerScore

Progress = Callable[[RunStats], None]

KEEP_SECONDS = 1.0
"""With a cache, answer rows wait for the LM head no longer than this, so that a kill loses no more than that."""
KEEP_COST = 50
"""Nor less than so many times what a call of the head takes, so that calling it early costs a fiftieth at most."""


class Launch:
    """tokens -> packs -> hidden states of answer rows -> NLL -> scores, for the requests that are to be computed.

    On CUDA, :meth:`queue` gives work to the device and returns before it is done. ``stats`` count what was queued;
    their ``seconds`` are those spent in here, which is the device's time as long as its queue is not empty. A signal
    that ends the run (:mod:`fastscore.interrupts`) takes effect between two batches.
    """

    def __init__(self, model: LanguageModel, work: Work, stats: RunStats, on_progress: Progress | None = None) -> None:
        self._model = model
        self._work = work
        self._lengths = [len(request.token_ids) for request in work.requests]
        self._stats = stats
        self._on_progress = on_progress
        with held_back():  # other processes are told, and all of it
            self._execution = Execution(model, work.plan)
        self._called = 0.0
        self._patience = KEEP_SECONDS
        self._steps = self._batches()

    def queue(self, at_most: int | None = None) -> None:
        """Give the device the next batches; all that are left where no number is given."""
        for _ in islice(self._steps, at_most):
            pass

    def scores(self, place: Callable[[int], str]) -> list[AnswerScore]:
        """Wait for the device; scores in the order of the window's requests, every one a number.

        Raises:
            RuntimeError: the model gave something else; ``place`` says where the request of an index came from.
        """
        scores = self._scores()
        bad = [index for index, score in enumerate(scores) if not is_finite(score)]
        for index in bad:
            # One that overflows spoils others of its pack (attention masks by zero, and zero times nan is nan).
            alone = [self._work.requests[index]]
            (by_itself,) = Launch(self._model, Work(self._model.plan(alone), alone), self._stats)._scores()
            if not is_finite(by_itself):
                raise not_finite(by_itself, place(self._work.place(index)))
        if bad:
            raise not_finite(scores[bad[0]], place(self._work.place(bad[0])))
        return self._work.with_known(scores)

    def keep(self) -> None:
        """Finish what has been queued and put it into the cache: how an interrupted run ends."""
        if self._work.keeper is not None:
            with held_back():
                self._execution.flush()
                self._put(wait=True)

    def _scores(self) -> list[AnswerScore]:
        self.queue()
        started = time.perf_counter()
        while self._put(wait=True, at_most=1):
            pass
        nll_Q, greedy_Q = self._execution.head.scores.wait()
        slots = self._work.plan.slots
        answers = split_answers(nll_Q[slots.slot].tolist(), greedy_Q[slots.slot].tolist(), slots.offset_R.tolist())
        scores = list(answers)
        self._stats.seconds += time.perf_counter() - started
        if self._on_progress is not None:
            self._on_progress(replace(self._stats))
        return scores

    def _batches(self) -> Iterator[None]:
        model, slots, stats = self._model, self._work.plan.slots, self._stats
        started = self._called = time.perf_counter()
        stats.count_padded(self._lengths)
        stats.pairs += self._work.num_known
        stats.cached += self._work.num_known
        share = len(self._lengths) / max(1, slots.count)
        done = 0.0
        while True:
            with held_back():
                batch = self._execution.step()
                if batch is None:
                    break
                self._keep_in_time()
            # A request is done with its last answer token; in between, pairs are counted by their share of the slots.
            done += share * len(batch.slot_Q)
            stats.tokens_computed += batch.num_tokens
            stats.packs += 1
            stats.pack_tokens += max(model.batch_room, batch.num_tokens)
            stats.seconds += time.perf_counter() - started
            if self._on_progress is not None:
                self._on_progress(replace(stats, pairs=stats.pairs + int(done)))
            yield
            started = time.perf_counter()
        with held_back():
            self._execution.finish()
        stats.pairs += len(self._lengths)
        stats.answer_tokens += len(slots.slot)
        stats.tokens_unpadded += sum(self._lengths)
        stats.seconds += time.perf_counter() - started

    def _keep_in_time(self) -> None:
        """With a cache: whatever scores have come are put there, and the head is called when rows have waited long."""
        if self._work.keeper is None:
            return
        now = time.perf_counter()
        if not self._execution.head.num_rows:
            self._called = now
        elif now - self._called >= self._patience:
            self._execution.flush()
            self._called = time.perf_counter()
            self._patience = max(KEEP_SECONDS, KEEP_COST * (self._called - now))
        self._put()

    def _put(self, wait: bool = False, at_most: int | None = None) -> bool:
        """Put scores that are here, or with ``wait`` those on their way, into the cache; whether there were any."""
        keeper, scores, count = self._work.keeper, self._execution.head.scores, 0
        if keeper is None:
            return False
        with held_back():
            while count != at_most and (slot_Q := scores.take(wait)) is not None:
                keeper.put(slot_Q, scores.nll_Q, scores.greedy_Q)
                count += 1
        return count > 0
