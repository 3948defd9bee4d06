"""The score cache when things go wrong: killed writers, full disks, damaged files. Each really happens."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cache_entries import IDENTITY, OTHER, get_numbers, put_numbers, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscore import cache
from fastscore.cache import ScoreCache
from fastscore.cache_file import FORMAT, SUFFIX, network_file_system
from fastscore.cache_upkeep import cache_info
from fastscore.types import InputError

DEATHS = 10
WRITER = Path(__file__).with_name("cache_entries.py")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / f"out.jsonl{SUFFIX}"


def start_writer(
    path: Path, first: int, last: int, *, by: int = 1, step: int = 10, index_at_once: int = 150, file_bytes: int = 0
) -> subprocess.Popen[str]:
    numbers = (first, last, by, step, index_at_once, file_bytes)
    command = [sys.executable, str(WRITER), str(path), *map(str, numbers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(lines: list[str]) -> set[int]:
    """What a writer was told is safe."""
    assert not [line for line in lines if line.startswith("wrong")]
    return {int(number) for line in lines if line.startswith("safe ") for number in line.split()[1:]}


def aside(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.glob(f"{path.name}.corrupt-*"))


def test_a_killed_writer_loses_nothing_that_was_safe(path: Path) -> None:
    draw, safe, first, deaths = random.Random(6), set[int](), 0, 0
    for _ in range(DEATHS):
        with start_writer(path, first, 1_000_000) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(draw.randint(1, 30))]
            time.sleep(draw.uniform(0, 0.02))
            writer.send_signal(signal.SIGKILL)
            # The last line may be cut short.
            lines += [line for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        deaths += writer.returncode == -signal.SIGKILL
        safe |= told(lines)
        first = max(safe) + 1
        with ScoreCache(path, IDENTITY) as store:
            assert get_numbers(store, safe) == truth(safe)
            assert len(get_numbers(store, range(first, first + 50))) <= 10  # what was being put
    assert deaths == DEATHS
    assert len(safe) > 150
    assert aside(path) == []
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("SELECT count(*) FROM places").fetchone()[0] >= 150  # some died with an index there
    connection.close()


def test_two_processes_at_once(path: Path) -> None:
    writers = [start_writer(path, first, 3000, by=2, step=15) for first in (0, 1)]
    writers.append(start_writer(path, 0, 600, step=25))  # what the others put as well
    outputs = [writer.communicate(timeout=120) for writer in writers]
    assert [(writer.returncode, errors) for writer, (_, errors) in zip(writers, outputs, strict=True)] == [(0, "")] * 3
    for first, (lines, _) in zip((0, 1), outputs, strict=False):
        assert told(lines.splitlines()) == set(range(first, 3000, 2))
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, range(3100)) == truth(range(3000))
    assert aside(path) == []


def test_two_processes_make_or_replace_one_file(path: Path) -> None:
    for content in (None, b"no database" * 1000):
        if content is not None:
            path.write_bytes(content)
        writers = [start_writer(path, first, 40, by=4) for first in range(4)]
        outputs = [writer.communicate(timeout=120) for writer in writers]
        assert [writer.returncode for writer in writers] == [0] * 4
        assert sum("set aside" in errors for _, errors in outputs) == (content is not None)
        with ScoreCache(path, IDENTITY) as store:
            assert get_numbers(store, range(50)) == truth(range(40))
    assert aside(path) == [f"{path.name}.corrupt-1"]


def test_a_limit_on_the_size_of_files_is_told_and_what_was_safe_stays(path: Path) -> None:
    writer = start_writer(path, 0, 100_000, step=50, file_bytes=300_000)
    out, errors = writer.communicate(timeout=120)
    assert (writer.returncode, errors) == (0, "")
    *lines, failed, end = out.splitlines()
    code, name = failed.removeprefix("failed ").split(" ", 1)
    assert (int(code) in (errno.EIO, errno.ENOSPC, errno.EFBIG), name, end) == (True, str(path), "end")
    safe = told(lines)
    assert len(safe) > 500
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, range(len(safe) + 50)) == truth(safe)
        put_numbers(store, range(len(safe), len(safe) + 500))
        assert get_numbers(store, range(len(safe) + 500)) == truth(range(len(safe) + 500))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("can't mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_told_and_what_was_safe_stays(small_disk: Path) -> None:
    path = small_disk / f"scores{SUFFIX}"
    number = 0
    with ScoreCache(path, IDENTITY) as store:
        while shutil.disk_usage(small_disk).free > 100_000:
            put_numbers(store, range(number, number + 50))
            number += 50
        with pytest.raises(OSError, match="No space left on device") as raised:
            put_numbers(store, range(number, number + 2000))
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))
        assert number > 200
        assert get_numbers(store, range(number + 50)) == truth(range(number))
        with pytest.raises(OSError, match="No space left"):
            put_numbers(store, range(number, number + 2000))
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, range(number + 50)) == truth(range(number))
        put_numbers(store, range(number, number + 50))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(InputError, match=rf"{path}: cannot be written: it is read-only"):
        ScoreCache(path, IDENTITY)


def filled(path: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """300 scores of one model, 200 of them in the index, and 50 of another."""
    patch = monkeypatch or pytest.MonkeyPatch()
    patch.setattr(cache, "INDEX_AT_ONCE", 200)
    with ScoreCache(path, IDENTITY) as store, ScoreCache(path, OTHER) as other:
        for first in range(0, 300, 50):
            put_numbers(store, range(first, first + 50))
        put_numbers(other, range(50))
    patch.undo()


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


@settings(max_examples=120, deadline=None)
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


def test_places_where_nothing_can_be_kept(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    cases = {
        tmp_path: "cannot be written: it is a directory",
        tmp_path / "nowhere" / "scores": "cannot be written: no such folder",
        tmp_path / "fifo": "cannot be written: it is not a regular file",
        tmp_path / ("x" * 300): "cannot be written: File name too long",
        tmp_path / "nul\0byte": "cannot be a file: embedded null byte",
    }
    for path, reason in cases.items():
        with pytest.raises(InputError) as raised:
            ScoreCache(path, IDENTITY)
        assert reason in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["fifo"]


def test_a_file_that_another_process_holds_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScoreCache(path, IDENTITY) as store:
        put_numbers(store, range(3))
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        store._connection.execute("PRAGMA busy_timeout=20")
        assert get_numbers(store, range(4)) == truth(range(3))
        with pytest.raises(OSError, match="another process has held it") as raised:
            put_numbers(store, range(5))
        assert raised.value.filename == str(path)
        holder.execute("ROLLBACK")
        holder.close()
        put_numbers(store, range(5))
        assert get_numbers(store, range(9)) == truth(range(5))


def test_network_file_systems_are_known_by_the_list_of_mounts(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n"
        "2 1 0:50 / /data rw - nfs4 server:/data rw,vers=4.2\n"
        "3 2 0:51 / /data/local rw - xfs /dev/sdb rw\n"
        "4 1 0:52 / /with\\040space rw - lustre mds:/fs rw\n"
        "not a mount\n"
    )
    cases = {
        "/home/a": None,
        "/data/x/y": "nfs4",
        "/data/local/x": None,
        "/database/x": None,
        "/with space/x": "lustre",
    }
    assert {name: network_file_system(Path(name), mounts) for name in cases} == cases
    assert network_file_system(Path("/data/x"), tmp_path / "missing") is None
    assert network_file_system(tmp_path) is None
