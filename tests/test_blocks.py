"""Rows cut into blocks, and what comes of blocks put together again."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastscore.block_scores import BlockScores, Dealt, Job, hand_on_bad, score_block, scored_rows, sendable
from fastscore.blocks import CHARS_PER_TOKEN, MAX_DEPTH, MIN_BLOCK_TOKENS, Block, cut_blocks, shared_size, text_size
from fastscore.config import ScorerConfig, TaskConfig
from fastscore.run_stats import RunStats
from fastscore.total_stats import TotalStats
from fastscore.types import InputError, Row, ScoredRow

CHOICES = TaskConfig("choices")


def row(context: str, line: int = 1) -> Row:
    return Row({"context": context, "choices": [" a", " b"]}, "r.jsonl", line)


@given(st.lists(st.integers(1, 3000), max_size=60), st.integers(1, 5), st.integers(1, 500))
def test_every_row_once_in_order_and_no_block_too_large(lengths: list[int], workers: int, max_tokens: int) -> None:
    rows = [row("x" * length, line) for line, length in enumerate(lengths, start=1)]
    blocks = list(cut_blocks(rows, CHOICES, workers, max_tokens))
    assert [found for block in blocks for found in block.rows] == rows
    assert [block.index for block in blocks] == list(range(len(blocks)))
    for block in blocks:
        sizes = [text_size(found) for found in block.rows]
        assert sum(sizes[:-1]) < max_tokens * CHARS_PER_TOKEN


def test_prompts_of_a_chat_are_compared_without_its_template() -> None:
    config = TaskConfig("choices", chat_template=True, system_prompt="Be brief.")
    rows = [row("x" * 3000, line) for line in range(40)]
    blocks = list(cut_blocks(rows, config, 2, 4_000_000))
    assert len(blocks) > 2
    assert [found for block in blocks for found in block.rows] == rows


def test_what_no_other_process_could_be_sent_is_named() -> None:
    nested: Any = "deep"
    for _ in range(MAX_DEPTH - 1):
        nested = [nested]
    fits = Row({**row("a").data, "notes": nested}, "r.jsonl", 8)
    (block,) = cut_blocks([fits], CHOICES, 2, 1000)
    assert pickle.loads(pickle.dumps(block)).rows == [fits]
    deeper = Row({**row("a").data, "notes": {"more": nested}}, "r.jsonl", 9)
    with pytest.raises(InputError, match=r"r\.jsonl:9: nested more than 200 deep: it can't be sent"):
        list(cut_blocks([fits, deeper], CHOICES, 2, 1000))


def test_all_workers_get_some_of_it_and_the_last_blocks_are_small() -> None:
    rows = [row(chr(0x4E00 + line) + "x" * 999, line) for line in range(400)]
    sizes = [len(block.rows) for block in cut_blocks(rows, CHOICES, 4, 4_000_000)]
    assert sizes[0] == pytest.approx(400 / 8, abs=1)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-2] == -(-MIN_BLOCK_TOKENS * CHARS_PER_TOKEN // 1002)


def test_no_more_is_read_than_the_blocks_ahead() -> None:
    read = 0

    def endless() -> Iterator[Row]:
        nonlocal read
        while True:
            read += 1
            yield row("x" * 396)

    blocks = cut_blocks(endless(), CHOICES, 2, 1000)
    assert len(next(blocks).rows) == 10
    assert read == 40


def test_rows_that_share_a_prefix_stay_together() -> None:
    # Three texts of some length, each asked about by several rows: blocks end where the text changes.
    rows = [row(f"{text} " * 100 + f"question {i}", i) for text in ("river", "town", "house") for i in range(10)]
    blocks = list(cut_blocks(rows, CHOICES, 1, 1700))
    texts = [{found.data["context"].split()[0] for found in block.rows} for block in blocks]
    assert texts == [{"river"}, {"town"}, {"house"}]


def test_a_bad_row_shares_nothing_and_is_dealt_like_others() -> None:
    rows = [row("x" * 100), Row({"context": 5}, "r.jsonl", 2), row("x" * 100)]
    assert [found for block in cut_blocks(rows, CHOICES, 1, 20) for found in block.rows] == rows


def test_rows_that_only_a_tokenizer_expands_are_cut_all_the_same() -> None:
    talk = [{"role": "user", "content": "hello " * 20}]
    rows = [Row({"prompt": talk, "chosen": talk, "rejected": talk}, "r.jsonl", line) for line in range(6)]
    assert len(list(cut_blocks(rows, TaskConfig("preference"), 1, 60))) > 1
    chat = TaskConfig("choices", chat_template=True)
    assert len(list(cut_blocks([row("x" * 100, line) for line in range(6)], chat, 1, 30))) > 1


@pytest.mark.parametrize(
    ("before", "after", "shared"),
    [
        ([], ["a"], 0),
        (["abc", "abd"], ["abd", "abe"], 3 + 2),
        (["b"], ["a", "c"], 0),
        (["abcdef"], ["abc"], 3),
        ([(1, 2, 3)], [(1, 2, 4), (2,)], 2),
        ([(1, 2)], ["12"], 0),
    ],
)
def test_shared_size(before: list[Any], after: list[Any], shared: int) -> None:
    assert shared_size(before, after) == shared


def result(index: int, worker: str = "0", **stats: Any) -> BlockScores:
    return BlockScores(index, worker, stats=RunStats(**stats))


def test_dealt_blocks_come_back_in_order_and_only_so_many_are_open() -> None:
    dealt = Dealt((Block(index, []) for index in range(5)), 3)
    claimed = [block for block in (dealt.claim() for _ in range(4)) if block is not None]
    assert [block.index for block in claimed] == [0, 1, 2]
    assert not dealt.may_claim
    dealt.finish(result(2))
    dealt.finish(result(1))
    assert dealt.next_finished() is None
    dealt.finish(result(0))
    again = result(0)
    dealt.finish(again)  # a block that was done twice
    found = [dealt.next_finished() for _ in range(4)]
    assert [pair and pair[1].index for pair in found] == [0, 1, 2, None]
    dealt.finish(again)
    assert dealt.next_finished() is None
    assert [block.index for block in iter(dealt.claim, None)] == [3, 4]
    assert not dealt.is_done
    dealt.finish(result(4))
    dealt.finish(result(3))
    assert [dealt.next_finished() is not None for _ in range(3)] == [True, True, False]
    assert dealt.is_done


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


class Scorer:
    """Scores a row by the length of its context; one without is bad."""

    def __init__(self) -> None:
        self.stats = RunStats()

    def describe(self) -> dict[str, Any]:
        return {"model": "none"}

    def stream_rows(
        self, rows: list[Row], config: TaskConfig, *, on_bad_row: Any, on_progress: Any, cache: Any
    ) -> Iterator[ScoredRow]:
        for found in rows:
            if found.data["context"] == "stop":
                raise OSError("no more\nof this")
            if not found.data["context"]:
                on_bad_row(found, found.error("empty"))
                continue
            self.stats.pairs += 1
            on_progress(replace(self.stats))
            yield ScoredRow(found, (float(len(found.data["context"])),), ())


def test_a_block_through_a_scorer_and_back() -> None:
    rows = [row("abc"), row(""), row("ab")]
    job, scorer, seen = Job(ScorerConfig(), CHOICES, skip_bad_rows=True), Scorer(), list[RunStats]()
    for _ in range(2):  # what a scorer did before is not counted again
        found = score_block(scorer, None, job, Block(0, rows), seen.append)
        assert found.stats.pairs == 2
        assert found.description == {"model": "none"}
    assert [stats.pairs for stats in seen] == [1, 2, 1, 2]
    assert all(scored.row.data == {} for _, scored in found.scored)
    bad = list[tuple[Row, InputError]]()
    hand_on_bad(Block(0, rows), found, lambda *pair: bad.append(pair))
    back = list(scored_rows(Block(0, rows), found))
    assert [(scored.row, scored.teacher_scores) for scored in back] == [(rows[0], (3.0,)), (rows[2], (2.0,))]
    assert [(found_row is rows[1], str(error)) for found_row, error in bad] == [(True, "r.jsonl:1: empty")]


def test_what_ends_a_block_is_raised_after_the_rows_before_it() -> None:
    rows = [row("abc"), row("stop"), row("ab")]
    found = sendable(score_block(Scorer(), None, Job(ScorerConfig(), CHOICES, False), Block(0, rows), id))
    back = scored_rows(Block(0, rows), found)
    assert next(back).row is rows[0]
    with pytest.raises(RuntimeError, match=r"^OSError: no more$"):
        next(back)
