"""The one way in which the benchmarks compare contenders: agreement, turns, ratios, the limit; and its peers."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from bench_inputs import load, random_pairs
from safetensors import safe_open
from tiny_models import make_tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer
from truth import alone

from fastscore import Scorer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

import end_to_end  # noqa: E402
from compare import Difference, compare, comparison_table, difference  # noqa: E402
from contenders import OURS, PADDED, TUNED, Contender, FastScore, Padded, PaddedTuned, Unavailable  # noqa: E402
from limits import PACKED_GEMM, layer_gemms, useful_work  # noqa: E402
from peer_lm_eval import LM_EVAL, LMEval  # noqa: E402
from peer_vllm import VLLM, Vllm, VllmPrefill, VllmWorker, worker_environment  # noqa: E402
from rounds import Timed, interleave, medians  # noqa: E402
from workload import TokenPair, Workload  # noqa: E402

KEYS_AND_VALUES = ("k_proj", "v_proj")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("bench") / "llama", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def scorer(llama: Path) -> Scorer:
    return Scorer.from_model(load(llama), AutoTokenizer.from_pretrained(llama), max_batch_tokens=128)


@pytest.mark.parametrize("seed", range(5))
def test_useful_work_is_what_its_definition_says(seed: int, llama: Path) -> None:
    """2 x parameters touched x unique tokens + LM head on answer rows + attention: counted from file, config, sets."""
    pairs = random_pairs(seed, count=40, alphabet=2)
    work = useful_work(load(llama), pairs)
    histories = {ids[:end] for p, a in pairs for ids in [(*p, *a[:-1])] for end in range(1, len(ids) + 1)}
    assert work.unique_tokens == len(histories) < sum(len(p) + len(a) - 1 for p, a in pairs)

    with safe_open(llama / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    touched = [shape for name, shape in shapes.items() if ".layers." in name and len(shape) == 2]
    parameters = sum(rows * columns for rows, columns in touched)
    config = json.loads((llama / "config.json").read_text("utf-8"))
    hidden_size, heads, head_size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    answer_tokens = sum(len(answer) for _, answer in pairs)
    head = 2 * config["vocab_size"] * hidden_size * answer_tokens
    # A token's query meets the keys of its history, and its weights their values.
    per_layer = sum(2 * 2 * heads * head_size * len(history) for history in histories)
    attention = config["num_hidden_layers"] * per_layer
    assert work.flops == 2 * parameters * len(histories) + head + attention

    # In the last layer only the tokens before answer tokens need more than their keys and values.
    read = [(len(p) + place) for p, a in pairs for place in range(len(a))]
    last = {name: shape for name, shape in shapes.items() if ".layers.1." in name and len(shape) == 2}
    others = sum(rows * columns for name, (rows, columns) in last.items() if name.split(".")[-2] not in KEYS_AND_VALUES)
    least = 2 * others * len(read) + sum(4 * heads * head_size * keys for keys in read)
    spared = 2 * others * len(histories) + per_layer - least
    assert work.skippable_flops == spared > 0


def test_useful_work_agrees_with_torchs_own_counter(llama: Path) -> None:
    model = load(llama)
    prompt, answer = tuple(range(3, 40)), (7,)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.tensor([prompt]), use_cache=False, logits_to_keep=1)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    work = useful_work(model, [(prompt, answer)])
    assert work.linear_flops + work.head_flops == products
    assert 0 < work.skippable_flops < work.flops / 2


def test_useful_work_refuses_what_it_cannot_count(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is no decoder whose layers are made of nn\.Linear"):
        useful_work(load(make_tiny_model(tmp_path / "gpt2", "gpt2")), random_pairs(0))


def test_the_limits_products_are_the_models_own(llama: Path) -> None:
    model = load(llama)
    gemms = layer_gemms(model, rows=8, repeats=3)
    layers, wanted = 2, 3
    per_layer = useful_work(model, [((1,), (2,))]).linear_flops // layers
    assert gemms.flops == wanted * 8 * per_layer
    for name, run in gemms.runs.items():
        with FlopCounterMode(display=False) as counter:
            run()
        if name != PACKED_GEMM:  # oneDNN's own operator, unknown to the counter
            assert counter.get_total_flops() == gemms.flops


def test_comparison_reports_ratios_and_agreement(llama: Path, scorer: Scorer) -> None:
    plain, pairs = load(llama), random_pairs(4, count=9)
    contenders = [FastScore(scorer), Padded(plain), PaddedTuned(plain, 3, {})]
    result = compare(contenders, pairs, 2, plain)
    assert result.disagreeing == []
    report = result.report()
    json.dumps(report, allow_nan=False)
    assert report["pair_tokens"] == sum(len(p) + len(a) for p, a in pairs)
    median = medians(result.seconds)
    rate = result.gemm_flops / min(medians(result.gemm_seconds).values())
    for name, values in report["contenders"].items():
        assert len(values["seconds"]) == 2
        assert values["times_fastscore"] == pytest.approx(median[name] / median[OURS])
        by_round = [a / b for a, b in zip(values["seconds"], result.seconds[OURS], strict=True)]
        assert values["times_fastscore_by_round"] == by_round
        assert values["useful_flop_efficiency"] == pytest.approx(result.work.flops / (median[name] * rate))
        assert values["efficiency_without_skippable"] < values["useful_flop_efficiency"]
    assert len(comparison_table(report).splitlines()) == 2 + 3 + 1


def test_one_that_disagrees_is_not_timed(llama: Path, scorer: Scorer) -> None:
    wrong, pairs = load(llama), random_pairs(4, count=9)
    with torch.no_grad():
        wrong.base_model.layers[1].mlp.down_proj.weight[0] += 0.5
    contenders = [FastScore(scorer), Padded(wrong), PaddedTuned(load(llama), 3, {})]
    result = compare(contenders, pairs, 1, wrong)
    assert result.disagreeing == [PADDED]
    assert set(result.seconds) == {OURS, TUNED}
    values = result.report()["contenders"][PADDED]
    assert "median_seconds" not in values
    assert values["difference_from_fastscore"]["max"] > 0.01
    assert "DISAGREES" in comparison_table(result.report())


class Fickle(Contender):
    """Right when it is looked at, wrong when it is timed."""

    name = "fickle"

    def __init__(self, right: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.right, self.runs = right, 0

    def score(self, pairs: Sequence[TokenPair]) -> None:
        self.runs += 1
        self.scores = [[value - (self.runs > 1) for value in values] for values in self.right]


def test_scores_are_looked_at_again_after_the_last_round(llama: Path, scorer: Scorer) -> None:
    plain, pairs = load(llama), random_pairs(5, count=9)
    result = compare([FastScore(scorer), Fickle(alone(llama, pairs))], pairs, 1, plain)
    assert result.disagreeing == ["fickle"]


def test_differences_of_tokens_and_of_sums() -> None:
    ours = [[-1.0, -2.0], [-3.0]]
    assert difference([[-1.5, -2.0], [-3.25]], ours) == Difference(0.25, 0.5, 3)
    assert difference([[-3.5], [-3.25]], ours, sums_only=True) == Difference(0.25, 0.25, 2, per_token=False)
    assert Difference(0.01, 0.4, 900).agrees("bf16")
    assert not Difference(0.01, 0.6, 900).agrees("bf16")
    assert Difference(0.01, 0.6, 5000).agrees("bf16")
    assert not Difference(0.11, 0.3, 5000).agrees("bf16")
    assert not Difference(0.01, 0.01, 5000).agrees("fp32")


def test_a_process_of_its_own_brings_its_own_seconds() -> None:
    seconds = interleave({"other process": lambda: Timed(12.5), "here": lambda: time.sleep(0.01)}, 1)
    assert seconds["other process"] == [12.5]
    assert 0.01 <= seconds["here"][0] < 1


def test_lm_eval_gives_the_sums_of_the_truth(llama: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pairs = random_pairs(6, count=13)
    pairs.append((pairs[0][0], (*pairs[0][1][:-1], 5)))  # differs in its last token only: lm-eval computes it once
    peer = LMEval.picked(load(llama), AutoTokenizer.from_pretrained(llama), pairs)
    peer.score(pairs)
    truth = alone(llama, pairs)
    for [total], true in zip(peer.scores, truth, strict=True):
        assert total == pytest.approx(sum(true), abs=1e-4)
    assert peer.settings()["batch_size"] in (4, 8)
    peer.batch_size = 100
    longest = max(len(prompt) + len(answer) - 1 for prompt, answer in pairs)
    inputs = {(*prompt, *answer[:-1]) for prompt, answer in pairs}
    assert len(inputs) < len(pairs)
    assert peer.computed(pairs).tokens == longest * len(inputs)
    assert difference(peer.scores, truth, sums_only=True).max < 1e-5


def test_a_peer_that_is_absent_is_left_out_with_a_reason(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FASTSCORE_VLLM_PYTHON", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.setattr(end_to_end, "qa_queries", lambda _: small_workload())
    out = tmp_path / "end_to_end.json"
    options = ["--model", str(llama), "--dtype", "fp32", "--rounds", "1", "--json", str(out)]
    assert end_to_end.main(options) == 0
    printed = capsys.readouterr()
    assert "vllm is left out: no environment named: --vllm-python or FASTSCORE_VLLM_PYTHON" in printed.err
    written = json.loads(out.read_text("utf-8"))
    assert set(written["left_out"]) == {LM_EVAL, VLLM}
    assert written["left_out"][LM_EVAL].startswith("not installed: pip install 'fastscore[lm-eval]'")
    assert set(written["contenders"]) == {OURS, PADDED, TUNED}
    assert written["disagreeing"] == []
    assert str(llama) not in json.dumps(written["contenders"][OURS]["settings"].get("model_path", ""))
    assert "of the GEMM rate" in printed.out
    # One that was asked for by name is missed.
    assert end_to_end.main([*options, "--peers", VLLM]) == 2


def small_workload() -> Workload:
    return Workload("rows", tuple((pair,) for pair in random_pairs(7, count=9)))


def test_vllm_has_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    (tmp_path / "lib").mkdir()
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.touch()
    values = worker_environment(tmp_path / "bin" / "python")
    assert values["LD_PRELOAD"].split(":")[-1] == str(openmp)
    assert "PYTHONPATH" not in values
    assert "OMP_NUM_THREADS" not in values
    assert len(values["VLLM_CPU_OMP_THREADS_BIND"].split(",")) <= torch.get_num_threads()

    with pytest.raises(Unavailable, match="cannot be run: No such file"):
        VllmWorker(str(tmp_path / "python"), "folder", torch.float32)
    # This environment's interpreter has no vLLM: the worker says so and ends.
    with pytest.raises(Unavailable, match="No module named 'vllm'"):
        VllmWorker(sys.executable, "folder", torch.float32)


FAKE_VLLM = """
import random, sys, types
class SamplingParams:
    def __init__(self, **options): self.options = options
