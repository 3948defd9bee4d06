"""``--engine ray`` on a Ray that is started here: the scores of one process, whatever happens to the workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from many_processes import environment, make_rows, write_rows
from tiny_models import make_tiny_model

from fastscore import InputError, Scorer
from fastscore.cache_upkeep import cache_info
from fastscore.cli import main
from fastscore.config import ScorerConfig, TaskConfig
from fastscore.run_stats import RunStats
from fastscore.types import Row

ray_data = pytest.importorskip("fastscore.integrations.ray_data", exc_type=InputError)
ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

QA = TaskConfig("qa")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def open_scorer() -> Iterator[Any]:
    """One Ray for all tests, of two CPUs whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            with ray_data.ray_engine(2) as found:
                yield found
            assert ray.is_initialized(), "who connects to Ray leaves it"
        finally:
            ray.shutdown()


def config(model: Path, window_tokens: int = 300) -> ScorerConfig:
    return ScorerConfig(str(model), dtype="fp32", device="cpu", window_tokens=window_tokens, deterministic=True)


def rows(count: int) -> list[Row]:
    return [Row(data, "r.jsonl", line) for line, data in enumerate(make_rows(count), start=1)]


def score_with_one(model: Path, count: int) -> list[tuple[float, ...]]:
    return [scored.teacher_scores for scored in Scorer.from_config(config(model)).stream_rows(rows(count), QA)]


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_a_worker_that_is_killed_is_replaced_and_its_block_repeated(model: Path, open_scorer: Any) -> None:
    long = rows(600)
    for row in long:  # so that a worker is in the middle of a block, and not between two
        row.data["query"] = " ".join([row.data["query"]] * 12)
    one = config(model, window_tokens=100_000)
    expected = [scored.teacher_scores for scored in Scorer.from_config(one).stream_rows(long, QA)]
    scorer = open_scorer(one)
    killed = list[int]()

    def kill_one(stats: RunStats) -> None:
        """When both are at work, and have more to do."""
        if killed or len(scorer.describe()["pairs_by_worker"]) < 2:
            return
        workers = [
            process
            for process in psutil.Process().children(recursive=True)
            if "MapWorker" in " ".join(process.cmdline()[:1])
        ]
        assert len(workers) == 2
        killed.append(workers[0].pid)
        os.kill(workers[0].pid, signal.SIGKILL)
        workers[0].wait(20)

    found = [scored.teacher_scores for scored in scorer.stream_rows(long, QA, on_progress=kill_one)]
    assert killed
    assert found == expected
    about = scorer.describe()
    assert (about["engine"], about["workers"], len(about["pairs_by_worker"])) == ("ray", 2, 2)
    assert sum(about["pairs_by_worker"].values()) == sum(map(len, expected)) == scorer.stats.pairs
    assert about["repeated_blocks"] == 1


def test_files_through_the_program_and_a_restart_that_computes_nothing(
    model: Path, open_scorer: Any, tmp_path: Path
) -> None:
    data = make_rows(40)
    data[7] = {**data[7], "pos": ["town " * 400]}  # does not fit the model
    inputs = write_rows(tmp_path / "rows.jsonl", data)
    one = ["score", inputs, "--model", model, "--dtype", "fp32", "--window-tokens", "300", "--deterministic", "-q"]
    one += ["--on-error", "skip"]
    assert run(*one, "--no-cache", "-o", tmp_path / "one.jsonl") == 0
    for cached in (False, True):
        assert run(*one, "-o", tmp_path / "two.jsonl", "--engine", "ray", "--num-workers", "2") == 0
        assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
        meta = json.loads((tmp_path / "two.jsonl.meta.json").read_text())
        assert meta["scorer"]["engine"] == "ray"
        assert meta["cache"] == str(tmp_path / "two.jsonl.cache.sqlite")
        assert (meta["rows"], meta["skipped"]) == (39, 1)
        assert meta["stats"]["cached"] == (meta["stats"]["pairs"] if cached else 0)
    one_bad, two_bad = ((tmp_path / f"{name}.jsonl.errors.jsonl").read_text() for name in ("one", "two"))
    assert one_bad == two_bad


