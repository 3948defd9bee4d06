"""One model held by two processes (gloo, on the CPU): unpadded transformers' scores, half the weights in each, and one
voice whatever goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from many_processes import ended, environment, make_rows, ranks, read_scores, run_ranks, wait_for_work, write_rows
from tiny_models import make_tiny_model

from fastscore import InputError, Scorer
from fastscore.cli import main

ROWS = make_rows(12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def options(model: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--dtype", "fp32", "--tensor-parallel", *more]


def truth(model: Path, rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """By one process, every pair by itself, in the model's own layers."""
    scorer = Scorer(str(model), dtype="fp32", forward="model", share_prefixes=False, max_batch_tokens=1)
    return [row["teacher_scores"] for row in scorer.score_rows(rows)]


def assert_close(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, abs=1e-5)


# For each model in turn rank 0 scores, and the other does as it does.
FAMILIES_PROGRAM = """
import json, sys
import fastscore.ready_model
from fastscore import Scorer
from fastscore.config import ScorerConfig
from fastscore.rank_messages import meet
from fastscore.shards import own_part
from fastscore.shared_model import SharedScorer, end_following, follow_model
rank, rows = meet(True), json.load(open(sys.argv[1]))
fastscore.ready_model.default_budget = lambda *_: 100 + 128 * rank  # as devices of which one has more room
for path in sys.argv[2:]:
    config = ScorerConfig(path, dtype="fp32", tensor_parallel=True)
    found = {"model": path}
    if rank:
        scorer = Scorer.from_config(config)
        follow_model(scorer.load)
    else:
        scorer = SharedScorer.on_rank_0(config, lambda **_: None)
        found["scores"] = [row["teacher_scores"] for row in scorer.score_rows(rows)]
        found["forward"], found["mode"] = scorer.load().forward_name, scorer.load().mode
        assert end_following()
    found["budget"] = scorer.load().max_batch_tokens
    found["bytes"] = sum(own_part(weight).nbytes for weight in scorer.load().model.parameters())
    with open(f"{path}.{rank}.json", "w") as out:
        json.dump(found, out)
"""
OWN = "fastscore's, residual stream in float32"
SPLIT: list[tuple[str, str, dict[str, Any], str]] = [
    ("llama", "llama", {}, OWN),
    ("biases", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, OWN),
    ("odd", "llama", {"vocab_size": 513, "intermediate_size": 97}, OWN),
    ("qwen3", "qwen3", {}, OWN),
    ("gemma2", "gemma2", {}, OWN),
    ("granite", "granite", {}, OWN),
    ("phi3", "phi3", {}, "the model's own layers: its layers are not split by heads"),
    ("mixtral", "mixtral", {}, "the model's own layers: MixtralDecoderLayer"),
]


