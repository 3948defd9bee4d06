"""Runs that die, are stopped, or find their disk full: nothing scored is lost, and the same command ends as if nothing
had happened. All really happens, to processes of their own."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_server import Run, RunServer
from small_disks import small_disk
from tiny_models import make_tiny_model

from fastscore.cache_file import SUFFIX
from fastscore.cache_upkeep import cache_info

DEATHS = 50
PAIRS = 1200
ANSWER = " the old town"
ROWS_PER_CALL = 1024
AT_EVERY_BATCH = {"fastscore.launch:KEEP_SECONDS": 0.0, "fastscore.launch:KEEP_COST": 0.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunServer]:
    with RunServer(tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def write_rows(path: Path, first: int = 0, last: int = PAIRS) -> Path:
    """Prompts that begin differently, so that each costs its own tokens; answers of one length."""
    draw = random.Random(3)
    words = ["river", "town", "Straße", "42", "白", "houses", "people"]
    contexts = [f"{number} {' '.join(draw.choices(words, k=25))}" for number in range(last)]
    rows = [{"context": context, "continuation": ANSWER} for context in contexts[first:]]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def command(rows: Path, model: Path, out: Path) -> list[str | Path]:
    return ["score", rows, "-m", model, "--task", "pairs", "--dtype", "fp32", "--deterministic", "-o", out]


@pytest.fixture(scope="module")
def whole(rows: Path, model: Path, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run gives that nothing happens to, and that has no cache."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    status, said = server.run(*command(rows, model, out), "--no-cache")
    assert status == 0, said
    assert not Path(f"{out}{SUFFIX}").exists()
    return out.read_bytes()


def meta(out: Path) -> dict[str, Any]:
    return json.loads(Path(f"{out}.meta.json").read_text())


def kept(out: Path) -> int:
    cache = Path(f"{out}{SUFFIX}")
    return cache_info(cache).entries if cache.exists() and cache.stat().st_size else 0


@pytest.mark.slow
def test_killed_fifty_times(rows: Path, model: Path, whole: bytes, server: RunServer, tmp_path: Path) -> None:
    """At random moments. Where every batch is kept before it is reported, all that was reported is there afterwards;
    otherwise less is missing than waits for a call of the LM head."""
    out = tmp_path / "out.jsonl"
    draw, deaths, before, lost = random.Random(4), 0, 0, [0]
    answer_tokens = _answer_tokens(model)
    started = time.monotonic()
    server.run(*command(rows, model, tmp_path / "undisturbed.jsonl"))
    # Later ones find scores in the cache and are shorter.
    seconds = 0.7 * (time.monotonic() - started)
    while deaths < DEATHS:
        at_every_batch = deaths % 2 == 0
        run = server.start(*command(rows, model, out), patches=AT_EVERY_BATCH if at_every_batch else {})
        time.sleep(draw.uniform(0, seconds))
        run.signal(signal.SIGKILL)
        status, said = run.wait()
        if status == 0:
            assert out.read_bytes() == whole
            out.unlink()
            continue
        assert status == -signal.SIGKILL, said
        deaths += 1
        if out.exists():  # killed between the last row and its end
            assert out.read_bytes() == whole
            out.unlink()
        reported, after = max((pairs for _, pairs in run.progress()), default=0), kept(out)
        assert after >= before, "what was there stays there"
        missing = max(0, reported - after)
        assert missing <= (1 if at_every_batch else -(-2 * ROWS_PER_CALL // answer_tokens))
        lost.append(missing)
        before = after
    status, said = server.run(*command(rows, model, out))
    assert status == 0, said
    assert out.read_bytes() == whole
    assert meta(out)["stats"]["cached"] >= before > 0
    print(f"{deaths} deaths, at most {max(lost)} of {PAIRS} pairs lost at one")


def _answer_tokens(model: Path) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(model)(ANSWER, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_stopped_by_a_signal(
    number: int, expected: int, rows: Path, model: Path, whole: bytes, server: RunServer, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run = server.start(*command(rows, model, out))
    run.until_pairs(PAIRS // 10)
    run.signal(number)
    status, said = run.wait()
    cache = Path(f"{out}{SUFFIX}")
    hint = f"what was scored is kept in {cache}: the same command goes on from there"
    assert (status, said.splitlines()[-1]) == (expected, f"fastscore: interrupted; {hint}")
    assert [path.name for path in tmp_path.iterdir()] == [cache.name], "no half output"
    reported = run.progress()[-1][1]
    assert reported <= kept(out) + 1, "the batch in flight was finished and kept"
    assert kept(out) < PAIRS
    before = kept(out)
    status, said = server.run(*command(rows, model, out))
    assert (status, out.read_bytes() == whole) == (0, True)
    assert meta(out)["stats"]["cached"] == before
    assert f"pairs from cache │ {before:,}" in said


def test_stopped_without_a_cache(rows: Path, model: Path, server: RunServer, tmp_path: Path) -> None:
    run = server.start(*command(rows, model, tmp_path / "out.jsonl"), "--no-cache")
    run.until_pairs(10)
    run.signal(signal.SIGTERM)
    status, said = run.wait()
    assert (status, said.splitlines()[-1]) == (143, "fastscore: interrupted; nothing of it is kept")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_on_one_cache(rows: Path, model: Path, whole: bytes, server: RunServer, tmp_path: Path) -> None:
    cache = tmp_path / "shared"
    outs = [tmp_path / "one.jsonl", tmp_path / "other.jsonl"]
    runs: list[Run] = [server.start(*command(rows, model, out), "--cache", cache) for out in outs]
    for run, out in zip(runs, outs, strict=True):
        status, said = run.wait()
        assert (status, "set aside" in said) == (0, False), said
        assert out.read_bytes() == whole
    assert cache_info(cache).entries >= PAIRS
    third = tmp_path / "third.jsonl"
    assert server.run(*command(rows, model, third), "--cache", cache)[0] == 0
    assert (third.read_bytes() == whole, meta(third)["stats"]["cached"]) == (True, PAIRS)


def test_a_cache_that_outgrows_the_disk(
    rows: Path, model: Path, whole: bytes, server: RunServer, tmp_path: Path
) -> None:
    """A limit on the size of files, which is below what the cache needs, and above what the rows before it need."""
    out = tmp_path / "out.jsonl"
    status, said = server.run(*command(rows, model, out), file_bytes=100_000, patches=AT_EVERY_BATCH)
    assert status == 1, said
    assert str(Path(f"{out}{SUFFIX}")) in said.splitlines()[-1]
    assert not out.exists()
    before = kept(out)
    assert 0 < before < PAIRS
    status, said = server.run(*command(rows, model, out))
    assert (status, out.read_bytes() == whole, meta(out)["stats"]["cached"]) == (0, True, before), said


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", kilobytes=300) as folder:
        yield folder


def test_a_full_disk(rows: Path, model: Path, whole: bytes, server: RunServer, disk: Path) -> None:
    out = disk / "out.jsonl"
    status, said = server.run(*command(rows, model, out))
    assert status == 1, said
    assert "No space left on device" in said.splitlines()[-1]
    assert not out.exists()
    assert not list(disk.glob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    before = kept(out)
    status, said = server.run(*command(rows, model, out))
    assert (status, out.read_bytes() == whole, meta(out)["stats"]["cached"]) == (0, True, before), said
    assert before > 0


def test_output_and_cache_on_different_disks(
    rows: Path, model: Path, whole: bytes, server: RunServer, tmp_path: Path
) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or os.stat(other).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second file system here")
    link, target, cache = tmp_path / "out.jsonl", other / f"fastscore-test-{os.getpid()}.jsonl", tmp_path / "scores"
    target.write_text("an old one")
    link.symlink_to(target)
    try:
        run = server.start(*command(rows, model, link), "--cache", cache)
        run.until_pairs(PAIRS // 10)
        run.signal(signal.SIGKILL)
        assert run.wait()[0] == -signal.SIGKILL
        assert target.read_text() == "an old one"
        status, said = server.run(*command(rows, model, link), "--cache", cache)
        assert (status, link.is_symlink(), target.read_bytes() == whole) == (0, True, True), said
    finally:
        for path in other.glob(f"fastscore-test-{os.getpid()}*"):
            path.unlink()


def test_rows_that_were_added_or_changed_since(
    rows: Path, model: Path, whole: bytes, server: RunServer, tmp_path: Path
) -> None:
    """Between a run that died and the next: only what is new is computed."""
    out, half = tmp_path / "out.jsonl", tmp_path / "half.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    first = [line.replace("river", "brook") if number % 10 == 0 else line for number, line in enumerate(lines[:500])]
    half.write_text("".join(first), encoding="utf-8")
    assert server.run(*command(half, model, out))[0] == 0
    changed = sum(one != other for one, other in zip(first, lines, strict=False))
    assert changed > 30
    status, said = server.run(*command(rows, model, out))
    assert (status, out.read_bytes() == whole) == (0, True), said
    assert meta(out)["stats"]["cached"] == 500 - changed


@pytest.mark.parametrize("damage", ["rubbish", "version", "cut short"])
def test_a_cache_that_cannot_be_read(
    damage: str, rows: Path, model: Path, whole: bytes, server: RunServer, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    cache = Path(f"{out}{SUFFIX}")
    if damage == "rubbish":
        cache.write_bytes(b"no database" * 1000)
    else:
        assert server.run(*command(rows, model, out))[0] == 0
        data = bytearray(cache.read_bytes())
        if damage == "version":
            data[60:64] = (99).to_bytes(4, "big")  # SQLite's user_version
            cache.write_bytes(data)
        else:
            cache.write_bytes(data[: len(data) // 2])
    status, said = server.run(*command(rows, model, out))
    assert (status, out.read_bytes() == whole) == (0, True), said
    assert f"set aside as {cache.name}.corrupt-1, and scores are computed again" in said.replace("\n", " ")
    assert kept(out) == PAIRS