class LLM:
    def __init__(self, **options):
        assert options["enforce_eager"]
        print("chatter that is no protocol")
    def reset_prefix_cache(self): return True
    def generate(self, prompts, sampling, use_tqdm):
        assert sampling.options["max_tokens"] == 1
        outputs = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            flat = types.SimpleNamespace(token_ids=ids[1:], logprobs=[-float(token) for token in ids[1:]])
            given = flat if "prompt_logprobs" in sampling.options else None
            outputs.append(types.SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=given))
        return outputs
__version__ = "0"
"""


@pytest.fixture
def fake_vllm(tmp_path: Path) -> str:
    """An interpreter with a module called vllm that gives token ids for log-probabilities: the pipes are real."""
    (tmp_path / "vllm.py").write_text(FAKE_VLLM, "utf-8")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n', "utf-8")
    python.chmod(0o755)
    return str(python)


def test_the_pipes_to_vllm_carry_answers_and_seconds(fake_vllm: str) -> None:
    pytest.importorskip("psutil")
    pairs = random_pairs(8)
    worker = VllmWorker(fake_vllm, "folder", torch.bfloat16)
    try:
        peer, prefill = Vllm(worker), VllmPrefill(worker)
        taken = peer.score(pairs)
        assert peer.scores == [[-float(token) for token in answer] for _, answer in pairs]
        assert 0 < taken.seconds < 1
        assert prefill.score(pairs).seconds > 0
        assert prefill.scores == []
        assert prefill.scores_nothing
        assert peer.settings()["versions"]["vllm"] == "0"
        with pytest.raises(RuntimeError, match="vLLM's process ended: KeyError: 'nonsense'"):
            worker.ask("nonsense", pairs)
    finally:
        worker.close()


@pytest.mark.slow
@pytest.mark.skipif("FASTSCORE_VLLM_PYTHON" not in os.environ, reason="FASTSCORE_VLLM_PYTHON names no environment")
def test_vllm_itself_agrees_with_the_truth() -> None:
    from fastscore.model_source import resolve_model

    folder = resolve_model("smollm2-135m").path
    pairs = [(tuple(range(1000, 1040)), (260, 1234, 28)), (tuple(range(1000, 1040)), (30,)), ((17, 42), (253, 198))]
    worker = VllmWorker(None, folder, torch.float32)
    try:
        peer, prefill = Vllm(worker), VllmPrefill(worker)
        peer.score(pairs)
        assert prefill.score(pairs).seconds > 0
        time.sleep(3)
        peer.score(pairs)
        idle = worker.idle_cpu_seconds[-1]
    finally:
        worker.close()
    for scores, true in zip(peer.scores, alone(folder, pairs), strict=True):
        assert scores == pytest.approx(true, abs=2e-3)
    assert idle < 0.5  # of three seconds and two processes: nothing spins


def test_make_bench_records_the_rounds_that_were_measured(llama: Path, tmp_path: Path) -> None:
    record = tmp_path / "benchmark.json"
    options = ["-s", "-p", "no:cacheprovider", f"--benchmark-json={record}", "bench/test_end_to_end.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=ROOT,
        env={
            # A worker of pytest-xdist is no place to measure in, and pytest-benchmark would refuse.
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "FASTSCORE_BENCH_MODEL": str(llama),
            "FASTSCORE_BENCH_QUERIES": "1",
            "FASTSCORE_BENCH_ROUNDS": "2",
            "FASTSCORE_BENCH_DTYPE": "fp32",
            "FASTSCORE_BENCH_PEERS": f"{PADDED},{TUNED}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "x fastscore" in run.stdout
    written = json.loads(record.read_text("utf-8"))
    assert platform.node() not in json.dumps(written["machine_info"])
    records = {entry["param"]: entry for entry in written["benchmarks"]}
    assert set(records) == {OURS, PADDED, TUNED}
    for entry in records.values():
        assert len(entry["stats"]["data"]) == 2
        assert entry["stats"]["median"] == pytest.approx(entry["extra_info"]["median_seconds"])
        # Real seconds: a forward pass takes more than a tenth of a millisecond.
        assert entry["stats"]["min"] > 1e-4
    median = {name: entry["stats"]["median"] for name, entry in records.items()}
    ratios = records[OURS]["extra_info"]["ratios"]
    assert ratios[f"end to end: {OURS} / {PADDED}"] == pytest.approx(median[OURS] / median[PADDED])
    assert set(ratios) == {f"end to end: {OURS} / {other}" for other in (PADDED, TUNED, "GEMM limit")}
