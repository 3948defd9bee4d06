"""Blocks through scorers, in any order, and rows back in theirs: as one scorer would give them."""

from __future__ import annotations

import json
import pickle
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from many_processes import make_rows
from tiny_models import make_tiny_model

from fastscore import InputError, ScoreConfig, Scorer
from fastscore.block_scores import BlockScores, Job, score_block, sendable
from fastscore.blocks import Block, Cut, CutWindow, cut_windows
from fastscore.config import ScorerConfig, TaskConfig
from fastscore.dealt import OPEN_WINDOWS, Dealt, FinishedRow, hand_on
from fastscore.distributed import Lead
from fastscore.output_formats import make_format
from fastscore.read_ahead import ReadAhead
from fastscore.row_parts import split_row
from fastscore.run_stats import RunStats
from fastscore.total_stats import TotalStats
from fastscore.types import AnswerScore, Pair, Row, RowPairs, ScoredRow

CHOICES = TaskConfig("choices")


def row(context: str, line: int = 1) -> Row:
    return Row({"context": context, "choices": [" a", " b"]}, "r.jsonl", line)


def result(index: int, worker: str = "0", **stats: Any) -> BlockScores:
    return BlockScores(index, worker, stats=RunStats(**stats))


def scores(block: Block) -> BlockScores:
    """Of each part's pairs, by their numbers in the whole row."""
    found = result(block.index)
    for place, part in enumerate(block.rows):
        numbers = part.numbers or (0,)
        pairs = RowPairs(Row({}), tuple(Pair("", f"{part.line}") for _ in numbers), len(numbers), 1)
        found.scored.append((place, pairs, tuple(AnswerScore((-float(number),), True) for number in numbers)))
    return found


def rows_of(dealt: Dealt) -> list[FinishedRow]:
    return list(iter(dealt.next_row, None))


def claimed(dealt: Dealt) -> list[Block]:
    return list(iter(dealt.claim, None))


def window(line: int, *cuts: Sequence[tuple[int, int]], parts: Sequence[int] = (1,)) -> CutWindow:
    """Rows with so many parts each, and blocks that are told as (row, part)."""
    rows = []
    for place, count in enumerate(parts):
        keys = [f"key {number}" for number in range(count)]
        data = {"query": "q", "answers": ["a"], "pos": keys}
        rows.append(split_row(Row(data, "r.jsonl", line + place), TaskConfig("qa")).parts)
    return CutWindow(rows, [Cut([place for place, _ in cut], [part for _, part in cut]) for cut in cuts])


def test_a_row_comes_when_its_last_part_has_come_and_rows_come_in_order() -> None:
    one = window(0, [(0, 0), (2, 1)], [(1, 0), (0, 2)], [(2, 0), (0, 1)], parts=[3, 1, 2])
    rows = [parts.row for parts in one.rows]
    dealt = Dealt(iter([one]))
    blocks = claimed(dealt)
    assert [block.index for block in blocks] == [0, 1, 2]
    assert dealt.is_exhausted
    dealt.finish(scores(blocks[1]))
    assert rows_of(dealt) == []
    dealt.finish(scores(blocks[2]))
    assert rows_of(dealt) == []
    dealt.finish(scores(blocks[0]))
    dealt.finish(scores(blocks[0]))  # done twice
    found = rows_of(dealt)
    assert [one.row for one in found] == rows
    assert [[score.logprob for score in one.scores] for one in found] == [[0, -1, -2], [0], [0, -1]]
    assert [one.pairs and one.pairs.num_candidates for one in found] == [3, 1, 2]
    assert not dealt.is_done
    assert [one.index for one in iter(dealt.next_result, None)] == [1, 2, 0]
    assert dealt.is_done


def test_only_so_many_windows_are_open() -> None:
    windows = [window(line, [(0, 0)]) for line in range(5)]
    dealt = Dealt(iter(windows))
    first = claimed(dealt)
    assert [block.index for block in first] == list(range(OPEN_WINDOWS))
    assert not dealt.may_claim
    dealt.finish(scores(first[1]))
    assert rows_of(dealt) == []
    assert not dealt.may_claim, "the first is not written"
    dealt.finish(scores(first[0]))
    assert [one.row.line for one in rows_of(dealt)] == [0, 1]
    assert dealt.may_claim
    assert [block.index for block in claimed(dealt)] == [2, 3]


def test_a_window_that_is_not_there_yet_is_not_waited_for() -> None:
    there = [False]
    dealt = Dealt(iter([window(0, [(0, 0)])]), lambda: there[0])
    assert not dealt.may_claim
    assert dealt.claim() is None
    assert not dealt.is_exhausted
    there[0] = True
    assert dealt.may_claim
    assert dealt.claim() is not None


