"""The score cache: what is put in comes out again, and nothing else."""

from __future__ import annotations

import hashlib
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_entries import IDENTITY, OTHER, get_numbers, put, put_numbers, request, score, truth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastscore import cache
from fastscore.cache import ScoreCache
from fastscore.cache_blocks import BLOCK_ENTRIES, request_keys
from fastscore.fingerprint import ScoreIdentity
from fastscore.types import AnswerScore, ScoringRequest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scores.cache.sqlite"


@pytest.mark.parametrize("count", [1, BLOCK_ENTRIES - 1, BLOCK_ENTRIES, BLOCK_ENTRIES + 1, 700])
def test_scores_come_back_to_the_bit_also_from_a_file_opened_again(path: Path, count: int) -> None:
    numbers = range(count)
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, numbers) == {}
        put_numbers(store, numbers)
        assert get_numbers(store, [*reversed(numbers), count + 7]) == truth(numbers)
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, numbers) == truth(numbers)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_nothing_is_asked_nothing_is_put(path: Path) -> None:
    with ScoreCache(path, IDENTITY) as store:
        assert store.get(store.keys([])) == []
        put_numbers(store, [])
        assert store.keys([]).shape == (0, 2)


def test_a_key_is_all_of_a_request_and_nothing_else(path: Path) -> None:
    requests = [
        ScoringRequest((1, 2, 3), 1),
        ScoringRequest((1, 2, 3), 2),
        ScoringRequest((1, 2, 3, 0), 1),
        ScoringRequest((0, 1, 2, 3), 1),
        ScoringRequest((1, 2, 3 << 8), 1),
        ScoringRequest((1, (1 << 32) - 1), 1),
        ScoringRequest((7,) * 100_000, 99_999),
    ]
    scores = [AnswerScore((-float(place),) * asked.num_answer_tokens, False) for place, asked in enumerate(requests)]
    with ScoreCache(path, IDENTITY) as store, ScoreCache(path, OTHER) as other:
        put(store, requests[:-1], scores[:-1])
        assert store.get(store.keys(requests)) == [*scores[:-1], None]
        put(store, requests[-1:], scores[-1:])
        assert store.get(store.keys(requests)) == scores
        assert other.get(other.keys(requests)) == [None] * len(requests)
        put(other, requests, [replace(known, is_greedy=True) for known in scores])
        assert [found.is_greedy for found in store.get(store.keys(requests)) if found] == [False] * len(requests)
        assert [found.is_greedy for found in other.get(other.keys(requests)) if found] == [True] * len(requests)


def test_keys_are_the_same_in_every_process_and_version() -> None:
    # SHA-256 of fingerprint, answer start (8 bytes) and ids (4 bytes each), put together by hand.
    asked = ScoringRequest((5, 49151, 1 << 31), 2)
    text = IDENTITY.fingerprint() + bytes([2, *[0] * 7, 5, 0, 0, 0, 0xFF, 0xBF, 0, 0, 0, 0, 0, 0x80])
    expected = np.frombuffer(hashlib.sha256(text).digest()[:16], dtype="<i8")
    assert request_keys(IDENTITY.fingerprint(), [asked]).tolist() == [expected.tolist()]


@pytest.mark.parametrize("field", [f.name for f in fields(ScoreIdentity)])
def test_the_fingerprint_depends_on_everything_but_the_names(field: str) -> None:
    value: Any = {"trust_remote_code": True, "machine": {"cpu": "x", "threads": 2}}.get(field, "something else")
    changed = replace(IDENTITY, **{field: value})
    assert (changed.fingerprint() == IDENTITY.fingerprint()) == (field in ("model", "adapter"))
    assert changed.about()[field] == value


def test_what_is_no_number_is_never_kept(path: Path) -> None:
    numbers = [1, 2, 3, 4]
    scores = [score(number) for number in numbers]
    bad = [replace(scores[1], token_logprobs=(*scores[1].token_logprobs[:-1], float("nan")))]
    bad.append(replace(scores[2], token_logprobs=(float("-inf"), *scores[2].token_logprobs[1:])))
    with ScoreCache(path, IDENTITY) as store:
        put(store, map(request, numbers), [scores[0], *bad, scores[3]])
        assert get_numbers(store, numbers) == truth([1, 4])
        put(store, [request(2)], bad[:1])
        assert get_numbers(store, numbers) == truth([1, 4])


