"""The score cache when its file is damaged, of another format, or no cache at all."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import suppress
from pathlib import Path

import pytest
from cache_entries import IDENTITY, OTHER, aside, get_numbers, put_numbers, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscore import cache
from fastscore.cache import ScoreCache
from fastscore.cache_file import FORMAT, SUFFIX
from fastscore.cache_upkeep import cache_info
from fastscore.types import InputError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / f"out.jsonl{SUFFIX}"


def filled(path: Path) -> None:
    """300 scores of one model, 200 of them in the index, and 50 of another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "INDEX_AT_ONCE", 200)
        with ScoreCache(path, IDENTITY) as store, ScoreCache(path, OTHER) as other:
            for first in range(0, 300, 50):
                put_numbers(store, range(first, first + 50))
            put_numbers(other, range(50))


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "no database":
        path.write_bytes(b'{"query": "a row"}\n' * 100)
    elif how == "zeros":
        path.write_bytes(bytes(len(data)))
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "header only":
        path.write_bytes(data[:60])
    elif how == "pages overwritten":
        path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    else:
        connection = sqlite3.connect(path)
        connection.execute(how)
        connection.commit()
        connection.close()


UNREADABLE = "file is not a database", "database disk image is malformed"  # in SQLite's words
DAMAGE: dict[str, str | tuple[str, str]] = {
    "no database": UNREADABLE,
    "zeros": UNREADABLE,
    "truncated": UNREADABLE,
    "header only": UNREADABLE,
    "pages overwritten": UNREADABLE,
    "PRAGMA user_version=7": f"it has format 7, and this version of fastscore has {FORMAT}",
    "PRAGMA application_id=1": "it belongs to another program",
    "DROP TABLE blocks": "its tables are not those of a cache",
    "CREATE TRIGGER t AFTER INSERT ON blocks BEGIN DELETE FROM blocks; END": "its tables are not those of a cache",
    "DELETE FROM indexed": "a row is missing from its table indexed",
    "UPDATE indexed SET block = 100000": "it says that blocks are indexed which are not there",
    "UPDATE indexed SET block = 'x'": "it says that blocks are indexed which are not there",
    "UPDATE sqlite_sequence SET seq = 3": "it says that blocks are indexed which are not there",
    "UPDATE places SET place = 'x'": "its index holds something else than numbers",
}


@pytest.mark.parametrize("how", DAMAGE, ids=lambda how: how.replace(" ", "-")[:40])
def test_a_damaged_file_is_told_set_aside_and_replaced(path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    filled(path)
    damage(path, how)
    before = path.read_bytes()
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, range(300)) == {}
        put_numbers(store, range(100))
        assert get_numbers(store, range(300)) == truth(range(100))
    [message] = caplog.messages
    assert message.endswith(f"; set aside as {path.name}.corrupt-1, and scores are computed again")
    reasons = DAMAGE[how]
    assert message.startswith(tuple(f"{path}: {why};" for why in ([reasons] if isinstance(reasons, str) else reasons)))
    assert path.with_name(f"{path.name}.corrupt-1").read_bytes() == before
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, range(300)) == truth(range(100))
    path.write_bytes(b"again")
    ScoreCache(path, IDENTITY).close()
    assert aside(path) == [f"{path.name}.corrupt-1", f"{path.name}.corrupt-2"]