def test_a_rank_that_waits_is_told_when_a_window_is_there() -> None:
    go, lead, orders = threading.Event(), Lead(1), list[Any]()

    def windows(_: threading.Event) -> Iterator[CutWindow]:
        assert go.wait(20)
        yield window(0, [(0, 0)])

    job = Job(ScorerConfig(), CHOICES, skip_bad_rows=False)
    with ReadAhead(windows, lead.look) as ahead:
        dealt, total = Dealt(iter(ahead), ahead.is_ready), TotalStats(2)
        with lead.dealing(job, dealt, total):
            asking = threading.Thread(target=lambda: orders.append(lead._next_order(False)))
            asking.start()
            asking.join(0.1)
            assert asking.is_alive()
            go.set()
            asking.join(10)  # much less than it would wait by itself
            assert not asking.is_alive()
            ((what, of_job, block),) = orders
            assert (what, of_job, block.index) == ("block", job, 0)
            lead.running["1"] = RunStats(pairs=1, seconds=0.5)
            assert total.with_running(lead.running).pairs == 1
            done = scores(block)
            for _ in range(2):
                lead.take(replace(done, worker="1", stats=RunStats(pairs=3, seconds=1.0)))
            assert lead.running == {}
            assert (total.stats.pairs, len(rows_of(dealt))) == (3, 1)


def test_rows_that_can_not_be_read_are_never_taken_for_the_end() -> None:
    def windows() -> Iterator[CutWindow]:
        yield window(0, [(0, 0)])
        raise OSError("the disk")

    dealt = Dealt(windows())
    block = dealt.claim()
    assert block is not None
    for _ in range(2):  # by one thread, and then by another
        with pytest.raises(OSError, match="the disk"):
            dealt.claim()
    dealt.finish(scores(block))
    assert [len(rows_of(dealt)), dealt.next_result() is None] == [1, False]
    assert not dealt.is_done
    with pytest.raises(OSError, match="the disk"):
        dealt.claim()


def test_of_a_bad_row_the_first_error_counts_and_its_scores_do_not() -> None:
    one = window(0, [(0, 2), (1, 0)], [(0, 0)], [(0, 1)], parts=[3, 1])
    rows, dealt = [parts.row for parts in one.rows], Dealt(iter([one]))
    late, good, early = claimed(dealt)
    found = scores(late)
    del found.scored[0]
    found.bad.append((0, InputError("the third")))
    dealt.finish(found)
    dealt.finish(scores(good))
    dealt.finish(replace(result(early.index), bad=[(0, InputError("the second"))]))
    bad = list[tuple[Row, str]]()
    kept = list(hand_on(iter(rows_of(dealt)), CHOICES, lambda *of: bad.append((of[0], str(of[1]))), threading.Lock()))
    assert bad == [(rows[0], "the second")]
    assert [one.row for one in kept] == rows[1:]


