"""A process that torchrun started beside rank 0: it scores the blocks it is given, or holds a part of rank 0's model.

It says nothing."""

from __future__ import annotations

import logging
import os
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import fastscore
from fastscore.block_scores import BlockScores, Job, score_block, sendable, sendable_error
from fastscore.blocks import Block
from fastscore.cache_file import CacheAt
from fastscore.config import ScorerConfig
from fastscore.interrupts import Interrupted, ended_by_signals
from fastscore.rank_messages import GOODBYE_SECONDS, HEARTBEAT_SECONDS, Channel, Lost, leave, local_rank
from fastscore.run_stats import RunStats
from fastscore.types import InputError

FAILED, BAD_INPUT, SIGNALLED = 1, 2, 128
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
_REPORT_SECONDS = 0.5


def follow(rank: int) -> int:
    """Work for rank 0 until it says how the run ended; that is this process's status too.

    What it says, if anything: that rank 0 is gone.
    """
    logger = logging.getLogger("fastscore")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    follower = Follower()
    follower.start()
    in_order = False
    try:
        with ended_by_signals():
            status = follower.work()
        in_order = True
    except Lost:
        print(f"fastscore: failed: rank {rank}: rank 0 is gone before the run has ended", file=sys.stderr)
        status = FAILED
    except Failed as failed:
        status = failed.status
    except Interrupted as stop:  # of rank 0 too, which says so
        follower.tell_interrupted()
        status = SIGNALLED + stop.signum
    finally:
        follower.close()
    return leave(status, follower.stop() and in_order)


def open_on_device(config: ScorerConfig) -> Any:
    """A scorer on this rank's own GPU, where there are GPUs; raises as :func:`on_own_device`."""
    return fastscore.Scorer.from_config(on_own_device(config))


def on_own_device(config: ScorerConfig) -> ScorerConfig:
    """The config with this rank's own GPU, where there are GPUs.

    Raises:
        InputError: there is no GPU for this rank, or the model was to be spread over all of them.
    """
    if config.device_map is not None:
        raise InputError(
            "with several processes each has one device; --device-map spreads one process over all of them"
        )
    if config.device in ("auto", "cuda") and torch.cuda.is_available():
        if (place := local_rank()) >= torch.cuda.device_count():
            raise InputError(f"{place + 1} processes on this machine, but {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(place)
        config = replace(config, device=f"cuda:{place}")
    return config


class Failed(Exception):
    """This rank ends in the middle of something, and with that status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Follower:
    """A rank that scores what it is given."""

    def __init__(self) -> None:
        self._channel = Channel(0)
        self._scorer: Any = None  # a program has one configuration, but may have several jobs
        self._cache: Any = None
        self._place: CacheAt | None = None
        self._progress: tuple[int, RunStats] | None = None
        self._is_busy = False
        self._reporting = threading.Lock()
        self._ended = threading.Event()
        # In a thread: the one that scores must not wait for it.
        self._reporter = threading.Thread(target=self._report, name="fastscore-report", daemon=True)

    def start(self) -> None:
        """Tell rank 0 from now on how far a block is, or only that somebody is there. Between blocks it is rank 0 that
        does so, and does not listen."""
        self._reporter.start()

    def stop(self) -> bool:
        """Tell nothing more; whether that succeeded."""
        self._ended.set()
        self._reporter.join(GOODBYE_SECONDS)
        return not self._reporter.is_alive()

    def work(self) -> int:
        """Score blocks until the run has ended; its status.

        Raises:
            Lost: rank 0 is gone.
        """
        while True:
            with self._reporting:
                self._is_busy = False
            self._channel.send("wanted")
            while (order := self._channel.receive())[0] == "wait":
                pass
            if order[0] == "end":
                return int(order[1])
            if order[0] == "share":
                self._share(order[1])
                continue
            job, block = order[1:]
            self._is_busy = True
            result = self._score(job, block)
            self._progress = None
            self._channel.send("scores", sendable(replace(result, worker=str(dist.get_rank()))))

    def _share(self, config: ScorerConfig) -> None:
        """Hold a part of rank 0's model until the run ends.

        Raises:
            Lost: rank 0 is gone.
            Failed: this rank can't go on, and rank 0 knows why.
        """
        from fastscore.shared_model import follow_model  # transformers, which has to be quiet by then

        self._is_busy = True
        try:
            follow_model(lambda: open_on_device(config).load())
        except Lost:
            raise
        except Exception as error:
            self._channel.send("failed", sendable_error(error))
            raise Failed(BAD_INPUT if isinstance(error, InputError) else FAILED) from error

    def tell_interrupted(self) -> None:
        """Say that this rank leaves, and not because it failed."""
        with suppress(Lost):
            self._channel.send("interrupted")

    def _score(self, job: Job, block: Block) -> BlockScores:
        try:
            if self._scorer is None:
                self._scorer = open_on_device(job.scorer_config)
            if self._cache is None or self._place != job.cache:
                self.close()
                self._cache, self._place = self._scorer.cache_at(job.cache), job.cache
        except Exception as error:  # noqa: BLE001 - rank 0 raises it
            return BlockScores(block.index, "", error=error)
        return score_block(self._scorer, self._cache, job, block, partial(self._see, block.index))

    def close(self) -> None:
        """Let go of the cache."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _see(self, index: int, stats: RunStats) -> None:
        self._progress = index, stats

    def _report(self) -> None:
        told, silent = None, 0.0
        while not self._ended.wait(_REPORT_SECONDS):
            silent += _REPORT_SECONDS
            with self._reporting:
                progress = self._progress
                news = None if progress is told else progress
                if not self._is_busy or (news is None and silent < HEARTBEAT_SECONDS):
                    continue
                try:
                    self._channel.send(*(("alive",) if news is None else ("progress", *news)))
                except Lost:  # the thread that works meets it too
                    return
            told, silent = progress, 0.0
