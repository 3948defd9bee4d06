"""How fast the prefix tree of a whole file is built and cut into packs: part of ``make bench``."""

from __future__ import annotations

import os
from functools import partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from sharing_workload import choice_questions, qa_queries, sharing
from transformers import AutoTokenizer
from workload import lengths

from fastscore.config import DEFAULT_MODEL
from fastscore.model_source import resolve_model
from fastscore.packing import cut_pack, pack_size
from fastscore.prefix_tree import PrefixTree, build_prefix_tree
from fastscore.types import ScoringRequest

MODEL = os.environ.get("FASTSCORE_BENCH_MODEL", DEFAULT_MODEL)
BUDGET = 4096
LOADERS = {"qa": qa_queries, "5-shot choices": choice_questions}


@pytest.fixture(scope="module", params=LOADERS)
def requests_of_file(request: pytest.FixtureRequest) -> list[ScoringRequest]:
    pairs = LOADERS[request.param](AutoTokenizer.from_pretrained(resolve_model(MODEL).name_or_path)).pairs
    requests = [ScoringRequest((*prompt, *answer), len(prompt)) for prompt, answer in pairs]
    assert build_prefix_tree(requests).num_tokens == sharing(pairs).unique_tokens
    assert sum(len(each.token_ids) for each in requests) == sum(lengths(pairs))
    return requests


def cut_all(tree: PrefixTree) -> int:
    start = packs = 0
    while start < tree.num_tokens:
        size = pack_size(tree.num_tokens - start, BUDGET)
        cut_pack(tree, start, size)
        start += size
        packs += 1
    return packs


@pytest.mark.benchmark(group="planning")
@pytest.mark.parametrize("step", ["prefix tree", "packs"])
def test_planning(step: str, requests_of_file: list[ScoringRequest], benchmark: BenchmarkFixture) -> None:
    tokens = sum(len(each.token_ids) for each in requests_of_file)
    tree = build_prefix_tree(requests_of_file)
    run = partial(build_prefix_tree, requests_of_file) if step == "prefix tree" else partial(cut_all, tree)
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(tokens=tokens, unique_tokens=tree.num_tokens, tokens_per_s=tokens / seconds)
    print(f"\n{step}: {tokens:,} tokens, {tree.num_tokens:,} of them unique: {tokens / seconds / 1e6:.1f} M tokens/s")
