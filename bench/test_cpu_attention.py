"""CPU attention alone, on a pack of each file that shares prefixes: part of ``make bench``.

``dense``, the provider that CPUs get, against ``reference`` (a segment at a time) and one padded call of torch's own
scaled_dot_product_attention over whole texts, its inputs laid out before the clock starts. Heads are SmolLM2-135M's.
FASTSCORE_BENCH_ATTENTION_ROUNDS (9) and FASTSCORE_BENCH_DTYPE (auto) change the task.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import suite
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from rounds import MeasuredRounds, interleave, medians, table
from sharing_workload import choice_questions, first_queries, keeping_share, qa_queries
from transformers import AutoTokenizer

from fastscore.attention import PROVIDERS
from fastscore.devices import DTYPES
from fastscore.model_source import resolve_model
from fastscore.packing import cut_pack
from fastscore.prefix_tree import build_prefix_tree
from fastscore.ranges import ranges
from fastscore.types import PackedBatch, ScoringRequest

ROUNDS = int(os.environ.get("FASTSCORE_BENCH_ATTENTION_ROUNDS", "9"))
DTYPE = suite.dtype()
HEADS, KV_HEADS, HEAD_SIZE = 9, 3, 64
PACK_TOKENS = 4096
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}
DENSE, REFERENCE, ONE_PADDED_CALL = "dense", "reference", "one padded call"
LOADERS = {"qa": (qa_queries, keeping_share, 20), "5-shot choices": (choice_questions, first_queries, 15)}
CLOCK = MeasuredRounds()


@dataclass(frozen=True, slots=True)
class Measured:
    file: str
    tokens: int
    differences: dict[str, float]
    seconds: dict[str, list[float]]


def first_pack(name: str) -> PackedBatch:
    load, subset, queries = LOADERS[name]
    pairs = subset(load(AutoTokenizer.from_pretrained(resolve_model(suite.MODEL).name_or_path)), queries).pairs
    tree = build_prefix_tree([ScoringRequest((*prompt, *answer), len(prompt)) for prompt, answer in pairs])
    return cut_pack(tree, 0, min(PACK_TOKENS, tree.num_tokens))


def whole_texts(pack: PackedBatch) -> torch.Tensor:
    """Of every segment the rows of its whole text ``[S, L]``, padded on the right with -1."""
    runs = pack.key_runs
    rows = torch.from_numpy(ranges(runs.start_P, runs.length_P))
    texts = rows.split((pack.cu_seqlens_k[1:] - pack.cu_seqlens_k[:-1]).tolist())
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=-1)


def contenders(pack: PackedBatch, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """Each gives ``[T, H, d]``, of the same queries, keys and values."""
    torch.manual_seed(0)
    # As a model hands them over: heads before tokens.
    query_THd, key_TKd, value_TKd = (
        torch.randn(heads, pack.num_tokens, HEAD_SIZE).to(dtype).transpose(0, 1)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    scaling = HEAD_SIZE**-0.5
    options = {"scaling": scaling, "sliding_window": None, "softcap": None, "sinks": None}
    rows_SL = whole_texts(pack)
    padded = [
        tensor[rows_SL.clamp_min(0)].transpose(1, 2).repeat_interleave(HEADS // tensor.shape[1], dim=1).contiguous()
        for tensor in (query_THd, key_TKd, value_TKd)
    ]
    out_THd = torch.empty(pack.num_tokens, HEADS, HEAD_SIZE, dtype=dtype)

    def one_padded_call() -> torch.Tensor:
        out_SHLd = F.scaled_dot_product_attention(*padded, is_causal=True, scale=scaling)
        # Tokens that segments share come out the same in each of them.
        out_THd[rows_SL[rows_SL >= 0]] = out_SHLd.transpose(1, 2)[rows_SL >= 0]
        return out_THd

    attends = {name: PROVIDERS[name].load() for name in (DENSE, REFERENCE)}
    packed = {name: partial(each, query_THd, key_TKd, value_TKd, pack, **options) for name, each in attends.items()}
    return {**packed, ONE_PADDED_CALL: one_padded_call}


@pytest.fixture(scope="module", params=LOADERS)
@torch.inference_mode()
def measured(request: pytest.FixtureRequest) -> Measured:
    pack = first_pack(request.param)
    runs = contenders(pack, DTYPES[DTYPE])
    outputs = {name: run().float().clone() for name, run in runs.items()}
    differences = {name: float((out - outputs[REFERENCE]).abs().max()) for name, out in outputs.items()}
    result = Measured(request.param, pack.num_tokens, differences, interleave(runs, ROUNDS))
    median = medians(result.seconds)
    print(
        f"\n{request.param}: {pack.num_tokens:,} tokens in {pack.num_segments} segments, "
        f"{whole_texts(pack).numel():,} padded; {DTYPE}, {torch.get_num_threads()} threads"
    )
    rows = [
        [name, f"{seconds * 1e3:.1f}", f"{seconds / median[DENSE]:.2f}", f"{differences[name]:.0e}"]
        for name, seconds in median.items()
    ]
    print(table(["", "median ms", "x dense", "max diff"], rows))
    return result


@pytest.mark.benchmark(group="CPU attention", timer=CLOCK)
@pytest.mark.parametrize("name", [DENSE, REFERENCE, ONE_PADDED_CALL])
def test_cpu_attention(name: str, measured: Measured, benchmark: BenchmarkFixture) -> None:
    assert measured.differences[name] <= TOLERANCE[DTYPE]
    CLOCK.rounds = list(measured.seconds[name])
    median = medians(measured.seconds)
    benchmark.extra_info.update(times_dense=median[name] / median[DENSE], dtype=DTYPE)
    if name == DENSE:
        ratio = median[DENSE] / median[ONE_PADDED_CALL]
        task = f"{DTYPE}, {measured.tokens} tokens"
        suite.record(benchmark, {f"CPU attention, {measured.file}: {DENSE} / {ONE_PADDED_CALL}": ratio}, task)
    benchmark.pedantic(CLOCK.pass_round, rounds=ROUNDS)
