"""Processes that torchrun started, as one run: rank 0 reads, deals out blocks of pairs and writes; every rank scores.

Or all hold one model together (:mod:`fastscore.shared_model`), and rank 0 runs as one process does.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from fastscore.block_scores import BlockScores, Job, score_block
from fastscore.blocks import CutWindow, cut_windows
from fastscore.cache_file import CacheAt
from fastscore.config import ScorerConfig, TaskConfig
from fastscore.dealt import Dealt, FinishedRow, hand_on
from fastscore.rank_follower import BAD_INPUT, FAILED, follow, on_own_device, open_on_device
from fastscore.rank_messages import GOODBYE_SECONDS, HEARTBEAT_SECONDS, Channel, Lost, leave, meet
from fastscore.read_ahead import ReadAhead, locked, until
from fastscore.run_stats import RunStats
from fastscore.total_stats import TotalStats
from fastscore.types import InputError, Row, ScoredRow
from fastscore.windows import OnBadRow

_LOOK_SECONDS = 0.5
_SIGNAL_SECONDS = 1.0
_GIVE_UP_SECONDS = 8.0
"""Between another rank's failure and the end of this one that does not notice: less than torchrun's patience."""


def run_ranks(program: Callable[[Lead], None], share_model: bool) -> int:
    """Rank 0 runs the program and the others work for it; all have its exit status. Only rank 0 says anything.

    ``program`` ends as programs do, with or without SystemExit. ``share_model``: they are going to hold one together.
    """
    rank = meet(share_model)
    if rank:
        return follow(rank)
    lead = Lead(dist.get_world_size())
    status = FAILED
    try:
        program(lead)
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    finally:
        everyone_knows = lead.end(status)
    return leave(status, everyone_knows)


class Lead:
    """Rank 0's side of the others: deals blocks of the job there is, and misses whoever is gone."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.running: dict[str, RunStats] = {}
        self.changed = threading.Condition()
        self._job: Job | None = None
        self._dealt: Dealt | None = None
        self._total: TotalStats | None = None
        self._status: int | None = None
        self._failure: Exception | None = None
        self._interrupted = False
        self._shared: ScorerConfig | None = None
        self._threads = [
            threading.Thread(target=self._serve, args=(Channel(rank),), name=f"fastscore-rank-{rank}", daemon=True)
            for rank in range(1, world_size)
        ]
        for thread in self._threads:
            thread.start()

    def open_scorer(self, config: ScorerConfig) -> Any:
        """All ranks as one scorer: each with a model, or all with one."""
        if not config.tensor_parallel:
            return ManyRanks(self, config, open_on_device(config))
        # Not at the top: followers import this file before they have been made quiet.
        from fastscore.shared_model import SharedScorer

        scorer = SharedScorer.on_rank_0(on_own_device(config), self.check_lost)
        with self.changed:
            self._shared = config
            self.changed.notify_all()
        return scorer

    @contextmanager
    def dealing(self, job: Job, dealt: Dealt, total: TotalStats) -> Iterator[None]:
        """The other ranks get blocks of this job in the block; all is counted in ``total``."""
        with self.changed:
            self._job, self._dealt, self._total = job, dealt, total
            self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self._job = self._dealt = self._total = None
                self.running.clear()

    def take(self, result: BlockScores) -> None:
        """What came of a block."""
        with self.changed:
            self.running.pop(result.worker, None)
            if self._dealt is not None and self._total is not None and self._dealt.finish(result):
                self._total.add(result)
            self.changed.notify_all()

    def look(self) -> None:
        """There may be something to deal."""
        with self.changed:
            self.changed.notify_all()

    def check(self) -> None:
        """Raise what went wrong with another rank."""
        if self._failure is not None:
            raise self._failure

    def check_lost(self, by_signal: bool = True) -> None:
        """The same, after a moment, when this rank is ended by a signal: torchrun sends it when it misses another, and
        then that one is what has to be told. Others that a signal ends are not lost."""
        with self.changed:
            self.changed.wait_for(lambda: self._failure is not None, _SIGNAL_SECONDS)
            if self._failure is not None and not (by_signal and self._interrupted):
                raise self._failure

    def end(self, status: int) -> bool:
        """Tell all ranks how the run ended; whether all of them know."""
        all_heard = True
        if self._shared is not None:
            from fastscore.shared_model import end_following

            all_heard = end_following()
        with self.changed:
            self._status = status
            self.changed.notify_all()
        deadline = time.monotonic() + GOODBYE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return all_heard and not any(thread.is_alive() for thread in self._threads) and self._failure is None

    def _serve(self, channel: Channel) -> None:
        """What rank 0 does for one other rank, in a thread of its own."""
        at_work_on = -1
        shares = False
        try:
            while True:
                match channel.receive():
                    case ("progress", index, stats):
                        if index == at_work_on:
                            self.running[str(channel.peer)] = stats
                    case ("scores", result):
                        at_work_on = -1
                        self.take(result)
                    case ("wanted",):
                        while (order := self._next_order(shares)) is None:
                            channel.send("wait")
                        at_work_on = order[2].index if order[0] == "block" else -1
                        channel.send(*order)
                        shares = order[0] == "share"
                        if order[0] == "end":
                            return
                    case ("interrupted",):
                        self._interrupted = True
                    case ("failed", error):
                        self._fail(error)
                    case _:  # it says that it is there
                        pass
        except Lost as error:
            lost = RuntimeError(
                f"rank {channel.peer} is gone before the run has ended: it was killed, or its machine is"
            )
            self._fail(lost, error)
        except Exception as error:  # noqa: BLE001 - the thread that writes raises it; nobody else would notice
            self._fail(error)

    def _next_order(self, has_shared: bool) -> tuple[Any, ...] | None:
        def has_order() -> bool:
            may_claim = self._dealt is not None and self._dealt.may_claim and self._failure is None
            may_share = self._shared is not None and not has_shared
            return self._status is not None or may_claim or may_share

        with self.changed:
            if not self.changed.wait_for(has_order, HEARTBEAT_SECONDS):
                return None
            if self._status is not None:
                return "end", self._status
            if self._shared is not None:
                return "share", self._shared
            assert self._dealt is not None, "there is a job"
            try:
                block = self._dealt.claim()
            except Exception as error:  # noqa: BLE001 - the thread that writes raises it
                self._fail(error)
                return None
            return None if block is None else ("block", self._job, block)

    def _fail(self, error: Exception, cause: Exception | None = None) -> None:
        error.__cause__ = cause
        with self.changed:
            self._failure = self._failure or error
            self.changed.notify_all()
        if self._shared is not None:
            threading.Timer(_GIVE_UP_SECONDS, self._give_up).start()

    def _give_up(self) -> None:
        """End here where the program has not: it waits for a device that waits for the rank that is gone, and would not
        even hear a signal."""
        if self._status is None and self._failure is not None:
            print(f"\nfastscore: failed: {self._failure}", file=sys.stderr)
            leave(BAD_INPUT if isinstance(self._failure, InputError) else FAILED, in_order=False)


