"""An iterator run in a thread of its own, one item ahead of whoever uses the items."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

logger = logging.getLogger("fastscore")

T = TypeVar("T")
STOP_SECONDS = 10.0
"""How long leaving waits for the thread. It looks for the stop between two rows; a source that blocks can't look."""

_END: Any = object()


class Stopped(Exception):
    """Raised in the thread, by whoever looks for the stop, to leave the iterator from inside."""


def until(stopped: threading.Event, items: Iterable[T]) -> Iterator[T]:
    """The items, as long as somebody wants them; raises :class:`Stopped` then."""
    for item in items:
        if stopped.is_set():
            raise Stopped
        yield item


def locked(lock: threading.Lock, items: Iterable[T]) -> Iterator[T]:
    """The items, each made while the lock is held."""
    source = iter(items)
    while True:
        with lock:
            item = next(source, _END)
        if item is _END:
            return
        yield item


class ReadAhead(Generic[T]):
    """Items in their order; while one is in use the next is made, so that at most two are in memory.

    ``make`` is given the event that is set when nobody wants items any more, and returns the iterator. What the
    iterator raises is raised here, after the items before it. The thread is gone when the ``with`` block is left.
    ``on_ready`` is called in the thread each time an item, the end or an error is there.
    """

    def __init__(
        self, make: Callable[[threading.Event], Iterator[T]], on_ready: Callable[[], None] = lambda: None
    ) -> None:
        self._make = make
        self._on_ready = on_ready
        self._stopped = threading.Event()
        self._wanted: SimpleQueue[Future[T] | None] = SimpleQueue()
        self._next: Future[T] = Future()
        # The thread sees the context variables of the one that asks, as if it were the same.
        work = contextvars.copy_context().run
        # A daemon: a source that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=work, args=(self._work,), name="fastscore-read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead[T]:
        self._wanted.put(self._next)
        self._thread.start()
        return self

    def __iter__(self) -> Iterator[T]:
        while True:
            item = self._next.result()
            if item is _END:
                return
            self._next = Future()
            self._wanted.put(self._next)
            yield item

    def has_next(self) -> bool:
        """Whether an item is there now: False while it is being made, at the end, and before an error."""
        return self._next.done() and self._next.exception() is None and self._next.result() is not _END

    def is_ready(self) -> bool:
        """Whether what comes next is there now: an item, the end, or an error."""
        return self._next.done()

    def wait(self, seconds: float | None = None) -> None:
        """Until it is, or so long."""
        wait([self._next], seconds)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._wanted.put(None)
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            logger.warning("the source of the rows does not return; its thread is left behind")

    def _work(self) -> None:
        items: Iterator[T] | None = None
        while (wanted := self._wanted.get()) is not None:
            try:
                items = self._make(self._stopped) if items is None else items
                wanted.set_result(next(items, _END))
            except BaseException as error:  # noqa: BLE001 - handed on to the thread that asks
                wanted.set_exception(error)
            self._on_ready()
            del wanted  # an item handed over is no longer held here
