"""Signals that end a run, sent to this very process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from many_processes import make_rows
from tiny_models import make_tiny_model

from fastscore import Scorer
from fastscore.answer_head import AnswerHead
from fastscore.interrupts import Interrupted, ended_by_signals, held_back


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Ray, in a test before, may have put its own in their place."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_at_once_where_nothing_is_in_flight(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped, ended_by_signals():  # noqa: PT012
        send(number)
        pytest.fail("went on")
    assert (stopped.value.signum, stopped.value.at_once) == (number, False)
    assert signal.getsignal(number) is before


def test_what_is_in_flight_is_finished() -> None:
    done = []
    with pytest.raises(Interrupted) as stopped, ended_by_signals():  # noqa: PT012
        with held_back():
            with held_back():
                send(signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert (done, stopped.value.signum, stopped.value.at_once) == (["inner", "outer"], signal.SIGINT, False)
    with ended_by_signals(), held_back():
        pass  # nothing is left of it


def test_the_second_signal_ends_what_is_in_flight() -> None:
    done = []
    with pytest.raises(Interrupted) as stopped, ended_by_signals(), held_back():  # noqa: PT012
        send(signal.SIGINT)
        done.append("one")
        send(signal.SIGTERM)
        done.append("two")
    assert (done, stopped.value.signum, stopped.value.at_once) == (["one"], signal.SIGTERM, True)


def test_an_error_in_flight_is_told_instead() -> None:
    with pytest.raises(ZeroDivisionError), ended_by_signals(), held_back():  # noqa: PT012
        send()
        raise ZeroDivisionError


def test_signals_that_are_ignored_or_handled_stay_so() -> None:
    seen: list[int] = []
    handlers: dict[int, Any] = {signal.SIGHUP: signal.SIG_IGN, signal.SIGTERM: lambda number, _: seen.append(number)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with ended_by_signals():
            send(signal.SIGHUP)
            send(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [signal.SIGTERM]


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    found: list[Any] = []

    def work() -> None:
        with ended_by_signals(), held_back():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_signal_in_the_last_call_of_the_head_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = str(make_tiny_model(tmp_path / "llama")), make_rows(6)
    flush = AnswerHead.flush

    def interrupted_flush(head: AnswerHead) -> None:
        send()
        flush(head)

    monkeypatch.setattr(AnswerHead, "flush", interrupted_flush)
    scorer = Scorer(model, dtype="fp32", cache=tmp_path / "scores.sqlite")
    with pytest.raises(Interrupted), ended_by_signals():
        scorer.score_rows(rows)
    monkeypatch.undo()
    again = Scorer(model, dtype="fp32", cache=tmp_path / "scores.sqlite")
    scored = again.score_rows(rows)
    assert again.stats.cached == again.stats.pairs == sum(len(row["teacher_scores"]) for row in scored)
