"""Rows cut into blocks of pairs: nothing is lost, prefixes stay together, and blocks have their sizes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastscore.blocks import MAX_DEPTH, MIN_BLOCK_TOKENS, CutWindow, cut_windows, text_size
from fastscore.config import ScoreConfig, TaskConfig
from fastscore.row_parts import CHARS_PER_TOKEN, split_row
from fastscore.tasks import expand_row, plan_row
from fastscore.types import InputError, Pair, Row

CHOICES, QA = TaskConfig("choices"), TaskConfig("qa")


def row(context: str, line: int = 1) -> Row:
    return Row({"context": context, "choices": [" a", " b"]}, "r.jsonl", line)


def passages(line: int, keys: Sequence[str], answers: Sequence[str] = ("yes",)) -> Row:
    data = {"query": f"number {line}?", "answers": list(answers), "pos": list(keys[:1]), "neg": list(keys[1:])}
    return Row({**data, "query_id": line}, "r.jsonl", line)


def cut(rows: Sequence[Row], config: TaskConfig, workers: int, max_tokens: int) -> list[CutWindow]:
    return list(cut_windows(rows, config, workers, max_tokens))


def parts_of(window: CutWindow) -> list[list[tuple[int, Row]]]:
    """Each block's parts, each with its row's place in the window."""
    return [
        [(place, window.rows[place].part(part)) for place, part in zip(cut.places, cut.parts, strict=True)]
        for cut in window.cuts
    ]


def blocks_of(windows: Sequence[CutWindow]) -> list[list[Row]]:
    return [[part for _, part in found] for window in windows for found in parts_of(window)]


def split(row: Row, config: TaskConfig) -> list[Row]:
    parts = split_row(row, config).parts
    return [parts.part(index) for index in range(parts.count)]


def pairs_by_number(part: Row, config: TaskConfig) -> dict[int, Pair]:
    pairs = expand_row(part, config, list).pairs
    return dict(zip(range(len(pairs)) if part.numbers is None else part.numbers, pairs, strict=True))


TEXTS = st.sampled_from(["", "river", "river bank", "town", "Straße 白", "\n"])
KEYS = st.lists(TEXTS, min_size=1, max_size=5)
IDS = st.lists(st.integers(0, 9), min_size=1, max_size=4)
QA_ROWS = st.builds(
    lambda query, pos, neg, answers: {"query": query, "pos": pos, "neg": neg, "answers": answers},
    TEXTS,
    KEYS,
    st.none() | KEYS,
    st.lists(st.sampled_from(["yes", "no ", "où"]), min_size=1, max_size=3),
)
CHAT_ROWS = st.builds(lambda row, history: {**row, "history": history, "pos": None}, QA_ROWS, KEYS)
LRLM_ROWS = st.builds(
    lambda context, query, answer, keys, given: {
        **{"context_inputs": context, "query_inputs": query, "answer_inputs": answer, "score_inputs": keys},
        **({"pos": ["?"], "neg": ["?"] * (len(keys) - 1)} if given else {}),
    },
    IDS,
    IDS,
    IDS,
    st.lists(IDS | st.just([]), min_size=1, max_size=5),
    st.booleans(),
)
CHOICE_ROWS = st.builds(lambda context, choices: {"context": context, "choices": choices}, TEXTS, st.just(["a", "b"]))
PLAIN_ROWS = st.builds(lambda context: {"context": context, "continuation": " so"}, TEXTS)
BAD_ROWS = st.sampled_from([{}, {"query": 5}, {"pos": "no list", "context": [], "score_inputs": 3}])
SCORES = st.sampled_from(
    [ScoreConfig(), ScoreConfig(baseline="no-context"), ScoreConfig(target="query"), ScoreConfig(keep_raw=True)]
)
TASKS_OF_ROWS = {
    "qa": QA_ROWS,
    "icl": QA_ROWS,
    "chat": CHAT_ROWS,
    "lrlm": LRLM_ROWS,
    "choices": CHOICE_ROWS,
    "pairs": PLAIN_ROWS,
}


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[Row], TaskConfig]:
    task = draw(st.sampled_from(sorted(TASKS_OF_ROWS)))
    data = draw(st.lists(TASKS_OF_ROWS[task] | BAD_ROWS, max_size=12))
    score = draw(SCORES) if task not in ("choices", "pairs") else ScoreConfig()
    answers = draw(st.sampled_from(["first", "all", "sample"])) if score.target == "answer" else "first"
    rows = [Row({**found, "query_id": line}, "r.jsonl", line) for line, found in enumerate(data, start=1)]
    return rows, TaskConfig(task, answers=answers, score=score)


@given(jobs(), st.integers(1, 4), st.integers(1, 60))
def test_every_pair_of_every_row_is_in_one_part(
    job: tuple[list[Row], TaskConfig], workers: int, max_tokens: int
) -> None:
    rows, config = job
    windows = cut(rows, config, workers, max_tokens)
    assert [found.row for window in windows for found in window.rows] == rows
    for window in windows:
        found: list[list[Row]] = [[] for _ in window.rows]
        for block in parts_of(window):
            assert block
            for place, part in pickle.loads(pickle.dumps(block)):
                found[place].append(part)
        for whole, parts in zip([row.row for row in window.rows], found, strict=True):
            assert all((part.path, part.line) == (whole.path, whole.line) for part in parts)
            try:
                expected = expand_row(whole, config, list).pairs
            except InputError:
                assert parts == [whole], "whoever scores it says what is wrong"
                continue
            together: dict[int, Pair] = {}
            for part in parts:
                pairs = pairs_by_number(part, config)
                assert not together.keys() & pairs.keys()
                together |= pairs
            assert together == dict(enumerate(expected))


@given(st.lists(st.integers(1, 3000), max_size=60), st.integers(1, 5), st.integers(1, 500))
@example([280, 280, 3000, 40], 1, 100)
def test_no_block_and_no_window_is_too_large(lengths: list[int], workers: int, max_tokens: int) -> None:
    rows = [row("x" * length, line) for line, length in enumerate(lengths, start=1)]
    windows = cut(rows, CHOICES, workers, max_tokens)
    for block in blocks_of(windows):
        sizes = [text_size(found) for found in block]
        assert sum(sizes[:-1]) < max_tokens * CHARS_PER_TOKEN
    for window in windows:
        sizes = [text_size(found.row) for found in window.rows]
        assert sum(sizes[:-1]) < 1.5 * workers * max_tokens * CHARS_PER_TOKEN


def test_a_passage_is_in_one_block_wherever_its_rows_stand() -> None:
    # Sixty passages, each in rows far apart: by rows, every block would compute most of them.
    texts = [f"{number} " + chr(0x4E00 + number) * 6000 for number in range(60)]
    rows = [passages(line, [texts[(7 * line + 11 * i) % 60] for i in range(8)]) for line in range(120)]
    (window,) = cut(rows, QA, 4, 4_000_000)
    assert len(window.cuts) > 4
    blocks_with = {
        text: sum(any(text in part.data["pos"] for _, part in block) for block in parts_of(window)) for text in texts
    }
    assert set(blocks_with.values()) == {1}
    sizes = [len({part.data["pos"][0] for _, part in block}) for block in parts_of(window)]
    assert sizes[0] == pytest.approx(60 / 8, abs=1), "shared texts count once in a block's size"


def test_a_long_prefix_is_not_computed_again_for_a_few_rows() -> None:
    # What all share is twice the smallest block: cut by size alone, each block would hold it for one row's sake.
    common = "x" * (2 * MIN_BLOCK_TOKENS * CHARS_PER_TOKEN)
    rows = [row(common + f"{line:04}" + "y" * 200, line) for line in range(3000)]
    blocks = blocks_of(cut(rows, CHOICES, 2, 1_000_000_000))
    assert len(blocks) > 1
    assert len(common) * (len(blocks) - 1) <= 200 * 3000 / 10
    # Its length is bounded all the same.
    blocks = blocks_of(cut(rows, CHOICES, 2, 100_000))
    assert all(sum(map(text_size, block[:-1])) < 100_000 * CHARS_PER_TOKEN for block in blocks)


@pytest.mark.parametrize(("workers", "prefix"), [(8, 500), (8, 2000), (8, 4000), (16, 1000), (16, 4000)])
def test_a_long_prefix_leaves_nobody_without_work(workers: int, prefix: int) -> None:
    # One window of rows that all begin alike: each worker computes the beginning, and its share of the rest.
    rows = [row("x" * (prefix * CHARS_PER_TOKEN) + f"{line:05}" + "y" * 193, line) for line in range(1000)]
    (window,) = cut(rows, CHOICES, workers, 1_000_000_000)
    done = [0] * workers
    for size in (prefix * CHARS_PER_TOKEN + 200 * len(block) for block in blocks_of([window])):
        done[done.index(min(done))] += size
    best = prefix * CHARS_PER_TOKEN + 200 * 1000 / workers
    assert max(done) <= 1.25 * best


def test_one_large_row_is_the_last_window_too() -> None:
    rows = [passages(1, [chr(0x4E00 + number) * 900 for number in range(600)])]
    (window,) = cut(rows, QA, 2, 100_000)
    sizes = [len(block) for block in blocks_of([window])]
    assert sizes[0] == pytest.approx(600 / 4, abs=2)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 20


def test_a_baseline_is_in_the_last_candidates_part_only() -> None:
    config = TaskConfig("qa", answers="all", score=ScoreConfig(baseline="no-context"))
    parts = split(passages(1, ["a", "b", "c"], ["x", "y"]), config)
    assert [part.numbers for part in parts] == [(0, 1), (2, 3), (4, 5, 6, 7)]
    assert [len(expand_row(part, config, list).pairs) for part in parts] == [2, 2, 4]


def test_what_a_part_says_where_it_came_from() -> None:
    whole = passages(7, ["a", "b", "c"], ["x", "y"])
    config = TaskConfig("qa", answers="all", score=ScoreConfig(baseline="no-context"))
    expanded = [expand_row(found, config, list) for found in [whole, *split(whole, config)]]
    assert [expanded[0].place(index) for index in (0, 3, 5, 7)] == [
        f"r.jsonl:7: {what}" for what in ("candidate 0", "candidate 1", "candidate 2", "the baseline")
    ]
    assert [found.place(1) for found in expanded[1:]] == [f"r.jsonl:7: candidate {number}" for number in range(3)]
    assert expanded[3].place(3) == "r.jsonl:7: the baseline"


def test_a_template_that_reads_other_lists_as_text_keeps_them() -> None:
    config = TaskConfig(template="{pos}: {key} {query} | {answer}")
    data = {"pos": "a text", "history": ["one", "two"], "query": "q", "answer": "yes"}
    parts = split(Row(data, "r.jsonl", 1), config)
    assert [part.data["history"] for part in parts] == [["one"], ["two"]]
    assert [pairs_by_number(part, config) for part in parts] == [
        {number: pair} for number, pair in enumerate(expand_row(Row(data), config, list).pairs)
    ]


def test_prompts_of_a_chat_are_compared_without_its_template() -> None:
    config = TaskConfig("choices", chat_template=True, system_prompt="Be brief.")
    rows = [row(f"{line:03}" + chr(0x4E00 + line) * 3000, line) for line in range(40)]
    (window,) = cut(rows[20:] + rows[:20], config, 2, 4_000_000)
    assert len(window.cuts) > 2
    assert [found for block in blocks_of([window]) for found in block] == rows


def test_what_no_other_process_could_be_sent_is_named() -> None:
    nested: Any = "deep"
    for _ in range(MAX_DEPTH - 1):
        nested = [nested]
    fits = Row({**row("a").data, "notes": nested}, "r.jsonl", 8)
    assert pickle.loads(pickle.dumps(blocks_of(cut([fits], CHOICES, 2, 1000)))) == [[fits]]
    deeper = Row({**row("a").data, "notes": {"more": nested}}, "r.jsonl", 9)
    with pytest.raises(InputError, match=r"r\.jsonl:9: nested more than 200 deep: it can't be sent"):
        cut([fits, deeper], CHOICES, 2, 1000)
    # Of a row in parts, that field is not sent at all.
    several = passages(1, ["a", "b"])
    several.data["notes"] = {"more": nested}
    assert len(blocks_of(cut([several], QA, 2, 1000))[0]) == 2


def test_all_workers_get_some_of_it_and_the_last_blocks_are_small() -> None:
    rows = [row(chr(0x4E00 + line) + "x" * 999, line) for line in range(400)]
    sizes = [len(block) for block in blocks_of(cut(rows, CHOICES, 4, 4_000_000))]
    assert sizes[0] == pytest.approx(400 / 8, abs=1)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-2] == -(-MIN_BLOCK_TOKENS * CHARS_PER_TOKEN // 1004)


def test_where_much_is_shared_there_is_work_for_all_in_every_window() -> None:
    # Forty rows a text: a window has a hundred thousand tokens, and two thousand of them differ.
    rows = [row(chr(0x4E00 + line // 40) * 4000 + f"{line:04}", line) for line in range(800)]
    windows = cut(rows, CHOICES, 2, 100_000)
    assert len(windows) > 3
    assert all(len(window.cuts) >= 2 for window in windows[:-1])


def test_one_worker_takes_all_there_is() -> None:
    rows = [row(chr(0x4E00 + line) + "x" * 999, line) for line in range(400)]
    assert len(blocks_of(cut(rows, CHOICES, 1, 4_000_000))) == 1


def test_no_more_is_read_than_a_window_and_a_half() -> None:
    read = 0

    def endless() -> Iterator[Row]:
        nonlocal read
        while True:
            read += 1
            yield row(chr(0x4E00 + read) + "x" * 395)

    windows = cut_windows(endless(), CHOICES, 2, 1000)
    for number in range(1, 4):
        window = next(windows)
        assert (len(window.rows), [len(block) for block in blocks_of([window])]) == (20, [10, 10])
        assert read == 20 * number + 10


@pytest.mark.parametrize(
    ("count", "windows"), [(1, [1]), (29, [29]), (30, [20, 10]), (49, [20, 29]), (51, [20, 20, 11])]
)
def test_the_last_window_is_neither_tiny_nor_huge(count: int, windows: list[int]) -> None:
    rows = [row(chr(0x4E00 + line) + "x" * 395, line) for line in range(count)]
    assert [len(window.rows) for window in cut(rows, CHOICES, 2, 1000)] == windows


def test_a_query_counts_for_each_candidate_that_it_is_asked_of() -> None:
    # As the tokens of a window do: a row with a long query and short candidates has many.
    rows = [passages(line, [f"{line} {number}" for number in range(20)]) for line in range(40)]
    for found in rows:
        found.data["query"] = "q" * 2000
    assert [len(window.rows) for window in cut(rows, QA, 1, 100_000)] == [9, 9, 9, 13]


def test_a_part_has_what_its_prompt_needs_and_nothing_else() -> None:
    config = TaskConfig(template="{title}: {key} {query}| {answer}")
    data = {"title": "t", "query": "q", "answers": ["yes"], "pos": ["a"], "neg": ["b"], "notes": "n" * 9999}
    assert [part.data for part in split(Row({**data, "query_id": 4}), config)] == [
        {"title": "t", "query": "q", "answers": ["yes"], "query_id": 4, "pos": [key]} for key in "ab"
    ]


def test_blocks_end_where_little_is_shared() -> None:
    # Three texts of some length, each asked about by several rows: blocks end where the text changes.
    rows = [row(f"{text} " * 100 + f"question {i}", i) for i in range(10) for text in ("river", "town", "house")]
    blocks = blocks_of(cut(rows, CHOICES, 3, 1700))
    assert [{found.data["context"].split()[0] for found in block} for block in blocks] == [
        {"house"},
        {"river"},
        {"town"},
    ]


def test_a_bad_row_is_dealt_like_others() -> None:
    rows = [row("x" * 100), Row({"context": 5}, "r.jsonl", 2), row("x" * 100)]
    windows = cut(rows, CHOICES, 1, 20)
    assert sorted(found.line or 0 for block in blocks_of(windows) for found in block) == [1, 1, 2]


def test_rows_that_only_a_tokenizer_expands_are_sorted_by_what_they_say() -> None:
    def talk(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text * 20}]

    topics = ["hello ", "goodbye ", "hello ", "goodbye "]
    preferences = [
        Row({"prompt": talk(text), "chosen": talk("a"), "rejected": talk("b")}, "r.jsonl", line)
        for line, text in enumerate(topics)
    ]
    conversations = [
        Row({"context": talk(text), "choices": [" a", " b"]}, "r.jsonl", line) for line, text in enumerate(topics)
    ]
    for rows, config in (
        (preferences, TaskConfig("preference")),
        (conversations, TaskConfig("choices", chat_template=True)),
    ):
        assert plan_row(rows[0], config).num_pairs == 2
        (window,) = cut(rows, config, 1, 4_000_000)
        assert [found.line for block in blocks_of([window]) for found in block] == [1, 3, 0, 2]
