"""Windows prepared in a thread beside the device: the same scores, errors and order as in turn, and nothing left over.

A CPU scores in turn; here it is told that it works beside the host, as a GPU does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from test_read_ahead import LIMIT, threads
from tiny_models import make_tiny_model

from fastscore import InputError, Scorer, pipeline
from fastscore.answer_head import SlotScores
from fastscore.checkpoint import Checkpoint
from fastscore.config import ScorerConfig, TaskConfig
from fastscore.language_model import LanguageModel, Plan
from fastscore.read_ahead import ReadAhead
from fastscore.run_files import FileJob, run_files
from fastscore.run_stats import RunStats
from fastscore.types import Row

CHOICES = TaskConfig("choices")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("fastscore.row_stream.runs_beside_host", lambda device: True)
    yield
    assert threads() == [], "no thread outlives its stream"


def scorer_of(folder: Path, **options: Any) -> Scorer:
    return Scorer(str(folder), **{"dtype": "fp32", "device": "cpu", "window_tokens": 60, **options})


def rows(count: int = 30) -> list[Row]:
    draw = random.Random(5)
    words = ["river", "town", "Straße", "42", "白"]
    data = [
        {"context": f"row {line} {draw.choice(words)}:", "choices": draw.sample(words, draw.randint(1, 3))}
        for line in range(1, count + 1)
    ]
    return [Row(row, "r.jsonl", line) for line, row in enumerate(data, start=1)]


def endless() -> Iterator[Row]:
    line = 0
    while True:
        line += 1
        yield Row({"context": f"row {line}:", "choices": ["a", "b"]}, "r.jsonl", line)


def counted(stats: RunStats) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in RunStats.__slots__ if name != "seconds"}


@pytest.mark.parametrize("window", [1, 60, 4_000_000])
def test_the_same_scores_in_the_same_order(window: int, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_turn, other = (scorer_of(llama, window_tokens=window, max_batch_tokens=25) for _ in range(2))
    seen: list[RunStats] = []
    expected = list(in_turn.stream_rows(rows(), CHOICES))
    monkeypatch.setattr("fastscore.row_stream.runs_beside_host", lambda device: True)
    found = list(other.stream_rows(rows(), CHOICES, on_progress=seen.append))
    assert found == expected
    assert counted(other.stats) == counted(in_turn.stats)
    assert [stats.pairs for stats in seen] == sorted(stats.pairs for stats in seen)
    assert [stats.seconds for stats in seen] == sorted(stats.seconds for stats in seen)
    assert seen[-1] == other.stats
    assert list(other.stream_rows([], CHOICES)) == []


def test_the_device_has_work_before_scores_are_waited_for(
    llama: Path, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While windows are ready in time: two batches of the next one, the rows of the last, the rest of the next."""
    done: list[tuple[str, int]] = []
    batches: list[int] = []
    waits: list[None] = []
    run, wait, has_next = LanguageModel.run, SlotScores.wait, ReadAhead.has_next

    def log_run(model: LanguageModel, plan: Plan) -> Iterator[Any]:
        window = len(batches)
        batches.append(0)
        for batch in run(model, plan):
            batches[window] += 1
            done.append(("batch", window))
            yield batch

    def log_wait(scores: SlotScores) -> Any:
        done.append(("wait", len(waits)))
        waits.append(None)
        return wait(scores)

    def has_next_in_time(windows: ReadAhead[Any]) -> bool:
        windows._next.exception(LIMIT)  # waits for the thread, as a busy device would give it the time
        return has_next(windows)

    scorer = scorer_of(llama, window_tokens=60, max_batch_tokens=8)
    scorer.load()
    monkeypatch.setattr(LanguageModel, "run", log_run)
    monkeypatch.setattr(SlotScores, "wait", log_wait)
    monkeypatch.setattr(ReadAhead, "has_next", has_next_in_time)
    for row in scorer.stream_rows(rows(), CHOICES):
        done.append(("row", row.row.line or 0))

    assert len(batches) == len(waits) > 4
    assert min(batches[:-1]) > 2
    expected = [("batch", 0)] * batches[0]
    for window in range(1, len(batches)):
        expected += [("batch", window)] * min(2, batches[window])
        expected += [("wait", window - 1)]
        expected += [("batch", window)] * (batches[window] - 2)
    expected += [("wait", len(batches) - 1)]
    assert [step for step in done if step[0] != "row"] == expected
    assert [line for step, line in done if step == "row"] == list(range(1, 31))
    assert done[done.index(("row", 1)) - 1] == ("wait", 0), "rows are handed out when their scores are there"