def test_scores_put_twice_take_room_once(path: Path) -> None:
    with ScoreCache(path, IDENTITY) as store:
        put_numbers(store, [1, 2, 1, 3])
        put_numbers(store, [3, 2, 1, 4])
        assert store._connection.execute("SELECT sum(entries) FROM blocks").fetchone() == (4,)
        assert get_numbers(store, range(6)) == truth([1, 2, 3, 4])


def test_half_a_key_is_not_enough(path: Path) -> None:
    logprobs, length, greedy = np.array([-1, -2], dtype=np.float32), np.array([1, 1]), np.array([False, True])
    with ScoreCache(path, IDENTITY) as store:
        store.put(np.array([[5, 1], [6, 1]]), logprobs, length, greedy)
        asked = np.array([[5, 2], [6, 1], [5, 1]])
        assert store.get(asked) == [None, AnswerScore((-2.0,), True), AnswerScore((-1.0,), False)]


Operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.lists(st.integers(0, 60), max_size=40)),
        st.tuples(st.just("get"), st.lists(st.integers(0, 60), max_size=40)),
        st.tuples(st.just("reopen"), st.none()),
        st.tuples(st.just("other handle"), st.none()),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=Operations, index_at_once=st.sampled_from([1, 7, 30, 1000]))
def test_like_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, Any]], index_at_once: int
) -> None:
    path = tmp_path_factory.mktemp("dict") / "scores"
    known: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "INDEX_AT_ONCE", index_at_once)
        handles = [ScoreCache(path, IDENTITY), ScoreCache(path, IDENTITY)]
        for name, numbers in operations:
            if name == "put":
                put_numbers(handles[0], numbers)
                known |= set(numbers)
            elif name == "get":
                assert get_numbers(handles[0], numbers) == truth(known & set(numbers))
            elif name == "reopen":
                handles.pop(0).close()
                handles.append(ScoreCache(path, IDENTITY))
            else:
                handles.reverse()
        for handle in handles:
            assert get_numbers(handle, range(61)) == truth(known)
            handle.close()


def test_what_another_process_indexes_is_found_and_ids_go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "INDEX_AT_ONCE", 64)
    with ScoreCache(path, IDENTITY) as writer, ScoreCache(path, IDENTITY) as reader:
        for first in range(0, 600, 30):
            put_numbers(writer, range(first, first + 30))
            assert get_numbers(reader, range(first + 40)) == truth(range(first + 30))
            assert len(reader._newest) < 64 + 30  # memory does not grow with the file
        assert writer._connection.execute("SELECT count(*) FROM places").fetchone()[0] >= 600 - 64
        assert writer._connection.execute("SELECT max(id) * 16 >= 600 FROM blocks").fetchone() == (1,)


def test_a_file_taken_away_or_replaced_is_noticed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ScoreCache(path, IDENTITY) as store:
        put_numbers(store, range(20))
        path.rename(path.with_name("elsewhere"))
        assert get_numbers(store, range(20)) == {}
        put_numbers(store, range(5))
        assert "was moved or removed" in caplog.text
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, range(20)) == truth(range(5))


def test_the_same_cache_through_a_link(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    with ScoreCache(link, IDENTITY) as store:
        put_numbers(store, range(3))
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, range(4)) == truth(range(3))


def cpu_rate(count: int, work: Any) -> float:
    """Per second of this process's own time, so that a busy machine does not matter."""
    started = time.process_time()
    work()
    return count / (time.process_time() - started)


def test_fast_enough(path: Path) -> None:
    # The aim is 200,000 look-ups and 50,000 inserts a second; bench/cache.py measures.
    count, draw = 60_000, np.random.default_rng(0)
    keys = draw.integers(-(2**63), 2**63 - 1, (count, 2), dtype=np.int64)
    length = np.full(count, 4)
    logprobs, greedy = -draw.random(4 * count, dtype=np.float32), draw.random(count) < 0.5
    with ScoreCache(path, IDENTITY) as store:

        def insert() -> None:
            for first in range(0, count, 500):
                part = slice(first, first + 500)
                store.put(keys[part], logprobs[4 * first : 4 * (first + 500)], length[part], greedy[part])

        assert cpu_rate(count, insert) > 25_000
        store._index()
        assert max(cpu_rate(count, lambda: store.get(keys)) for _ in range(3)) > 70_000
        found = store.get(keys)
    rows = logprobs.reshape(-1, 4).tolist()
    assert found == [AnswerScore(tuple(row), is_greedy) for row, is_greedy in zip(rows, greedy.tolist(), strict=True)]