def test_a_program_on_a_cluster_is_killed_and_goes_on(model: Path, open_scorer: Any, tmp_path: Path) -> None:
    """The cluster is the one above, found by its address as a real one is."""
    data, output = make_rows(1200), tmp_path / "out.jsonl"
    inputs = write_rows(tmp_path / "rows.jsonl", data)
    cache, meta = (output.with_name(f"out.jsonl.{end}") for end in ("cache.sqlite", "meta.json"))
    command = [sys.executable, "-m", "fastscore", "score", str(inputs), "-o", str(output), "--model", str(model), "-q"]
    command += ["--dtype", "fp32", "--window-tokens", "4000", "--deterministic"]
    command += ["--engine", "ray", "--num-workers", "1"]
    somewhere = environment(RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    with subprocess.Popen(command, env=somewhere, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as killed:
        try:
            waited_until = time.monotonic() + 90
            while kept_in(cache) < 200:
                assert killed.poll() is None, killed.communicate()[1]
                assert time.monotonic() < waited_until
                time.sleep(0.1)
        finally:
            killed.kill()
    assert not output.exists()
    done = subprocess.run(command, env=somewhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    stats = json.loads(meta.read_text())["stats"]
    assert 200 <= stats["cached"] < stats["pairs"]
    scores = [tuple(json.loads(line)["teacher_scores"]) for line in output.read_text().splitlines()]
    assert scores == score_with_one(model, 1200)


def kept_in(cache: Path) -> int:
    """Scores in a cache that others write, and may be making just now."""
    try:
        return cache_info(cache).entries
    except InputError:
        return 0


def test_errors_of_workers_and_of_rows_are_told_as_by_one(model: Path, open_scorer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        list(open_scorer(config(tmp_path / "nowhere")).stream_rows(rows(3), QA))

    def breaks() -> Iterator[Row]:
        yield from rows(3)
        raise InputError("it broke", path="r.jsonl", line=4)

    with pytest.raises(InputError, match=r"r\.jsonl:4: it broke"):
        list(open_scorer(config(model)).stream_rows(breaks(), QA))


@pytest.mark.parametrize(
    ("asked", "nodes", "pool"),
    [
        ((None, None), [{"CPU": 8.0}, {"CPU": 8.0}], (2, 0.0, 8.0)),
        ((3, None), [{"CPU": 8.0}], (3, 0.0, 2.0)),
        ((3, None), [{"CPU": 8.0}, {"CPU": 2.0}], (3, 0.0, 2.0)),
        ((4, None), [{"CPU": 2.0}], (4, 0.0, 0.5)),
        ((None, None), [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0}], (4, 1.0, 1.0)),
        ((None, 2.0), [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 3.0}], (3, 2.0, 1.0)),
        ((None, 0.5), [{"CPU": 1.0, "GPU": 1.0}], (2, 0.5, 0.5)),
        ((2, 0.0), [{"CPU": 4.0, "GPU": 1.0}], (2, 0.0, 2.0)),
    ],
)
def test_a_pool_has_room(asked: tuple[Any, Any], nodes: list[dict[str, float]], pool: tuple[Any, ...]) -> None:
    assert ray_data.choose_pool(*asked, nodes) == ray_data.Pool(*pool)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ((0, None), "num_workers must be at least 1"),
        ((None, -1.0), "gpus_per_worker must not be negative"),
        ((3, None), "3 workers with 1 GPUs each: the 2 GPUs of the cluster allow 2"),
        ((None, 4.0), "1 workers with 4 GPUs each: the 2 GPUs of the cluster allow 0"),
    ],
)
def test_a_pool_that_has_none(asked: tuple[Any, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        ray_data.choose_pool(*asked, [{"CPU": 4.0, "GPU": 2.0}])


def test_no_cluster_at_that_address(model: Path, tmp_path: Path) -> None:
    inputs = write_rows(tmp_path / "rows.jsonl", make_rows(2))
    command = [sys.executable, "-m", "fastscore", "score", str(inputs), "-m", str(model), "--engine", "ray", "-q"]
    place = environment(RAY_ADDRESS="127.0.0.1:1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=place)
    assert done.returncode == 2, done.stderr
    assert "fastscore: no Ray cluster at 127.0.0.1:1 (RAY_ADDRESS)" in done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"rows.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--engine", "spark"], "engine must be one of local, ray; found 'spark'"),
        (["--num-workers", "2"], "--num-workers and --gpus-per-worker belong to --engine ray"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("score", write_rows(tmp_path / "rows.jsonl", make_rows(2)), *arguments) == 2
    assert complaint in capsys.readouterr().err
