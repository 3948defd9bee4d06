"""Contenders run by turns, the table of their medians, and their rounds in pytest-benchmark's records."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Timed:
    """What a call returns that was timed where it ran: in another process, without the way there and back."""

    seconds: float


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one call: those it names itself, or else by the wall clock, a GPU's queue drained before and after."""
    _drain()
    started = time.perf_counter()
    result = run()
    _drain()
    return result.seconds if isinstance(result, Timed) else time.perf_counter() - started


def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round: A B C, A B C, ... so that a slow minute of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(seconds_of(run))
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


class MeasuredRounds:
    """A clock that stands still except for the seconds that a round took when it was measured.

    pytest-benchmark times one test after another; here the contenders take turns. So they are timed before, and this
    clock hands their rounds to its records.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.rounds: list[float] = []

    def __call__(self) -> float:
        return self.now

    def pass_round(self) -> None:
        self.now += self.rounds.pop(0)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others])

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, rows)])


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
