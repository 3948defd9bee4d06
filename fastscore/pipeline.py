"""Windows of rows through the model: in turn, or prepared in a thread while a device of its own is at work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future

import torch

from fastscore.language_model import LanguageModel, Plan
from fastscore.launch import Launch
from fastscore.read_ahead import ReadAhead, Stopped
from fastscore.types import AnswerScore, Row
from fastscore.windows import Window

BATCHES_AHEAD = 2
"""Batches of the next window that the device is given before the scores of the last one are waited for."""

Load = Callable[[], LanguageModel]
Prepare = Callable[[Iterable[Row], Load], Iterator[tuple[Window, Plan]]]
"""Rows and what gives the model: windows of the rows, each with its plan. The model is asked for after the tokens."""


def runs_beside_host(device: torch.device) -> bool:
    """Whether the device works while the host does something else.

    On a CPU nothing overlaps: there is no core to spare, and all threads of a matrix product wait for the last one.
    """
    return device.type != "cpu"


def score_in_turn(
    rows: Iterable[Row], prepare: Prepare, load: Load, launch: Callable[[Window, Plan], Launch]
) -> Generator[tuple[Window, list[AnswerScore]], None, None]:
    """Each window read, tokenised, planned and scored before the next, in the caller's thread."""
    for window, plan in prepare(rows, load):
        yield window, launch(window, plan).scores(window.place)
        del window, plan  # not in memory while the next is made


def score_beside(
    rows: Iterable[Row], prepare: Prepare, load: Load, launch: Callable[[Window, Plan], Launch]
) -> Generator[tuple[Window, list[AnswerScore]], None, None]:
    """The same, with the next window prepared in a thread, and its first batches queued before scores are waited for.

    The first window is prepared while the model is loaded. A file of one window overlaps with nothing else, and is
    not cut into smaller ones that the device could begin with: prefixes are shared within a window only, and
    ``fastscore bench`` shows that preparing a window takes a small part of the time it takes a model that is worth a
    GPU.
    """
    loaded: Future[LanguageModel] = Future()

    def make(stopped: threading.Event) -> Iterator[tuple[Window, Plan]]:
        return prepare(_until(stopped, rows), loaded.result)

    with ReadAhead(make) as windows:
        try:
            loaded.set_result(load())
        except Exception as error:  # noqa: BLE001 - the thread raises it, after what is wrong with the first rows
            loaded.set_exception(error)
        finally:
            loaded.cancel()  # interrupted: the thread must not wait for a model
        before: tuple[Window, Launch] | None = None
        for window, plan in windows:
            launched = launch(window, plan)
            if before is not None:
                launched.queue(BATCHES_AHEAD)
                yield _scored(*before)
                before = None  # not in memory while this one runs
            launched.queue()
            if windows.has_next():
                before = window, launched
            else:  # the device has nothing to do anyway, or an error is next: what was scored comes before it
                yield _scored(window, launched)
            del window, plan, launched


def _scored(window: Window, launched: Launch) -> tuple[Window, list[AnswerScore]]:
    return window, launched.scores(window.place)


def _until(stopped: threading.Event, rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        if stopped.is_set():
            raise Stopped
        yield row