def bad_rows() -> list[Row]:
    found = rows()
    found[20] = Row({"context": "b " * 300, "choices": ["c"]}, "r.jsonl", 21)
    found[24] = Row({"context": "b"}, "r.jsonl", 25)
    return found


def test_a_bad_row_raises_after_the_windows_before_it(
    llama: Path, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastscore.windows.TOKENISED_PAIRS", 3)  # a bad row spoils its portion
    found = []
    with pytest.raises(InputError, match=r"^r\.jsonl:21: 600 prompt and 2 answer tokens do not fit"):  # noqa: PT012
        for scored in scorer_of(llama).stream_rows(bad_rows(), CHOICES):
            found.append(scored.row.line)
    assert found == list(range(1, len(found) + 1))
    assert 10 < len(found) <= 20


def test_bad_rows_are_handed_over_in_order(llama: Path, beside: None) -> None:
    told: list[tuple[int | None, str]] = []
    stream = scorer_of(llama).stream_rows(
        bad_rows(), CHOICES, on_bad_row=lambda row, e: told.append((row.line, str(e)))
    )
    assert [scored.row.line for scored in stream] == [line for line in range(1, 31) if line not in (21, 25)]
    # Rows are expanded some ahead of the tokenizer, as they are in turn.
    in_turn: list[int | None] = []
    list(scorer_of(llama).stream_rows(bad_rows(), CHOICES, on_bad_row=lambda row, _: in_turn.append(row.line)))
    assert [line for line, _ in told] == in_turn
    with pytest.raises(ZeroDivisionError):
        list(scorer_of(llama).stream_rows(bad_rows(), CHOICES, on_bad_row=lambda row, _: 1 // 0))


def test_what_a_source_raises_is_raised(llama: Path, beside: None) -> None:
    def source() -> Iterator[Row]:
        yield from rows(10)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(scorer_of(llama).stream_rows(source(), CHOICES))


def test_leaving_early_ends_the_thread(llama: Path, beside: None) -> None:
    scorer = scorer_of(llama)
    stream = scorer.stream_rows(endless(), CHOICES)
    assert [next(stream).row.line for _ in range(3)] == [1, 2, 3]
    assert len(threads()) == 1
    stream.close()
    assert threads() == []
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        for _ in scorer.stream_rows(endless(), CHOICES):
            1 / 0  # noqa: B018
    assert threads() == []
    assert [scored.row.line for scored in scorer.stream_rows(rows(3), CHOICES)] == [1, 2, 3], "it can be used again"


def test_a_model_that_fails_ends_the_thread(llama: Path, beside: None) -> None:
    scorer = scorer_of(llama)

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    scorer.load().forward = fail
    scorer.load().max_batch_tokens = 8
    with pytest.raises(torch.OutOfMemoryError):
        list(scorer.stream_rows(endless(), CHOICES))


def without_weights(llama: Path, folder: Path) -> Path:
    for path in llama.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_bad_first_row_is_told_before_a_model_that_is_not_there(llama: Path, tmp_path: Path, beside: None) -> None:
    scorer = scorer_of(without_weights(llama, tmp_path))
    with pytest.raises(InputError, match=r"^r\.jsonl:1: "):
        list(scorer.stream_rows([Row({"context": "b"}, "r.jsonl", 1)], CHOICES))
    with pytest.raises(InputError, match="cannot be loaded"):
        list(scorer.stream_rows(rows(), CHOICES))
    assert list(scorer.stream_rows([], CHOICES)) == []


def test_the_first_window_is_prepared_while_the_model_is_loaded(
    llama: Path, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading waits here until a whole window has been read: it would wait for ever if one came after the other."""
    read = threading.Event()

    def source() -> Iterator[Row]:
        yield from rows()
        read.set()

    def load(*args: Any) -> Any:
        assert read.wait(LIMIT), "rows are read meanwhile"
        return real(*args)

    real = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", load)
    assert len(list(scorer_of(llama, window_tokens=4_000_000).stream_rows(source(), CHOICES))) == 30


@pytest.mark.parametrize("moment", ["loading", "waiting", "scoring", "consuming"])
def test_an_interrupt_ends_the_thread(moment: str, llama: Path, beside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real signal, while the main thread is in each of the places where it spends its time."""
    scorer = scorer_of(llama, window_tokens=20_000 if moment == "scoring" else 60)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def soon(*_: Any) -> None:
        threading.Timer(0.1, interrupt).start()

    def slow() -> Iterator[Row]:
        for row in endless():
            if row.line == 40:
                soon()
            if (row.line or 0) > 40:
                time.sleep(0.02)
            yield row

    def sleep_while_loading(*_: Any) -> None:
        soon()
        time.sleep(LIMIT)

    if moment == "loading":
        monkeypatch.setattr(Checkpoint, "load", sleep_while_loading)
    else:
        scorer.load()
    source: Iterable[Row] = slow() if moment == "waiting" else endless()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        if moment == "scoring":
            soon()
        for _ in scorer.stream_rows(source, CHOICES):
            if moment == "consuming":
                soon()
                time.sleep(LIMIT)
    assert time.monotonic() - started < LIMIT / 2
    assert threads() == []


def test_the_tokenizer_is_the_users_meanwhile(llama: Path, beside: None) -> None:
    """Its settings change from call to call; those of a user must not reach the rows that are being read."""
    expected = list(scorer_of(llama).stream_rows(rows(300), CHOICES))
    scorer = scorer_of(llama)
    found = []
    for scored in scorer.stream_rows(rows(300), CHOICES):
        for _ in range(5):
            cut = scorer.tokenizer(["row 1 river town"], truncation=True, max_length=2, padding="max_length")
            assert len(cut["input_ids"][0]) == 2
        found.append(scored)
    assert found == expected


def test_streams_and_pairs_at_once(llama: Path, beside: None) -> None:
    scorer = scorer_of(llama)
    alone = list(scorer.stream_rows(rows(), CHOICES))
    pair = scorer.score([("row 1:", " river")])
    both = zip(scorer.stream_rows(rows(), CHOICES), scorer.stream_rows(rows(), CHOICES), alone, strict=True)
    for one, other, expected in both:
        assert one == other == expected
        assert scorer.score([("row 1:", " river")]) == pair
    assert len(scorer._rows._spare_tokenizers) == 2, "made once for each of the streams that ran at the same time"


class Quiet:
    def checking(self, rows: int) -> None: ...
    def scoring(self, total_pairs: int) -> None: ...
    def progress(self, stats: RunStats) -> None: ...


def test_files_with_bad_records_and_bad_rows(llama: Path, tmp_path: Path, beside: None) -> None:
    """Records that are no rows, and rows that do not fit, are recorded in the order of the file."""
    lines = [json.dumps(row.data) for row in rows()]
    lines[3] = "{broken"
    lines[7] = json.dumps({"context": "b " * 300, "choices": ["c"]})
    lines[9] = json.dumps({"context": "b"})
    lines[28] = "7"
    path, out = tmp_path / "r.jsonl", tmp_path / "o.jsonl"
    path.write_text("\n".join(lines))
    config = ScorerConfig(str(llama), dtype="fp32", device="cpu", window_tokens=60)
    tally = run_files([FileJob((path,), out)], config, CHOICES, reporter=Quiet(), skip_bad_rows=True)
    assert (tally.rows, tally.skipped) == (26, 4)
    written = [json.loads(line)["context"] for line in out.read_text().splitlines()]
    assert written == [row.data["context"] for row in rows() if row.line not in (4, 8, 10, 29)]
    recorded = [json.loads(line)["line"] for line in Path(f"{out}.errors.jsonl").read_text().splitlines()]
    assert sorted(recorded) == [4, 8, 10, 29]

    # A disk that is full: the thread is gone before the files are.
    out.write_text("an old one")
    before = {each.name for each in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"r\.jsonl:4: "):
        run_files([FileJob((path,), out)], config, CHOICES, reporter=Quiet())
    assert out.read_text() == "an old one"
    assert {each.name for each in tmp_path.iterdir()} == before


def test_a_cpu_scores_in_the_callers_thread(llama: Path) -> None:
    names = set()

    def source() -> Iterator[Row]:
        for row in rows():
            names.add(threading.current_thread().name)
            yield row

    with closing(scorer_of(llama).stream_rows(source(), CHOICES)) as stream:
        list(stream)
    assert names == {threading.current_thread().name}
    assert not pipeline.runs_beside_host(torch.device("cpu"))
    assert pipeline.runs_beside_host(torch.device("cuda"))
