"""How fast the prefix tree of a whole file is built and cut into packs, beside a trie in plain Python: part of
``make bench``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import suite
from pytest_benchmark.fixture import BenchmarkFixture
from rounds import MeasuredRounds, interleave, medians
from sharing_workload import choice_questions, qa_queries, sharing
from transformers import AutoTokenizer
from workload import lengths

from fastscore.model_source import resolve_model
from fastscore.packing import cut_pack, pack_size
from fastscore.prefix_tree import PrefixTree, build_prefix_tree
from fastscore.types import ScoringRequest

BUDGET = 4096
ROUNDS = suite.rounds(9)
LOADERS = {"qa": qa_queries, "5-shot choices": choice_questions}
TREE, PACKS, PLAIN_TRIE = "prefix tree", "packs", "trie in plain Python"
CLOCK = MeasuredRounds()


@dataclass(frozen=True, slots=True)
class Measured:
    file: str
    tokens: int
    unique_tokens: int
    seconds: dict[str, list[float]]


@pytest.fixture(scope="module", params=LOADERS)
def measured(request: pytest.FixtureRequest) -> Measured:
    pairs = LOADERS[request.param](AutoTokenizer.from_pretrained(resolve_model(suite.MODEL).name_or_path)).pairs
    requests = [ScoringRequest((*prompt, *answer), len(prompt)) for prompt, answer in pairs]
    tree = build_prefix_tree(requests)
    assert tree.num_tokens == sharing(pairs).unique_tokens
    assert sum(len(each.token_ids) for each in requests) == sum(lengths(pairs))
    runs: dict[str, Callable[[], object]] = {
        TREE: partial(build_prefix_tree, requests),
        PACKS: partial(cut_all, tree),
        PLAIN_TRIE: partial(sharing, pairs),
    }
    interleave(runs, 1)
    return Measured(request.param, sum(lengths(pairs)), tree.num_tokens, interleave(runs, ROUNDS))


def cut_all(tree: PrefixTree) -> int:
    start = packs = 0
    while start < tree.num_tokens:
        size = pack_size(tree.num_tokens - start, BUDGET)
        cut_pack(tree, start, size)
        start += size
        packs += 1
    return packs


@pytest.mark.benchmark(group="planning", timer=CLOCK)
@pytest.mark.parametrize("step", [TREE, PACKS])
def test_planning(step: str, measured: Measured, benchmark: BenchmarkFixture) -> None:
    median = medians(measured.seconds)
    CLOCK.rounds = list(measured.seconds[step])
    tokens, unique_tokens, seconds = measured.tokens, measured.unique_tokens, median[step]
    benchmark.extra_info.update(tokens=tokens, unique_tokens=unique_tokens, tokens_per_s=tokens / seconds)
    ratio = seconds / median[PLAIN_TRIE]
    suite.record(benchmark, {f"planning, {measured.file}: {step} / {PLAIN_TRIE}": ratio}, f"{tokens} tokens")
    benchmark.pedantic(CLOCK.pass_round, rounds=ROUNDS)
    print(
        f"\n{measured.file}, {step}: {tokens:,} tokens, {unique_tokens:,} of them unique: "
        f"{tokens / seconds / 1e6:.1f} M tokens/s, {ratio:.2f} times a trie in plain Python"
    )