def test_a_block_that_does_not_tell_of_all_its_rows_is_a_fault() -> None:
    dealt = Dealt(iter([window(1, [(0, 0)])]))
    assert dealt.claim() is not None
    with pytest.raises(AssertionError):
        dealt.finish(result(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def written(found: Sequence[ScoredRow], task: TaskConfig) -> list[Any]:
    """All there is of a scored row: what each pair is written as, its scores and raw counts."""
    pairs = make_format("pairs")
    return [(list(pairs.rows(one, task)), one.teacher_scores, one.teacher_raw, one.row) for one in found]


@pytest.mark.parametrize(
    "task",
    [
        TaskConfig("qa", answers="all", combine="logsumexp"),
        TaskConfig("qa", answers="all", score=ScoreConfig(baseline="no-context", keep_raw=True)),
        TaskConfig("qa", answers="sample", score=ScoreConfig(reduce="byte", normalize="softmax", append_eos=True)),
        TaskConfig("qa", score=ScoreConfig(reduce="none"), key_max_length=5),
        TaskConfig("qa", score=ScoreConfig(target="query", reduce="sum")),
    ],
    ids=["all", "baseline", "byte", "none", "query"],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_several_scorers_are_as_one(model: Path, task: TaskConfig, workers: int) -> None:
    rows = [Row(data, "r.jsonl", line) for line, data in enumerate(make_rows(40), start=1)]
    for found in rows:
        found.data["answers"] = [*found.data["answers"], "people in town"]
    rows[8].data["neg"] = ["town " * 400]  # does not fit: found out where it is tokenised, and only in one part
    config = ScorerConfig(str(model), dtype="fp32", device="cpu", window_tokens=1500, deterministic=True)
    bad = {"one": list[Any](), "several": list[Any]()}
    one = Scorer.from_config(config)
    expected = list(one.stream_rows(rows, task, on_bad_row=lambda *of: bad["one"].append((of[0], str(of[1])))))
    several = [Scorer.from_config(config) for _ in range(workers)]
    job, total = Job(config, task, skip_bad_rows=True), TotalStats(workers)
    dealt = Dealt(cut_windows(rows, task, workers, config.window_tokens))
    draw, waiting, found_rows = random.Random(workers), list[BlockScores](), list[ScoredRow]()
    while not dealt.is_done:
        for scorer in several:
            if (block := dealt.claim()) is not None:
                sent = pickle.loads(pickle.dumps((job, block)))
                waiting.append(pickle.loads(pickle.dumps(sendable(score_block(scorer, None, *sent, id)))))
        if waiting:
            dealt.finish(waiting.pop(draw.randrange(len(waiting))))
        for came in iter(dealt.next_result, None):
            assert came.error is None
            total.add(came)
        done = iter(rows_of(dealt))
        found_rows += hand_on(done, task, lambda *of: bad["several"].append((of[0], str(of[1]))), threading.Lock())
    assert written(found_rows, task) == written(expected, task)
    assert bad["several"] == bad["one"]
    assert len(bad["one"]) == (0 if task.key_max_length == 5 else 1)
    whole, parts = one.stats, total.stats
    assert parts.answer_tokens >= whole.answer_tokens, "the other pairs of a bad row are scored"
    assert parts.tokens_computed <= whole.tokens_computed * 1.1


def test_totals_are_sums_and_the_seconds_of_the_busiest() -> None:
    total = TotalStats(2)
    stats = total.stats
    for part in (result(0, "a", pairs=2, seconds=3.0), result(1, "b", pairs=5, seconds=4.0), result(2, "a", seconds=2)):
        total.add(part)
    assert total.stats is stats
    assert (stats.pairs, stats.seconds) == (7, 5.0)
    assert total.pairs == {"a": 2, "b": 5}
    running = total.with_running({"b": RunStats(pairs=1, seconds=2.5)})
    assert (running.pairs, running.seconds) == (8, 6.5)
    assert (stats.pairs, stats.seconds) == (7, 5.0)


def test_workers_are_busy_from_their_first_batch_to_the_end_of_the_job() -> None:
    total = TotalStats(2)
    assert total.busy() is None
    total.add(replace(result(0, "a", seconds=4.0), began=100.0, ended=105.0))
    total.add(replace(result(1, "b", seconds=3.0), began=102.0, ended=106.0))
    total.add(replace(result(2, "a", seconds=4.5), began=105.5, ended=110.0))
    total.add(result(3, "b"))  # nothing was scored of it
    total.end_job()
    assert total.busy() == pytest.approx((8.5 + 3) / (10 + 8), abs=1e-4)
    # Another file, much later, with other workers, one of which dies after its first block.
    total.add(replace(result(0, "c", seconds=2.0), began=500.0, ended=503.0))
    total.add(replace(result(1, "d", seconds=9.0), began=500.0, ended=510.0))
    total.add(replace(result(2, "e", seconds=5.0), began=504.0, ended=509.5))
    total.end_job()
    assert total.busy() == pytest.approx((11.5 + 2 + 9 + 5) / (18 + 3 + 10 + 6), abs=1e-4)
    about = total.describe("ray")
    assert about["busy"] == total.busy()
    assert about["seconds_by_worker"] == {"a": 8.5, "b": 3.0, "c": 2.0, "d": 9.0, "e": 5.0}


class Fake:
    """Scores a row by the length of its context; one without is bad."""

    def __init__(self) -> None:
        self.stats = RunStats()

    def describe(self) -> dict[str, Any]:
        return {"model": "none"}

    def stream_scores(
        self, rows: list[Row], config: TaskConfig, *, on_bad_row: Any, on_progress: Any, cache: Any
    ) -> Iterator[tuple[RowPairs, tuple[AnswerScore, ...]]]:
        for found in rows:
            if found.data["context"] == "stop":
                raise OSError("no more\nof this")
            if not found.data["context"]:
                on_bad_row(found, found.error("empty"))
                continue
            self.stats.pairs += 1
            on_progress(replace(self.stats))
            score = AnswerScore((-float(len(found.data["context"])),), True)
            yield RowPairs(found, (Pair(found.data["context"], "a"),), 1, 1), (score,)


def test_a_block_through_a_scorer_and_back() -> None:
    rows = [row("abc"), row(""), row("ab")]
    job, scorer, seen = Job(ScorerConfig(), CHOICES, skip_bad_rows=True), Fake(), list[RunStats]()
    for _ in range(2):  # what a scorer did before is not counted again
        found = score_block(scorer, None, job, Block(0, rows), seen.append)
        assert found.stats.pairs == 2
        assert found.description == {"model": "none"}
    assert [stats.pairs for stats in seen] == [1, 2, 1, 2]
    assert [(place, pairs.row.data, pairs.pairs[0].prompt) for place, pairs, _ in found.scored] == [
        (0, {}, ""),
        (2, {}, ""),
    ]
    assert [(place, str(error)) for place, error in found.bad] == [(1, "r.jsonl:1: empty")]
    assert json.dumps([score.logprob for _, _, (score,) in found.scored]) == "[-3.0, -2.0]"


def test_what_ends_a_block_travels_as_a_line() -> None:
    rows = [row("abc"), row("stop"), row("ab")]
    found = sendable(score_block(Fake(), None, Job(ScorerConfig(), CHOICES, False), Block(0, rows), id))
    assert [place for place, _, _ in found.scored] == [0]
    assert (type(found.error), str(found.error)) == (RuntimeError, "OSError: no more")
