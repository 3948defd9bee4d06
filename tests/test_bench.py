"""The benchmarks' own parts: a figure is only as good as the peers, the counting and the records behind it."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_inputs import load, random_pairs
from tiny_models import TRAINING_TEXT, make_tiny_model
from transformers import AutoTokenizer
from truth import alone

from fastscore import Scorer
from fastscore.decoder.skeleton import Skeleton

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

import fidelity  # noqa: E402
import gpu_end_to_end  # noqa: E402
import readme_table  # noqa: E402
from compare import difference  # noqa: E402
from contenders import FastScore  # noqa: E402
from environment import environment, one_line, write_json  # noqa: E402
from padded import PairScore, pick_batch_size, score_padded, score_padded_tuned  # noqa: E402
from rounds import interleave, medians, table  # noqa: E402
from workload import TokenPair, read_workload, spread_sample  # noqa: E402


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("bench") / "llama", max_position_embeddings=4096)


def test_environment_names_versions_and_commit_but_no_host_or_path() -> None:
    values = environment()
    assert values["versions"]["torch"] == torch.__version__
    assert values["versions"]["python"] == platform.python_version()
    assert values["cores"] == os.cpu_count()
    assert isinstance(values["dirty"], bool)
    assert len(values["gpus"]) == torch.cuda.device_count()
    text = json.dumps(values)
    assert values["commit"][:10] in one_line(values)
    for private in (platform.node(), str(ROOT), str(Path.home()), sys.prefix):
        assert len(private) < 3 or private not in text


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_json(path, {"median": 1.5})
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, {"median": bad, "long": "x" * 100_000})
    assert json.loads(path.read_text("utf-8")) == {"median": 1.5}
    write_json(path, ["näive"])
    assert json.loads(path.read_text("utf-8")) == ["näive"]
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]


# gpt2 and opt have learned positions: left padding must not shift them.
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt"])
def test_peers_score_what_each_pair_scores_alone(family: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / family, family)
    model, pairs = load(folder), random_pairs(1)
    truth = alone(folder, pairs)
    ours = [score.token_logprobs for score in Scorer(str(folder), dtype="fp32", device="cpu").score_tokens(pairs)]
    for scores in (
        score_padded(model, pairs),
        score_padded_tuned(model, pairs, 3),
        score_padded_tuned(model, pairs, 32),
    ):
        for score, true, fast in zip(scores, truth, ours, strict=True):
            assert score.token_logprobs == pytest.approx(true, abs=1e-5)
            assert score.token_logprobs == pytest.approx(list(fast), abs=1e-5)
            assert score.mean_logprob == pytest.approx(sum(true) / len(true), abs=1e-5)


def test_batch_size_is_the_fastest_that_the_pairs_fill() -> None:
    durations = iter([3.0, 1.0, 2.0, 4.0, 5.0, 0.5])
    now = 0.0
    calls = 0

    def clock() -> float:
        nonlocal now, calls
        calls += 1
        if calls % 2 == 0:
            now += next(durations)
        return now

    asked: list[tuple[int, int]] = []
    pairs = random_pairs(2, count=8)
    best, seconds = pick_batch_size(
        lambda size, some: asked.append((size, len(some))), pairs, sizes=(2, 4, 8, 16), clock=clock
    )
    assert seconds == {2: 3.0, 4: 1.0, 8: 0.5}
    assert best == 8
    assert asked == [(2, 2), *[(size, 8) for size in (2, 4, 8, 2, 4, 8)]]


def test_one_model_serves_several_scorers_and_text(llama: Path) -> None:
    model, tokenizer = load(llama), AutoTokenizer.from_pretrained(llama)
    pairs = random_pairs(3)
    truth = alone(llama, pairs)
    for budget in (16, 64, None):
        scorer = Scorer.from_model(model, tokenizer, max_batch_tokens=budget)
        assert scorer.describe()["mode"] == "packed", scorer.describe()["mode_reason"]
        for score, true in zip(scorer.score_tokens(pairs), truth, strict=True):
            assert score.token_logprobs == pytest.approx(true, abs=1e-5)
    by_path = Scorer(str(llama), dtype="fp32", device="cpu")
    texts = [("Question: where does the river run", " the old town"), ("1990 people", " in 42 houses")]
    for score, same in zip(scorer.score(texts), by_path.score(texts), strict=True):
        assert score.token_logprobs == pytest.approx(same.token_logprobs, abs=1e-6)


def test_a_model_that_was_loaded_before_has_a_second_contender(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSCORE_CACHE", str(tmp_path))
    monkeypatch.setattr("fastscore.known_models.is_settled", lambda *_: True)
    pairs = random_pairs(5, count=6)
    for is_recalled in (False, True):
        ours = FastScore(Scorer(str(llama), dtype="fp32", device="cpu"))
        assert isinstance(ours.scorer.load().model, Skeleton) == is_recalled
        other = ours.without_tree()
        for contender in (ours, other):
            contender.score(pairs)
        assert difference(other.scores, ours.scores).max < 1e-5


def test_contenders_take_turns_and_the_table_lines_up() -> None:
    order: list[str] = []
    seconds = interleave({name: lambda name=name: order.append(name) for name in "ABC"}, rounds=3)
    assert "".join(order) == "ABCABCABC"
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3, "C": 3}
    assert medians({"A": [3.0, 1.0, 2.0]}) == {"A": 2.0}
    assert table(["", "n"], [["long name", "1"], ["x", "22"]]).splitlines() == [
        "            n",
        "---------  --",
        "long name   1",
        "x          22",
    ]


@pytest.mark.parametrize(
    ("left", "right", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 4 / 6),
        ([1, 1, 2, 3], [1, 2, 3, 4], 5 / 30**0.5),
        ([1, 1, 2, 2], [1, 1, 2, 2], 1.0),
        ([5, 5, 5], [1, 2, 3], 0.0),
        ([5, 5], [7, 7], 1.0),
        ([1], [2], 1.0),
    ],
)
def test_kendall_tau(left: list[float], right: list[float], tau: float) -> None:
    assert fidelity.kendall_tau(left, right) == pytest.approx(tau)
    assert fidelity.kendall_tau(right, left) == pytest.approx(tau)


def test_distance_of_known_scores() -> None:
    distance = fidelity.Distance()
    truth = [[-1.0, -3.0], [-2.5]]
    distance.add_query([fidelity.PairScore([-1.5, -3.0], -2.25), fidelity.PairScore([-2.0], -2.0)], truth)
    summary = distance.summary()
    assert summary["nats_per_answer_token"]["mean"] == pytest.approx(1 / 3)
    assert summary["nats_per_pair"]["max"] == pytest.approx(0.5)
    assert summary["kendall_tau"] == {"mean": -1.0, "min": -1.0}
    assert summary["best_candidate_changed"] == 1
    assert fidelity.spread(list(range(101)))["p99"] == pytest.approx(99)
    assert fidelity.excess([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == {"mean": 0.0, "standard_error": pytest.approx(3**-0.5)}


def test_fidelity_measures_and_saves_as_it_goes(llama: Path, tmp_path: Path) -> None:
    row = {"answers": ["the old town"], "pos": [TRAINING_TEXT[0]], "neg": TRAINING_TEXT}
    rows = [{"query": f"where does river {n} run", **row} for n in range(fidelity.BLOCK_QUERIES + 1)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    workload = read_workload(path, AutoTokenizer.from_pretrained(llama), 100)
    assert workload.describe()["pairs"] == 4 * len(rows)
    saved: list[dict[str, Any]] = []
    results = fidelity.measure(str(llama), workload, saved.append)
    assert [(part["queries_done"], part["complete"]) for part in saved] == [(4, False), (5, True)]
    mean = {name: value["nats_per_answer_token"]["mean"] for name, value in results["contenders"].items()}
    assert mean[fidelity.FAST_FP32] < 1e-5
    # The tiny model's bf16 is off by a percent or two of a nat, and rounding the logits makes it worse.
    assert 1e-4 < mean[fidelity.FAST_BF16] < 0.2
    assert 1e-4 < mean[fidelity.PADDED_UPCAST] < mean[fidelity.PADDED_BF16] < 0.2
    for name, value in results["contenders"].items():
        assert name in fidelity.show(results)
        # Each query has four candidates, so that the mean over queries is the mean over pairs.
        per_query = value["per_query"]["mean_nats_per_pair"]
        assert sum(per_query) / len(rows) == pytest.approx(value["nats_per_pair"]["mean"])
    some = fidelity.measure(str(llama), workload, contenders=[fidelity.FAST_FP32, fidelity.PADDED_UPCAST])
    assert some["contenders"].keys() == {fidelity.FAST_FP32, fidelity.PADDED_UPCAST}
    again = {name: value["nats_per_answer_token"]["mean"] for name, value in some["contenders"].items()}
    assert again == pytest.approx({name: mean[name] for name in again}, abs=1e-6)
    assert not some["bf16_packed_minus"]
    assert fidelity.show(some)


def test_spread_sample_covers_the_lengths() -> None:
    pairs: list[TokenPair] = [((0,) * n, (1,)) for n in range(1, 101)]
    random.Random(0).shuffle(pairs)
    assert sorted(len(prompt) for prompt, _ in spread_sample(pairs, 4)) == [1, 26, 51, 76]
    assert sorted(spread_sample(pairs, 1000)) == sorted(pairs)


def test_the_gpu_benchmark_runs_tiny(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    options = ["--tiny", "--json", str(out), "--rounds", "1", "--gemm-repeats", "2", "--device", "cpu"]
    assert gpu_end_to_end.main([*options, "--questions-per-passage", "4"]) == 0
    cells = json.loads(out.read_text("utf-8"))["cells"]
    assert len(cells) == len(gpu_end_to_end.SHAPES) * 3 * 2
    for cell in cells:
        assert cell["agrees"]
        chosen = cell["contenders"]["fastscore"]["settings"]
        assert chosen["mode"] == "packed", chosen["mode_reason"]
        # Four questions share a passage.
        assert cell["useful_work"]["unique_tokens"] < 0.8 * cell["pair_tokens"]
    assert not out.with_suffix(".kernel.json").exists()
    assert "tiny llama-3.1-8b 64+5" in capsys.readouterr().out.splitlines()[-1]

    # One cell that fails does not take the others, nor a peer that runs out of memory its cell.
    def fails_at_5(model: Any, pairs: Any, batch_size: int) -> Any:
        if len(pairs[0][1]) == 5:
            raise RuntimeError("device fault")
        raise torch.OutOfMemoryError("too large")

    def no_numbers(model: Any, pairs: Any, batch_size: int) -> list[PairScore]:
        return [PairScore([math.nan] * len(answer), math.nan) for _, answer in pairs]

    monkeypatch.setattr("contenders.score_padded", fails_at_5)
    assert gpu_end_to_end.main([*options, "--models", "qwen3-0.6b", "--passages", "16"]) == 1
    two, five = json.loads(out.read_text("utf-8"))["cells"]
    assert two["contenders"]["padded"]["failed"] == "out of memory"
    assert "median_seconds" in two["contenders"]["padded-tuned"]
    assert five["failed"] == "RuntimeError: device fault"
    printed = capsys.readouterr().out
    assert "FAILED: out of memory" in printed
    assert "failed: RuntimeError: device fault" in printed.splitlines()[-1]
    assert "fastscore: attention" in printed

    told = readme_table.gpu(out.rename(tmp_path / readme_table.GPU).parent)
    assert "failed: out of memory | 1." in told or "failed: out of memory | 0." in told
    assert "16 + 5 | failed: RuntimeError: device fault | | |" in told
    assert "fastscore runs with attention" in " ".join(told.split())

    monkeypatch.setattr("contenders.score_padded", no_numbers)
    assert gpu_end_to_end.main([*options, "--models", "qwen3-0.6b", "--passages", "16", "--answers", "2"]) == 1
    [cell] = json.loads(out.read_text("utf-8"))["cells"]
    assert (cell["agrees"], cell["disagreeing"]) == (False, ["padded"])

    assert gpu_end_to_end.main([*options, "--limit-seconds", "0"]) == 0
    assert {cell["skipped"] for cell in json.loads(out.read_text("utf-8"))["cells"]} == {"no time left"}


def test_the_gpu_benchmark_goes_on_with_the_kernel(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ["--tiny", "--device", "cpu", "--rounds", "1", "--models", "qwen3-0.6b", "--json", str(out)]
    cell = ["--passages", "16", "--answers", "2", "--limit-seconds", "60", "--kernel-seconds", "30"]
    assert gpu_end_to_end.main([*options, *cell]) == 0
    [end_to_end] = json.loads(out.read_text("utf-8"))["cells"]
    assert end_to_end["agrees"]
    kernel = json.loads(out.with_suffix(".kernel.json").read_text("utf-8"))["cells"]
    assert any(measured.get("agrees") for measured in kernel)


def test_shared_weights_are_shared() -> None:
    plain = gpu_end_to_end.build_model("llama-3.1-8b", torch.device("cpu"), torch.float32, tiny=True)
    other = gpu_end_to_end.with_shared_weights(plain)
    for (name, mine), (same, theirs) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        assert name == same
        assert mine.data_ptr() == theirs.data_ptr()
    other.set_attn_implementation("eager")
    assert plain.config._attn_implementation != "eager"
