"""Signals that end a run: what is in flight is finished and kept first.

Handlers belong to the process, and so does what they wait for.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(KeyboardInterrupt):
    """A signal ends the run. ``at_once``: the second one, after which nothing more is kept.

    ``hint`` says what is left of the run, and how to go on.
    """

    def __init__(self, signum: int, at_once: bool = False) -> None:
        super().__init__(signum)
        self.signum = signum
        self.at_once = at_once
        self.hint = ""


@dataclass(slots=True)
class _Signals:
    in_flight: int = 0
    waiting: int | None = None
    """A signal that came while something was in flight."""
    came: bool = False


_signals = _Signals()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted` in the block, at once or when :func:`held_back` is left.

    The second signal raises at once, the third ends the process as if nobody handled it. Signals that are ignored
    (``nohup``) or handled by somebody else stay so.
    """
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return

    def stop(signum: int, _: FrameType | None) -> None:
        if _signals.came:
            signal.signal(signum, signal.SIG_DFL)
            raise Interrupted(signum, at_once=True)
        _signals.came = True
        if not _signals.in_flight:
            raise Interrupted(signum)
        _signals.waiting = signum

    before: dict[int, Any] = {}
    usual = (signal.SIG_DFL, signal.default_int_handler)
    for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
        if (handler := signal.getsignal(number)) in usual:
            before[number] = handler
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals.came, _signals.waiting = False, None


@contextmanager
def held_back() -> Iterator[None]:
    """A signal that comes in the block raises :class:`Interrupted` when the block is left."""
    _signals.in_flight += 1
    try:
        yield
    finally:
        _signals.in_flight -= 1
    if _signals.waiting is not None and not _signals.in_flight:
        signum, _signals.waiting = _signals.waiting, None
        raise Interrupted(signum)