@pytest.mark.slow
def test_families_split_over_two_processes_against_unpadded_ones_in_one(tmp_path: Path) -> None:
    models = [make_tiny_model(tmp_path / name, family, **overrides) for name, family, overrides, _ in SPLIT]
    program, rows = tmp_path / "program.py", tmp_path / "rows.json"
    program.write_text(FAMILIES_PROGRAM)
    rows.write_text(json.dumps(ROWS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += map(str, [program, rows, *models])
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert done.returncode == 0, done.stderr
    for model, (_, _, _, layers) in zip(models, SPLIT, strict=True):
        first, second = (json.loads(Path(f"{model}.{rank}.json").read_text()) for rank in (0, 1))
        assert_close(first["scores"], truth(model, ROWS))
        assert first["mode"] == "packed"
        assert first["budget"] == second["budget"] == 100
        assert first["forward"].startswith(layers), first["forward"]
        whole = sum(weight.nbytes for weight in Scorer(str(model), dtype="fp32").load().model.parameters())
        assert max(first["bytes"], second["bytes"]) < 0.53 * whole, "norms are in both, everything else in one"


@pytest.mark.slow
def test_three_give_deterministic_scores_in_any_order_and_a_cache_knows_them(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
    model = make_tiny_model(tmp_path / "three", "llama", **heads)
    rows, output = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl"
    turned = write_rows(tmp_path / "turned.jsonl", ROWS[::-1])
    arguments = options(model, "--deterministic")
    found = run_ranks(3, "score", rows, *arguments, "-o", output)
    assert [status for status, _ in found] == [0, 0, 0], found
    assert [said for _, said in found[1:]] == ["", ""]
    assert_close(read_scores(output), truth(model, ROWS))
    meta = json.loads(output.with_name("out.jsonl.meta.json").read_text())
    told = meta["scorer"]
    assert (told["engine"], told["tensor_parallel"], told["workers"]) == ("torchrun", 3, 1)
    found = run_ranks(3, "score", turned, *arguments, "--window-tokens", "300", "-o", tmp_path / "turned.out.jsonl")
    assert [status for status, _ in found] == [0, 0, 0], found
    assert read_scores(output) == read_scores(tmp_path / "turned.out.jsonl")[::-1]
    before = output.read_bytes()
    found = run_ranks(3, "score", rows, *arguments, "-o", output)
    assert {status for status, _ in found} == {0}, found
    stats = json.loads(output.with_name("out.jsonl.meta.json").read_text())["stats"]
    assert stats["cached"] == meta["stats"]["pairs"]
    assert output.read_bytes() == before
    alone = [word for word in arguments if word != "--tensor-parallel"]
    with pytest.raises(SystemExit) as ended:
        main(["score", str(rows), *alone, "-o", str(output)])
    assert ended.value.code == 0
    stats = json.loads(output.with_name("out.jsonl.meta.json").read_text())["stats"]
    assert stats["cached"] == 0, "sums over three have other bits than those of one"


@pytest.mark.parametrize(
    ("family", "overrides", "said"),
    [
        ("llama", {"num_key_value_heads": 1}, "num_key_value_heads is 1, which 2 processes cannot share evenly"),
        ("gpt2", {}, "transformers has no plan for splitting gpt2 models"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused_once(
    family: str, overrides: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / family, family, **overrides)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    found = run_ranks(2, "score", rows, *options(model), "-o", tmp_path / "out.jsonl")
    assert [status for status, _ in found] == [2, 2], found
    assert said in found[0][1]
    assert "Traceback" not in found[0][1]
    assert found[1][1] == ""
    assert not (tmp_path / "out.jsonl").exists()


def test_options_that_do_not_go_together(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    arguments = ["score", str(rows), *options(model)]
    done = subprocess.run([sys.executable, "-m", "fastscore", *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "torchrun --nproc_per_node" in done.stderr) == (2, True)
    for more, said in ((["--device-map", "auto"], "device_map"), (["--quantize", "int8"], "quantize")):
        found = run_ranks(2, *arguments, *more)
        assert [status for status, _ in found] == [2, 2]
        assert f"tensor_parallel and {said} exclude each other" in found[0][1]
    with pytest.raises(InputError, match="belongs to several processes"):
        Scorer(str(model), tensor_parallel=True).load()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
def test_a_rank_that_is_killed_ends_the_run_and_the_next_goes_on(killed: int, model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(3000))
    output = tmp_path / "out.jsonl"
    arguments = ["score", rows, *options(model, "--window-tokens", "20000"), "-o", output]
    with ranks(2, *arguments) as processes:
        wait_for_work(processes, output.with_name("out.jsonl.cache.sqlite"), 1.5)
        os.kill(processes[killed].pid, signal.SIGKILL)
        since = time.monotonic()
        found = ended(processes)
        assert time.monotonic() - since < 30
    status, said = found[1 - killed]
    assert status == 1, said
    assert f"rank {killed} is gone before the run has ended" in said.strip().splitlines()[-1]
    assert "Traceback" not in said
    assert not output.exists()
    if killed:
        assert_goes_on(arguments, output)


@pytest.mark.slow
def test_sigterm_to_both_keeps_what_was_scored(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(3000))
    output = tmp_path / "out.jsonl"
    arguments = ["score", rows, *options(model, "--window-tokens", "20000"), "-o", output]
    with ranks(2, *arguments) as processes:
        wait_for_work(processes, output.with_name("out.jsonl.cache.sqlite"), 2.0)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        found = ended(processes)
    assert [status for status, _ in found] == [143, 143], found
    assert found[1][1] == ""
    assert not output.exists()
    assert_goes_on(arguments, output)


def assert_goes_on(arguments: Sequence[str | Path], output: Path) -> None:
    """The same command again computes what is missing."""
    again = run_ranks(2, *arguments)
    assert [status for status, _ in again] == [0, 0], again
    stats = json.loads(output.with_name(f"{output.name}.meta.json").read_text())["stats"]
    assert 0 < stats["cached"] < stats["pairs"] == sum(map(len, read_scores(output)))