def test_damage_that_shows_when_scores_are_put(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ScoreCache(path, IDENTITY) as store:
        put_numbers(store, range(40))
        store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        store._connection.execute("UPDATE sqlite_sequence SET seq = 1")
        put_numbers(store, range(40, 80))
        assert get_numbers(store, range(100)) == truth(range(40, 80))
    assert aside(path) == [f"{path.name}.corrupt-1"]
    assert "UNIQUE constraint failed: blocks.id; set aside as" in caplog.text


@pytest.mark.parametrize("column", ["crc = crc + 1", "entries = 3", "data = 'text'", "data = x'00'"])
def test_damaged_blocks_are_computed_again_and_kept_again(
    path: Path, column: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(path)
    damage(path, f"UPDATE blocks SET {column} WHERE id IN (2, 4, 18)")
    with ScoreCache(path, IDENTITY) as store:
        found = get_numbers(store, range(300))
        lost = set(range(300)) - found.keys()
        assert found == truth(found)
        assert 16 < len(lost) <= 48
        put_numbers(store, lost)
        assert get_numbers(store, range(300)) == truth(range(300))
        monkeypatch.setattr(cache, "INDEX_AT_ONCE", 1)
        put_numbers(store, [1000])
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, range(300)) == truth(range(300))
    assert caplog.messages == [f"{path} is damaged in places: those scores are computed again"]


def test_into_a_broken_structure_nothing_is_put(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(path)
    # What the table forbids, as a wrong byte in a row's header brings about.
    for statement in (
        "UPDATE sqlite_master SET sql = replace(sql, 'data BLOB NOT NULL', 'data BLOB') WHERE name = 'blocks'",
        "UPDATE blocks SET data = NULL WHERE id = 3",
        "UPDATE sqlite_master SET sql = replace(sql, 'data BLOB', 'data BLOB NOT NULL') WHERE name = 'blocks'",
    ):
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute(statement)
        connection.commit()
        connection.close()
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, range(300)) == {}
        put_numbers(store, range(5))
    assert "NULL value in blocks.data; set aside as out.jsonl.cache.sqlite.corrupt-1" in caplog.text


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "scores"
    filled(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def killed_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A file and its log as a killed writer leaves them."""
    path = tmp_path_factory.mktemp("killed") / "scores"
    with ScoreCache(path, IDENTITY) as store:
        put_numbers(store, range(100))
        store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        put_numbers(store, range(100, 300))
        return path.read_bytes(), Path(f"{path}-wal").read_bytes()


Flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=12)


def flipped(data: bytes, flips: list[tuple[float, int]], kept: float) -> bytes:
    changed = bytearray(data[: int(len(data) * kept)])
    for where, bits in flips:
        if changed:
            changed[int(where * len(changed))] ^= bits
    return bytes(changed)


@settings(max_examples=200, deadline=None)
@given(flips=Flips, kept=st.sampled_from([1.0, 1.0, 1.0, 0.7, 0.01]), in_log=st.booleans(), head=st.booleans())
def test_whatever_bytes_are_changed_no_wrong_score_comes_out(
    tmp_path_factory: pytest.TempPathFactory,
    sound_file: bytes,
    killed_file: tuple[bytes, bytes],
    flips: list[tuple[float, int]],
    kept: float,
    in_log: bool,
    head: bool,
) -> None:
    path = tmp_path_factory.mktemp("flipped") / f"scores{SUFFIX}"
    if head:  # where a byte decides about the whole file
        flips = [(where * 0.01, bits) for where, bits in flips]
    if in_log:
        path.write_bytes(killed_file[0])
        Path(f"{path}-wal").write_bytes(flipped(killed_file[1], flips, kept))
    else:
        path.write_bytes(flipped(sound_file, flips, kept))
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    with ScoreCache(path, IDENTITY) as store:
        found = get_numbers(store, range(320))
        assert found == truth(found)
        # What is put into a file whose structure is broken may get lost once more.
        for _ in range(4):
            put_numbers(store, set(range(310)) - found.keys())
            found = get_numbers(store, range(320))
            assert found == truth(found)
        assert found.keys() == set(range(310))
    for name in (path, copy):
        with suppress(InputError):
            assert cache_info(name).entries >= 0
    shutil.rmtree(path.parent)


def test_an_empty_file_becomes_a_cache(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.touch()
    with ScoreCache(path, IDENTITY) as store:
        put_numbers(store, range(3))
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, range(4)) == truth(range(3))
    assert caplog.messages == []


def test_a_file_of_another_name_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    rows, database = tmp_path / "rows.jsonl", tmp_path / "other.db"
    rows.write_text('{"query": "a row"}\n')
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE precious (value)")
    connection.close()
    before = {path: path.read_bytes() for path in (rows, database)}
    for path, reason in ((rows, "file is not a database"), (database, "it belongs to another program")):
        with pytest.raises(InputError, match=rf"{path}: is not a cache of scores: {reason}; nothing is written there"):
            ScoreCache(path, IDENTITY)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(tmp_path.iterdir()) == sorted(before)


def test_another_format_under_another_name_is_set_aside_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.db"
    filled(path)
    damage(path, "PRAGMA user_version=2")
    ScoreCache(path, IDENTITY).close()
    assert aside(path) == ["mine.db.corrupt-1"]
