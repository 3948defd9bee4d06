"""Counters of several workers together, and how much of their time they were at work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastscore.block_scores import BlockScores
from fastscore.run_stats import RunStats


class TotalStats:
    """Counters of all workers together; ``seconds`` are those of the busiest, since they work side by side.

    workers: how many there are at a time.
    pairs: how many each worker has scored.
    repeated: how often a block was begun again.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.stats = RunStats()
        self.pairs: dict[str, int] = {}
        self.repeated = 0
        self._seconds: dict[str, float] = {}
        self._spans: dict[str, tuple[float, float]] = {}
        self._seconds_there = 0.0

    def add(self, result: BlockScores) -> None:
        """Count what a worker has done."""
        worker = result.worker
        seconds = self._seconds[worker] = self._seconds.get(worker, 0.0) + result.stats.seconds
        self.pairs[worker] = self.pairs.get(worker, 0) + result.stats.pairs
        self.repeated += result.tries - 1
        if result.began:
            began, ended = self._spans.get(worker, (result.began, result.ended))
            self._spans[worker] = min(began, result.began), max(ended, result.ended)
        busiest = max(self.stats.seconds, seconds)
        for name, value in replace(self.stats.plus(result.stats), seconds=busiest).counters().items():
            setattr(self.stats, name, value)

    def end_job(self) -> None:
        """All results of a job have been added. A worker was there from its first batch to the end of the job, and one
        that was replaced to the end of its last block; what lies between two jobs is nobody's time."""
        spans = sorted(self._spans.values(), key=lambda span: span[1])
        replaced = max(0, len(spans) - self.workers)
        for place, (began, ended) in enumerate(spans):
            self._seconds_there += (ended if place < replaced else spans[-1][1]) - began
        self._spans.clear()

    def busy(self) -> float | None:
        """The part of the workers' time that they spent in the model, in the jobs that have ended; None before."""
        if self._seconds_there <= 0:
            return None
        return round(sum(self._seconds.values()) / self._seconds_there, 4)

    def describe(self, engine: str) -> dict[str, Any]:
        """For a run's metadata: what carried the blocks, and who scored how much."""
        return {
            "engine": engine,
            "workers": self.workers,
            "pairs_by_worker": dict(self.pairs),
            "seconds_by_worker": {worker: round(seconds, 3) for worker, seconds in self._seconds.items()},
            "busy": self.busy(),
            "repeated_blocks": self.repeated,
        }

    def with_running(self, running: Mapping[str, RunStats]) -> RunStats:
        """The same with what each worker has done of a block that is not finished, for a progress bar."""
        total, busiest = replace(self.stats), self.stats.seconds
        for worker, stats in running.items():
            busiest = max(busiest, self._seconds.get(worker, 0.0) + stats.seconds)
            total = total.plus(stats)
        return replace(total, seconds=busiest)
