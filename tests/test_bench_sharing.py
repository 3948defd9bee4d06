"""The benchmarks of shared prefixes: their subsets, their counting, and that they see a wrong score."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_inputs import load
from tiny_models import make_tiny_model
from transformers import AutoTokenizer

from fastscore import Scorer
from fastscore.packing import cut_pack
from fastscore.prefix_tree import build_prefix_tree
from fastscore.types import ScoringRequest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

import invariance  # noqa: E402
import prefix_sharing  # noqa: E402
import sharing_workload  # noqa: E402
import test_cpu_attention as cpu_attention  # noqa: E402
import test_planning as planning  # noqa: E402
from contenders import NO_TREE, OURS, PADDED, TUNED, padded_tokens  # noqa: E402
from sharing_workload import choice_questions, first_queries, keeping_share, sharing  # noqa: E402
from workload import TokenPair, Workload  # noqa: E402


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("bench") / "llama", max_position_embeddings=16384)


def branches(stem: int, count: int = 4) -> tuple[TokenPair, ...]:
    """Pairs that share their first 20 tokens, another such set for each ``stem``."""
    return tuple(((*range(stem, stem + 20), 400 + branch), (5, 6, 7)) for branch in range(count))


def test_sharing_counts_every_prefix_once() -> None:
    pairs = [*branches(10), *branches(50), branches(10)[0]]
    inputs = [(*prompt, *answer[:-1]) for prompt, answer in pairs]
    prefixes = {ids[:end] for ids in inputs for end in range(1, len(ids) + 1)}
    counted = sharing(pairs)
    assert counted == sharing_workload.Sharing(sum(map(len, inputs)), len(prefixes))
    assert counted.factor == pytest.approx(9 * 23 / (2 * 20 + 8 * 3))


def test_a_subset_keeps_the_share_and_the_order_of_its_file() -> None:
    # Every passage stands before two queries, far apart: the first half of the file shares nothing among queries.
    queries = tuple(branches(10 * place, count=1) for place in (*range(20), *range(20)))
    whole = Workload("file", queries)
    factor = sharing(whole.pairs).factor
    kept = keeping_share(whole, 8)
    assert len(kept.queries) == 8
    assert sharing(kept.pairs).factor == pytest.approx(factor, rel=0.05)
    assert sharing(first_queries(whole, 8).pairs).factor == 1
    places = [queries.index(query) for query in kept.queries]
    assert len(set(places)) == 4
    assert sorted(places[:4]) == places[:4]
    assert keeping_share(whole, 1000) == whole


def test_five_answered_questions_stand_before_every_question(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    if sharing_workload.LOGIQA_MC.exists():
        real = choice_questions(tokenizer)
        assert len(real.pairs) == 400
        text = tokenizer.decode([*real.queries[0][0][0], *real.queries[0][0][1]])
        rows = [json.loads(line) for line in sharing_workload.LOGIQA_MC.read_text("utf-8").splitlines()]
        shots = "".join(f"{row['context']} {row['choices'][row['gold']]}\n\n" for row in rows[:5])
        assert text == f"{shots}{rows[10]['context']} {rows[10]['choices'][0]}"
    monkeypatch.setattr(sharing_workload, "LOGIQA_MC", ROOT / "absent.jsonl")
    example = choice_questions(tokenizer)
    assert example.describe()["source"] == "examples/choices.jsonl"
    first = tokenizer.decode(example.queries[0][1][0])
    assert first.startswith("Question: What do bees make from nectar?\nAnswer: honey\n\nWhen water is cooled")
    assert tokenizer.decode(example.queries[0][1][1]) == " honey"
    assert sharing(example.pairs).factor > 2


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_padding_is_counted_as_tensors_would_be(batch_size: int) -> None:
    sizes = [3, 9, 1, 4, 4, 7, 2]
    batches = [torch.zeros(max(part), len(part)) for part in map(list, _batched(sizes, batch_size))]
    counted = padded_tokens(sizes, batch_size)
    assert counted.tokens == sum(batch.numel() for batch in batches)
    assert counted.fill == pytest.approx(sum(sizes) / counted.tokens)


def _batched(sizes: list[int], size: int) -> Any:
    places = iter(sizes)
    return iter(lambda: tuple(itertools.islice(places, size)), ())


def test_contenders_are_counted_and_compared(llama: Path) -> None:
    scorer = Scorer.from_model(load(llama), AutoTokenizer.from_pretrained(llama), max_batch_tokens=64)
    pairs = (*branches(10), *branches(50), *branches(90, count=1))
    result = prefix_sharing.measure(scorer, load(llama), Workload("rows", (pairs,)), 2.5, rounds=2)
    found = result["contenders"]
    assert found[OURS]["tokens_computed"] == sharing(pairs).unique_tokens == 3 * 20 + 9 * 3
    assert found[NO_TREE]["tokens_computed"] == 9 * 23
    assert found[PADDED]["tokens_computed"] == 9 * 24
    assert found[TUNED]["tokens_computed"] == 9 * 23
    assert found[OURS]["fill"] == pytest.approx(87 / 128)
    for name, values in found.items():
        assert name == OURS or values["difference_from_fastscore"]["max"] < 1e-5
    json.dumps(result, allow_nan=False)
    shown = prefix_sharing.show(result)
    assert "whole file: 2.50" in shown
    assert f"{9 * 23}" in next(line for line in shown.splitlines() if line.startswith(NO_TREE))


def test_compositions_are_drawn_and_their_spread_is_seen(llama: Path) -> None:
    drawn = invariance.compositions(10, 30, largest=6)
    assert drawn == invariance.compositions(10, 30, largest=6)
    assert {len(chosen) for chosen, _ in drawn} == {1, 2, 3, 4, 5, 6}
    assert all(len(set(chosen)) == len(chosen) for chosen, _ in drawn)

    scorers = invariance.make_scorers(str(llama), "fp32")
    pairs = [*branches(10), *branches(50), *branches(90, count=2)]
    spreads = {name: invariance.spread(scorer, pairs, drawn) for name, scorer in scorers.items()}
    assert spreads[invariance.DETERMINISTIC]["largest_spread"] == 0
    assert spreads[OURS]["largest_spread"] < 1e-5
    assert spreads[OURS]["times_scored"] == 3 * sum(len(chosen) for chosen, _ in drawn)
    assert invariance.cost(scorers, pairs, rounds=1)["deterministic_times_default"] > 0

    class Drifting:
        """A scorer whose scores depend on how many requests there are."""

        def __init__(self) -> None:
            self.real = scorers[OURS]
            self.load = self.real.load

        def score_tokens(self, chosen: list[TokenPair]) -> Any:
            return self.real.score_tokens([(prompt, (*answer[:-1], 5 + len(chosen))) for prompt, answer in chosen])

    assert invariance.spread(Drifting(), pairs, drawn)["largest_spread"] > 0.01  # type: ignore[arg-type]


def test_invariance_is_written_and_decides_the_exit_status(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing_workload, "NQ_QA", ROOT / "absent.jsonl")
    out = tmp_path / "invariance.json"
    small = ["--requests", "6", "--compositions", "5", "--largest", "4", "--cost-queries", "1", "--rounds", "1"]
    assert invariance.main(["--model", str(llama), *small, "--json", str(out)]) == 0
    written = json.loads(out.read_text("utf-8"))
    assert written["spread_nats"]["deterministic"]["largest_spread"] == 0
    assert str(tmp_path) not in json.dumps(written["environment"])


def test_cpu_attention_contenders_agree() -> None:
    requests = [ScoringRequest((*prompt, *answer), len(prompt)) for prompt, answer in (*branches(10), *branches(50))]
    tree = build_prefix_tree(requests)
    pack = cut_pack(tree, 0, tree.num_tokens)
    outputs = {name: run().clone() for name, run in cpu_attention.contenders(pack, torch.float32).items()}
    assert len(outputs) == 3
    for out in outputs.values():
        torch.testing.assert_close(out, outputs[cpu_attention.REFERENCE], rtol=1e-5, atol=1e-5)
    assert cpu_attention.whole_texts(pack).shape == (8, 23)


def test_planning_cuts_the_whole_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BUDGET", 10)
    requests = [ScoringRequest((*prompt, *answer), len(prompt)) for prompt, answer in branches(10)]
    assert planning.cut_all(build_prefix_tree(requests)) == -(-(20 + 4 * 3) // 10)


SHORT_FORM = "bench/test_prefix_sharing.py"


def test_make_bench_runs_the_short_form(llama: Path, tmp_path: Path) -> None:
    record = tmp_path / "benchmark.json"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", f"--benchmark-json={record}", SHORT_FORM],
        cwd=ROOT,
        env={
            # A worker of pytest-xdist is no place to measure in, and pytest-benchmark would refuse.
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "FASTSCORE_BENCH_MODEL": str(llama),
            "FASTSCORE_BENCH_QUERIES": "1",
            "FASTSCORE_BENCH_QUESTIONS": "1",
            "FASTSCORE_BENCH_ROUNDS": "1",
            "FASTSCORE_BENCH_DTYPE": "fp32",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "fastscore, no tree" in run.stdout
    records = json.loads(record.read_text("utf-8"))["benchmarks"]
    assert len(records) == 2 * 4
    for entry in records:
        assert entry["stats"]["median"] == pytest.approx(entry["extra_info"]["median_seconds"])
