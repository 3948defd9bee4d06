"""Windows of rows through the model: in turn, or prepared in a thread while a device of its own is at work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import torch

from fastscore.interrupts import Interrupted
from fastscore.kept_scores import Work
from fastscore.language_model import LanguageModel
from fastscore.launch import Launch
from fastscore.read_ahead import ReadAhead, until
from fastscore.types import AnswerScore, Row
from fastscore.windows import Window

BATCHES_AHEAD = 2
"""Batches of the next window that the device is given before the scores of the last one are waited for."""

Load = Callable[[], LanguageModel]
Prepare = Callable[[Iterable[Row], Load], Iterator[tuple[Window, Work]]]
"""Rows and what gives the model: windows of the rows, each with its work. The model is asked for after the tokens."""


def runs_beside_host(device: torch.device) -> bool:
    """Whether the device works while the host does something else.

    On a CPU nothing overlaps: there is no core to spare, and all threads of a matrix product wait for the last one.
    """
    return device.type != "cpu"


def score_in_turn(
    rows: Iterable[Row], prepare: Prepare, load: Load, launch: Callable[[Work], Launch]
) -> Generator[tuple[Window, list[AnswerScore]], None, None]:
    """Each window read, tokenised, planned and scored before the next, in the caller's thread."""
    for window, work in prepare(rows, load):
        in_flight = [(window, launch(work))]
        del window, work  # not in memory while the next is made
        with _kept(in_flight):
            scored = _scored_first(in_flight)
        yield scored
        del scored


def score_beside(
    rows: Iterable[Row], prepare: Prepare, load: Load, launch: Callable[[Work], Launch]
) -> Generator[tuple[Window, list[AnswerScore]], None, None]:
    """The same, with the next window prepared in a thread, and its first batches queued before scores are waited for.

    The first window is prepared while the model is loaded. A file of one window overlaps with nothing else, and is
    not cut into smaller ones that the device could begin with: prefixes are shared within a window only, and
    ``fastscore bench`` shows that preparing a window takes a small part of the time it takes a model that is worth a
    GPU.
    """
    loaded: Future[LanguageModel] = Future()

    def make(stopped: threading.Event) -> Iterator[tuple[Window, Work]]:
        return prepare(until(stopped, rows), loaded.result)

    with ReadAhead(make) as windows:
        try:
            loaded.set_result(load())
        except Exception as error:  # noqa: BLE001 - the thread raises it, after what is wrong with the first rows
            loaded.set_exception(error)
        finally:
            loaded.cancel()  # interrupted: the thread must not wait for a model
        in_flight: list[tuple[Window, Launch]] = []
        with _kept(in_flight):
            for window, work in windows:
                in_flight.append((window, launch(work)))
                del window, work
                if len(in_flight) == 2:
                    in_flight[1][1].queue(BATCHES_AHEAD)
                    yield _scored_first(in_flight)
                in_flight[0][1].queue()
                # Otherwise the device has nothing to do anyway, or an error is next: what was scored comes before it.
                if not windows.has_next():
                    yield _scored_first(in_flight)


def _scored_first(in_flight: list[tuple[Window, Launch]]) -> tuple[Window, list[AnswerScore]]:
    """Wait for the first; then it is no longer in flight, nor in memory."""
    window, launched = in_flight[0]
    scores = launched.scores(window.place)
    del in_flight[0]
    return window, scores


@contextmanager
def _kept(in_flight: list[tuple[Window, Launch]]) -> Iterator[None]:
    """What is in flight when the block is left early, by a signal or because nobody wants more, goes into the cache."""
    try:
        yield
    except (Interrupted, GeneratorExit) as stop:
        if not (isinstance(stop, Interrupted) and stop.at_once):
            for _, launched in in_flight:
                launched.keep()
        raise
