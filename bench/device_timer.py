"""Times short calls on a device: events and graph replays on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Run = Callable[[int], object]
"""A call; its number says which of several input sets it takes, so that a cache does not hold its inputs."""

SHORT_SECONDS = 1e-3
"""Calls shorter than this are also timed as replays of a graph: the host is slower than they are."""
SAMPLE_SECONDS = 2e-3
"""A sample of short calls is at least about this long."""
MAX_CALLS = 64


class HostTimer:
    """For a CPU: no queue, no graphs, no separate memory."""

    cache_bytes = 0

    def seconds(self, run: Run, calls: int, lead: bool) -> float:
        """Mean of ``calls`` calls one after another; ``lead`` runs one before the clock starts, on the last inputs."""
        if lead:
            run(-1)
        started = time.perf_counter()
        for call in range(calls):
            run(call)
        return (time.perf_counter() - started) / calls

    def capture(self, run: Run, calls: int) -> Run | None:
        """The calls as one replay, or None where the device has no graphs."""
        return None

    def peak_bytes(self, run: Run) -> int | None:
        """Memory that one call allocates at most, its results included, or None where nobody counts."""
        return None

    def alive(self) -> bool:
        """False when an error has left the device unusable for this process."""
        return True


class CudaTimer(HostTimer):
    """Events on the current stream: the host's part of a call counts only where the device waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size

    def seconds(self, run: Run, calls: int, lead: bool) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if lead:
            # Keeps the device busy while the host queues the first timed call.
            run(-1)
        start.record()
        for call in range(calls):
            run(call)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def capture(self, run: Run, calls: int) -> Run | None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(0)  # Libraries make their handles and workspaces on a stream's first call.
            try:
                # A capture that fails leaves PyTorch before 2.12 unable to give memory back: it is not begun.
                torch.cuda.set_sync_debug_mode("error")
                run(0)
            except RuntimeError as error:
                print(f"not captured, timed as queued calls only: {error}", flush=True)
                return None
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side):
                for call in range(calls):
                    run(call)
        except RuntimeError as error:
            print(f"not captured, timed as queued calls only: {error}", flush=True)
            return None
        return lambda _: graph.replay()

    def peak_bytes(self, run: Run) -> int | None:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def alive(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


def timer_for(device: torch.device) -> HostTimer:
    return CudaTimer(device) if device.type == "cuda" else HostTimer()


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call, a sample for each round."""

    stream: list[float] = field(default_factory=list)
    """Calls queued one after another, as a program makes them."""
    graph: list[float] = field(default_factory=list)
    """Replays of a captured graph, without the host's part; empty where calls are long or wait for the host."""

    @property
    def seconds(self) -> float:
        """The device's own time as far as it is known: the median of the replays, else of the calls."""
        return statistics.median(self.graph or self.stream)

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median: differences below this are noise."""
        samples = self.graph or self.stream
        if len(samples) < 2:
            return 0.0
        lower, middle, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return (upper - lower) / middle


@dataclass(frozen=True, slots=True)
class _Sampled:
    samples: list[float]
    run: Run
    calls: int
    """Calls of ``run`` in a sample."""
    inside: int
    """Calls of the contender in each of those."""
    lead: bool


def take_turns(
    timer: HostTimer,
    runs: Mapping[Key, Run],
    captured: Mapping[Key, Run],
    *,
    input_sets: int,
    budget_seconds: float,
    max_rounds: int,
) -> dict[Key, Timing]:
    """Time all by turns (A B C, A B C, ...), after each has run.

    Args:
        timer: of the device that they run on.
        runs: the contenders.
        captured: what a graph may hold in the place of each; a contender that waits for the host is missing here.
        input_sets: over how many sets of inputs the calls go round.
        budget_seconds: the rounds end when about this much time has gone, though not before the third.
        max_rounds: nor are there more than this.
    """
    timings = {name: Timing() for name in runs}
    sampled: list[_Sampled] = []
    round_seconds = 0.0
    for name, run in runs.items():
        run(0)
        estimate = timer.seconds(run, 1, True)
        calls = max(1, min(MAX_CALLS, math.ceil(SAMPLE_SECONDS / estimate)))
        calls = math.ceil(calls / input_sets) * input_sets if calls > 1 else 1
        short = estimate < SHORT_SECONDS
        replay = timer.capture(captured[name], calls) if short and name in captured else None
        # A long call's queueing is nothing beside it, and a second long call would double the time.
        sampled.append(_Sampled(timings[name].stream, run, calls, 1, lead=estimate < 10 * SHORT_SECONDS))
        if replay is not None:
            sampled.append(_Sampled(timings[name].graph, replay, 1, calls, lead=True))
        round_seconds += estimate * calls * (4 if replay else 2)
    for one in sampled:
        # Captures have emptied the allocator's cache; filling it again belongs to nobody's time.
        one.run(-1)
    rounds = max(3, min(max_rounds, int(budget_seconds / max(round_seconds, 1e-9))))
    for _ in range(rounds):
        for one in sampled:
            one.samples.append(timer.seconds(one.run, one.calls, one.lead) / one.inside)
    return timings
