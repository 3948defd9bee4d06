"""Runs in the processes that torchrun starts (gloo, on the CPU): the scores of one process, and one voice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from many_processes import ended, environment, make_rows, ranks, read_scores, run_ranks, wait_for_work, write_rows
from tiny_models import make_tiny_model

from fastscore import InputError
from fastscore.cli import main
from fastscore.config import ScorerConfig
from fastscore.rank_follower import open_on_device

ROWS = make_rows(60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def alone(*arguments: str | Path) -> None:
    """The program in this process, with the one thread that the others have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)
    assert stopped.value.code == 0


def options(model: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--dtype", "fp32", "--window-tokens", "300", *more]


def folder(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


@pytest.mark.slow
def test_torchrun_writes_the_very_same_file(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    arguments = ["score", rows, *options(model, "--deterministic", "--no-cache")]
    alone(*arguments, "-o", tmp_path / "one.jsonl")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "fastscore", *map(str, arguments), "-o", str(tmp_path / "two.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert done.stderr.count("positive is best") == done.stderr.count("fp32, packed") == 1
    meta: dict[str, Any] = json.loads((tmp_path / "two.jsonl.meta.json").read_text())
    before: dict[str, Any] = json.loads((tmp_path / "one.jsonl.meta.json").read_text())
    scorer = meta["scorer"]
    assert (scorer["engine"], scorer["workers"]) == ("torchrun", 2)
    assert sum(scorer["pairs_by_worker"].values()) == meta["stats"]["pairs"] == before["stats"]["pairs"]
    assert meta["stats"]["tokens_unpadded"] == before["stats"]["tokens_unpadded"]
    assert all(scorer["pairs_by_worker"].get(rank, 0) > 0 for rank in ("0", "1")), "both ranks scored"
    assert max(scorer["seconds_by_worker"].values()) == pytest.approx(meta["stats"]["seconds"], abs=1e-3)
    assert 0 < scorer["busy"] < 1


@pytest.mark.slow
def test_the_old_command_line_within_rounding_and_again_from_the_cache(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ["--eval_data", rows, "--model_name_or_path", model, "--lm_dtype", "fp32", "--save_name"]
    alone(*flags, "one", "--no_cache")
    for _ in range(2):
        found = run_ranks(2, *flags, "two", module="fastscore.run_lm_score")
        assert [status for status, _ in found] == [0, 0], found
        assert found[1][1] == ""
        expected = read_scores(tmp_path / "rows.scored.one.jsonl")
        scores = read_scores(tmp_path / "rows.scored.two.jsonl")
        assert [len(row) for row in scores] == [len(row) for row in expected]
        for mine, other in zip(scores, expected, strict=True):
            assert mine == pytest.approx(other, abs=1e-4)
    meta = json.loads((tmp_path / "rows.scored.two.jsonl.meta.json").read_text())
    assert meta["stats"]["cached"] == meta["stats"]["pairs"] == sum(map(len, expected))
    assert meta["stats"]["tokens_computed"] == 0


@pytest.mark.parametrize("arguments", [["--eval_data", "rows.jsonl"], ["score", "--nothing"]])
def test_bad_input_is_told_once_and_all_end_with_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", [*ROWS[:3], {**ROWS[3], "answers": []}])
    monkeypatch.chdir(tmp_path)
    (first, said), (second, nothing) = run_ranks(2, *arguments)
    assert (first, second, nothing) == (2, 2, "")
    if "--nothing" not in arguments:
        assert said.splitlines() == [said.strip()]
        assert "rows.jsonl:4: field 'answers'" in said
    assert folder(tmp_path) == {"rows.jsonl"}


@pytest.mark.slow
def test_more_ranks_than_rows_and_bad_rows_are_left_out_as_by_one(model: Path, tmp_path: Path) -> None:
    long = {**ROWS[0], "pos": ["town " * 400]}  # does not fit the model: found out where it is tokenised
    rows = write_rows(tmp_path / "rows.jsonl", [ROWS[0], {**ROWS[1], "answers": []}, "no row\n", long, ROWS[2]])
    arguments = ["score", rows, *options(model, "--deterministic", "--on-error", "skip", "--no-cache")]
    alone(*arguments, "-o", tmp_path / "one.jsonl")
    found = run_ranks(3, *arguments, "-o", tmp_path / "two.jsonl")
    assert [status for status, _ in found] == [0, 0, 0], found
    assert [said for _, said in found[1:]] == ["", ""]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    one, two = ((tmp_path / f"{name}.jsonl.errors.jsonl").read_text().splitlines() for name in ("one", "two"))
    assert sorted(two) == sorted(one)
    assert len(two) == 3


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
def test_a_rank_that_is_killed_ends_the_run(killed: int, model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(3000))
    arguments = ["score", rows, *options(model, "--deterministic"), "-o", tmp_path / "out.jsonl"]
    with ranks(2, *arguments) as processes:
        cache = tmp_path / "out.jsonl.cache.sqlite"
        wait_for_work(processes, cache, 1.0)
        os.kill(processes[killed].pid, signal.SIGKILL)
        since = time.monotonic()
        found = ended(processes)
        assert time.monotonic() - since < 30
    status, said = found[1 - killed]
    assert found[killed] == (-signal.SIGKILL, found[killed][1])
    assert status == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("fastscore: failed: ")
    assert f"rank {killed} is gone before the run has ended" in last
    assert "Traceback" not in said
    left = {name for name in folder(tmp_path) if not name.startswith(("out.jsonl.cache", ".fastscore-"))}
    assert left == {"rows.jsonl"}


@pytest.mark.slow
def test_an_interrupt_of_all_ranks_keeps_what_was_scored(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(3000))
    arguments = ["score", rows, *options(model), "-o", tmp_path / "out.jsonl"]
    cache = tmp_path / "out.jsonl.cache.sqlite"
    with ranks(2, *arguments) as processes:
        wait_for_work(processes, cache, 2.0)
        for process in processes:
            process.send_signal(signal.SIGINT)
        found = ended(processes)
    assert [status for status, _ in found] == [130, 130], found
    assert "same command" in found[0][1]
    assert found[1][1] == ""
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "info", str(cache), "--json"])
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["entries"] > 0


@pytest.mark.parametrize(
    ("asked", "place"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu"), ("cuda:0", "cuda:0")]
)
def test_each_rank_has_its_own_gpu(asked: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("fastscore.Scorer.from_config", lambda config: config)
    assert open_on_device(ScorerConfig(device=asked)).device == place
    assert chosen == ([1] if place == "cuda:1" else [])


def test_a_rank_without_a_gpu_and_one_that_would_take_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="3 processes on this machine, but 2 GPUs"):
        open_on_device(ScorerConfig())
    with pytest.raises(InputError, match="--device-map"):
        open_on_device(ScorerConfig(device_map="auto"))