class ManyRanks:
    """What :func:`fastscore.run_files.run_files` asks of a scorer, done by all ranks."""

    def __init__(self, lead: Lead, config: ScorerConfig, own: Any) -> None:
        self._lead = lead
        self._config = config
        self._own = own
        self._total = TotalStats(lead.world_size)
        self.stats = self._total.stats

    def cache_at(self, place: CacheAt | None) -> Any:
        """A cache of rank 0; the others open the same file."""
        return self._own.cache_at(place)

    def describe(self) -> dict[str, Any]:
        """Of rank 0, and how many there are."""
        return {**self._own.describe(), **self._total.describe("torchrun")}

    def stream_rows(
        self,
        rows: Iterable[Row],
        task_config: TaskConfig,
        *,
        on_bad_row: OnBadRow | None = None,
        on_progress: Callable[[RunStats], None] | None = None,
        cache: Any = None,
    ) -> Generator[ScoredRow, None, None]:
        """As :meth:`fastscore.Scorer.stream_rows`, with bad rows handed on in the order of the rows.

        ``rows`` are read in a thread, a window and a half ahead.

        Raises:
            RuntimeError: a rank is gone.
        """
        lead, config = self._lead, self._config
        job = Job(config, task_config, on_bad_row is not None, None if cache is None else cache.place)
        reading = threading.Lock()  # held where a bad row is told of

        def windows(stopped: threading.Event) -> Iterator[CutWindow]:
            wanted = until(stopped, locked(reading, rows))
            return cut_windows(wanted, task_config, lead.world_size, config.window_tokens)

        def tell(stats: RunStats | None = None) -> None:
            if on_progress is not None:
                own = {} if stats is None else {"0": stats}
                with lead.changed:
                    now = self._total.with_running({**lead.running, **own})
                on_progress(now)

        def progress(stats: RunStats) -> None:
            lead.check()
            tell(stats)

        try:
            with ReadAhead(windows, lead.look) as ahead:
                dealt = Dealt(iter(ahead), ahead.is_ready)
                while not ahead.is_ready():
                    lead.check()
                    ahead.wait(_LOOK_SECONDS)
                mine = dealt.claim()  # the first: rank 0 always has the model, and can tell how it runs
                with lead.dealing(job, dealt, self._total):
                    while not dealt.is_done:
                        if mine is not None:
                            lead.take(replace(score_block(self._own, cache, job, mine, progress), worker="0"))
                        lead.check()
                        yield from hand_on(self._finished(dealt), task_config, on_bad_row, reading)
                        tell()
                        with lead.changed:
                            mine = dealt.claim()
                            if mine is None and not dealt.is_done:
                                lead.changed.wait(_LOOK_SECONDS)
            lead.check()
            self._total.end_job()
        except (KeyboardInterrupt, SystemExit):
            lead.check_lost()
            raise

    def _finished(self, dealt: Dealt) -> Iterator[FinishedRow]:
        """Rows in their order, as far as everything of them has come.

        Raises:
            Exception: what ended a block.
        """
        while True:
            with self._lead.changed:
                result = dealt.next_result()
                row = dealt.next_row() if result is None else None
                self._lead.changed.notify_all()
            if result is not None:
                if result.error is not None:
                    raise result.error
            elif row is not None:
                yield row
            else:
                return
