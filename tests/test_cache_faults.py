"""The score cache when things go wrong around it: killed writers, several at once, full disks. All really happens."""

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
from pathlib import Path

import pytest
from cache_entries import IDENTITY, aside, get_numbers, put_numbers, truth
from small_disks import small_disk

from fastscore.cache import ScoreCache
from fastscore.cache_file import SUFFIX
from fastscore.mounts import network_file_system
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
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", kilobytes=600) as folder:
        yield folder


def test_a_full_disk_is_told_and_what_was_safe_stays(disk: Path) -> None:
    path = disk / f"scores{SUFFIX}"
    number = 0
    with ScoreCache(path, IDENTITY) as store:
        while shutil.disk_usage(disk).free > 100_000:
            put_numbers(store, range(number, number + 50))
            number += 50
        with pytest.raises(OSError, match="No space left on device") as raised:
            put_numbers(store, range(number, number + 2000))
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))
        assert number > 200
        assert get_numbers(store, range(number + 50)) == truth(range(number))
        with pytest.raises(OSError, match="No space left"):
            put_numbers(store, range(number, number + 2000))
    subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
    with ScoreCache(path, IDENTITY) as store:
        assert get_numbers(store, range(number + 50)) == truth(range(number))
        put_numbers(store, range(number, number + 50))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(InputError, match=rf"{path}: cannot be written: it is read-only"):
        ScoreCache(path, IDENTITY)
    with pytest.raises(InputError, match="new: cannot be written: no right to, or on a read-only disk"):
        ScoreCache(disk / "new", IDENTITY)


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
