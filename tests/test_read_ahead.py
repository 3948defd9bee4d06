"""An iterator in a thread of its own: order, errors, how far ahead it runs, and that the thread ends."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Iterator

import pytest

from fastscore import read_ahead
from fastscore.read_ahead import ReadAhead, Stopped

LIMIT = 20.0


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastscore-read-ahead"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    assert threads() == []
    yield
    assert threads() == []


def wait_until(condition: object, what: str) -> None:
    assert callable(condition)
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.001)


def test_all_items_in_order_from_another_thread() -> None:
    def make(_: threading.Event) -> Iterator[tuple[int, str]]:
        for number in range(100):
            yield number, threading.current_thread().name

    with ReadAhead(make) as items:
        found = list(items)
    assert [number for number, _ in found] == list(range(100))
    assert {name for _, name in found} == {"fastscore-read-ahead"}


def test_exactly_one_item_is_made_ahead() -> None:
    made: list[int] = []

    def make(_: threading.Event) -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    with ReadAhead(make) as items:
        for number in items:
            wait_until(lambda number=number: len(made) == min(number + 2, 10), "the next one is made meanwhile")
            time.sleep(0.005)
            assert len(made) == min(number + 2, 10), "and none beyond it"


@pytest.mark.parametrize("error", [ValueError("a"), SystemExit(3), KeyboardInterrupt(), RuntimeError("b")])
def test_an_error_comes_after_the_items_before_it(error: BaseException) -> None:
    def make(_: threading.Event) -> Iterator[int]:
        yield 1
        yield 2
        raise error

    found = []
    with pytest.raises(type(error)) as raised, ReadAhead(make) as items:  # noqa: PT012 - the items before are the point
        for item in items:
            found.append(item)
            if item == 2:
                wait_until(lambda: items._next.done(), "the error is there")
                assert not items.has_next()
    assert found == [1, 2]
    assert raised.value is error
    assert "make" in [entry.name for entry in raised.traceback], "the traceback leads to where it was raised"


def test_an_error_before_the_first_item() -> None:
    def make(_: threading.Event) -> Iterator[int]:
        raise OSError("no such thing")

    with pytest.raises(OSError, match="no such thing"), ReadAhead(make) as items:
        next(iter(items))


def test_has_next_knows_items_from_the_end() -> None:
    with ReadAhead(lambda _: iter([1, 2])) as items:
        seen = []
        for _ in items:
            wait_until(lambda: items._next.done(), "made")
            seen.append(items.has_next())
    assert seen == [True, False]


def test_leaving_early_stops_the_source() -> None:
    closed = threading.Event()

    def make(stopped: threading.Event) -> Iterator[int]:
        try:
            for number in range(10**9):
                if number and number % 10 == 0:
                    yield number
                if stopped.is_set():
                    raise Stopped
        finally:
            closed.set()

    with ReadAhead(make) as items:
        assert next(iter(items)) == 10
    wait_until(closed.is_set, "the source's own clean-up has run")

    with pytest.raises(ZeroDivisionError), ReadAhead(make) as items:  # noqa: PT012
        for _ in items:
            1 / 0  # noqa: B018


def test_a_source_that_never_returns_is_left_behind_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(read_ahead, "STOP_SECONDS", 0.05)
    go_on = threading.Event()

    def make(_: threading.Event) -> Iterator[int]:
        yield 1
        go_on.wait(LIMIT)
        yield 2

    with caplog.at_level(logging.WARNING, "fastscore"), ReadAhead(make) as items:
        assert next(iter(items)) == 1
    assert "does not return" in caplog.text
    (left,) = threads()
    assert left.daemon
    go_on.set()
    left.join(LIMIT)


def test_context_variables_are_those_of_the_caller() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    variable.set("ours")
    with ReadAhead(lambda _: iter(variable.get, None)) as items:
        assert next(iter(items)) == "ours"


def test_whoever_asks_is_told_when_something_is_there() -> None:
    go, told = threading.Event(), threading.Semaphore(0)

    def make(_: threading.Event) -> Iterator[int]:
        assert go.wait(LIMIT)
        yield 1
        raise OSError("gone")

    with ReadAhead(make, told.release) as items:
        assert not items.is_ready()
        go.set()
        items.wait()
        assert items.is_ready()
        source = iter(items)
        assert next(source) == 1
        for _ in range(2):
            assert told.acquire(timeout=LIMIT)
        assert items.is_ready(), "an error is something too"
        with pytest.raises(OSError, match="gone"):
            next(source)


def test_items_are_made_under_a_lock() -> None:
    lock = threading.Lock()

    def make() -> Iterator[bool]:
        for _ in range(3):
            yield lock.locked()

    assert list(read_ahead.locked(lock, make())) == [True] * 3
    assert not lock.locked()
