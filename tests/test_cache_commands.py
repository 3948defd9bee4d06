"""``fastscore cache``: what a person is shown, and what goes when something is removed."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cache_entries import IDENTITY, get_numbers, put_numbers, truth

from fastscore import cache
from fastscore.cache import ScoreCache
from fastscore.cache_upkeep import cache_info, prune_cache
from fastscore.cli import main
from fastscore.cli_cache import parse_age, parse_size
from fastscore.types import InputError

SECOND = replace(
    IDENTITY, model="org/second", weights="hub:org/second@1", adapter="my-lora", machine={"cpu": "x"}, device="cuda"
)
DAY = 86400


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["cache", *map(str, arguments)])
    captured = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, captured.out, captured.err


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """0 to 399 of the first model, half of them 40 days old; 0 to 99 of the second."""
    path = tmp_path / "scores"
    monkeypatch.setattr(cache, "INDEX_AT_ONCE", 300)
    now = time.time()
    with ScoreCache(path, IDENTITY) as first, ScoreCache(path, SECOND) as second:
        for start, age in ((0, 40), (100, 40), (200, 0), (300, 0)):
            monkeypatch.setattr(cache.time, "time", lambda age=age: now - age * DAY)
            put_numbers(first, range(start, start + 100))
        put_numbers(second, range(100))
    monkeypatch.undo()
    return path


def left(path: Path) -> tuple[dict[int, Any], dict[int, Any]]:
    with ScoreCache(path, IDENTITY) as first, ScoreCache(path, SECOND) as second:
        return get_numbers(first, range(500)), get_numbers(second, range(500))


def test_info_as_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "info", path, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    now = time.time()
    dates = [(model.pop("first"), model.pop("last")) for model in found["models"]]
    ages = [[round((now - stored) / DAY, 2) for stored in pair] for pair in dates]
    assert ages == [[40, 0], [0, 0]]
    sizes = [model.pop("bytes") for model in found["models"]]
    assert 0 < sizes[1] < sizes[0] < found["file_bytes"]
    assert found == {
        "path": str(path),
        "format": 1,
        "file_bytes": path.stat().st_size,
        "entries": 500,
        "models": [
            {"fingerprint": identity.fingerprint().hex(), "about": identity.about(), "entries": count}
            for identity, count in ((IDENTITY, 400), (SECOND, 100))
        ],
    }


def test_info_as_a_table_of_80_columns(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(capsys, "info", path)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == str(path)
    assert lines[1].startswith("500 scores, ")
    assert max(map(len, lines[1:])) <= 80
    text = " ".join(out.split())
    for part in ("tiny", "org/second", "my-lora", "deterministic", "400", "100", SECOND.fingerprint().hex()[:8]):
        assert part in text
    assert time.strftime("%Y-%m-%d", time.gmtime(time.time() - 40 * DAY)) in text
    assert "\x1b" not in out


def test_info_changes_nothing_and_works_beside_a_run(path: Path) -> None:
    before = path.read_bytes()
    cache_info(path)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["scores"]
    with ScoreCache(path, IDENTITY) as store:
        put_numbers(store, range(900, 910))
        assert cache_info(path).entries == 510
        assert cache_info(path).file_bytes > path.stat().st_size


def test_prune_by_model(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = path.stat().st_size
    status, out, err = run(capsys, "prune", path, "--model", "tiny")
    assert (status, err) == (0, "")
    assert out.startswith("removed 400 of 500 scores: ")
    assert left(path) == ({}, truth(range(100)))
    assert path.stat().st_size < size
    status, out, _ = run(capsys, "prune", path, "--json", "--model", SECOND.fingerprint().hex()[:9].upper())
    assert (status, json.loads(out)["removed"], json.loads(out)["kept"]) == (0, 100, 0)
    assert cache_info(path).models == ()
    assert run(capsys, "info", path)[1].splitlines()[1].startswith("0 scores")
    with ScoreCache(path, IDENTITY) as store:
        put_numbers(store, range(30))
        assert get_numbers(store, range(500)) == truth(range(30))


def test_prune_by_age_and_both(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "prune", path, "--older-than", "41d")[1].startswith("removed 0 of 500")
    assert run(capsys, "prune", path, "--older-than", "30d", "--model", "org/second")[1].startswith("removed 0 of 500")
    assert run(capsys, "prune", path, "--older-than", "30d", "--model", "tiny")[1].startswith("removed 200 of 500")
    assert left(path) == (truth(range(200, 400)), truth(range(100)))


def test_prune_to_a_size_removes_the_oldest(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = path.stat().st_size * 2 // 3
    status, out, _ = run(capsys, "prune", path, "--keep-size", str(keep))
    assert (status, path.stat().st_size <= keep) == (0, True)
    first, second = left(path)
    assert (first, second) == (truth(first), truth(range(100)))
    gone = set(range(400)) - first.keys()
    assert gone == set(range(len(gone)))  # stored in this order
    assert 100 < len(gone) < 350
    assert out.startswith(f"removed {len(gone)} of 500")
    assert run(capsys, "prune", path, "--keep-size", "1GB")[1].startswith(f"removed 0 of {500 - len(gone)}")
    assert run(capsys, "prune", path, "--keep-size", "1")[1].startswith(f"removed {500 - len(gone)} of")
    assert left(path) == ({}, {})


def test_a_dry_run_removes_nothing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_bytes()
    for arguments, count in (
        (("--model", "tiny"), "400"),
        (("--older-than", "1w"), "200"),
        (("--keep-size", "0"), "about 500"),
    ):
        status, out, err = run(capsys, "prune", path, *arguments, "--dry-run")
        assert (status, err) == (0, "")
        assert out.startswith(f"would remove {count} of 500 scores; the file has ")
    assert path.read_bytes() == before


def test_a_run_goes_on_while_its_scores_are_removed(path: Path) -> None:
    with ScoreCache(path, IDENTITY) as store:
        put_numbers(store, range(400, 450))
        assert get_numbers(store, range(500)) == truth(range(450))
        prune_cache(path, model="tiny")
        assert get_numbers(store, range(500)) == {}
        put_numbers(store, range(60))
        assert get_numbers(store, range(500)) == truth(range(60))
    assert left(path) == (truth(range(60)), truth(range(100)))
    assert [model.entries for model in cache_info(path).models] == [100, 60]


def test_bad_input_is_one_line_and_status_2(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    (tmp_path / "empty").touch()
    old = tmp_path / "old"
    with ScoreCache(old, IDENTITY):
        pass
    connection = sqlite3.connect(old)
    connection.execute("PRAGMA user_version=9")
    connection.close()
    cases: list[tuple[list[str | Path], str]] = [
        (["info", tmp_path / "no"], f"{tmp_path / 'no'}: no such file"),
        (["info", tmp_path], f"{tmp_path}: cannot be written: it is a directory"),
        (["info", rows], f"{rows}: is not a cache of scores: file is not a database; nothing is written there"),
        (["info", tmp_path / "empty"], f"{tmp_path / 'empty'}: is empty"),
        (["info", old], f"{old}: cannot be used: it has format 9, and this version of fastscore has 1"),
        (
            ["prune", rows, "--older-than", "1d"],
            f"{rows}: is not a cache of scores: file is not a database",
        ),
        (["prune", path], f"{path}: nothing says what to remove: give a model, an age or a size"),
        (["prune", path, "--model", "x"], f"{path}: holds nothing of model 'x'; its models: 'org/second', 'tiny'"),
        (["prune", path, "--older-than", "soon"], "--older-than: expected an age such as 12h, 30d or 8w; found 'soon'"),
        (["prune", path, "--keep-size", "-1"], "--keep-size: expected a size such as 500MB or 2GiB; found '-1'"),
        (["prune", path, "--keep-size", "3d"], "--keep-size: expected a size such as 500MB or 2GiB; found '3d'"),
    ]
    before = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}
    for arguments, message in cases:
        status, out, err = run(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), arguments
        assert err.startswith(f"fastscore: {message}"), err
    assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_sizes_and_ages() -> None:
    ages = {"90s": 90, "5 m": 300, "1.5h": 5400, "30D": 30 * DAY, "2w": 14 * DAY}
    assert {text: parse_age(text) for text in ages} == ages
    sizes = {"0": 0, "12": 12, "12b": 12, "500MB": 500_000_000, "1.5k": 1500, "2 GiB": 2 << 30, "1t": 10**12}
    assert {text: parse_size(text) for text in sizes} == sizes
    for bad in ("", "d", "1", "1y", "1e9d", "٣d", "1d2", "nan", "inf"):
        with pytest.raises(InputError):
            parse_age(bad)


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from fastscore.cli import main\n"
        "try: main(['cache', *sys.argv[1:]])\n"
        "except SystemExit as stopped: print('status', stopped.code)\n"
        "print('heavy', sorted({'torch', 'transformers', 'numpy', 'tokenizers'} & sys.modules.keys()))\n"
    )
    for arguments in (["--help"], ["prune", "--help"]):
        out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True).stdout
        assert "Usage: fastscore cache" in out
        assert "status 0\nheavy []" in out
