"""What attention over a pack should give: a dense product in fp64 with a mask; and packs to ask it of."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch

from fastscore.attention.varlen import VarlenCall
from fastscore.packing import cut_pack
from fastscore.prefix_tree import build_prefix_tree
from fastscore.types import PackedBatch, ScoringRequest

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 7},
    "wide-window": {"sliding_window": 1000},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "window-sinks": {"sliding_window": 9, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "all": {"sliding_window": 5, "softcap": 3.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


def shared_requests(seed: int, count: int = 12, stem: int = 40) -> list[ScoringRequest]:
    """Requests over a few long stems, with branches at several depths."""
    rng = random.Random(seed)
    stems = [[rng.randrange(100) for _ in range(rng.randint(1, stem))] for _ in range(3)]
    result = []
    for _ in range(count):
        tokens = list(rng.choice(stems))
        if rng.random() < 0.5:
            tokens = tokens[: rng.randint(1, len(tokens))] + rng.choice(stems)
        tokens += [rng.randrange(100) for _ in range(rng.randint(1, 12))]
        result.append(ScoringRequest(tuple(tokens), len(tokens) - 1))
    return result


def packs_of(requests: list[ScoringRequest], size: int) -> list[PackedBatch]:
    tree = build_prefix_tree(requests)
    return [cut_pack(tree, start, min(size, tree.num_tokens - start)) for start in range(0, tree.num_tokens, size)]


def inputs(
    pack: PackedBatch, dtype: torch.dtype, seed: int = 0, heads: int = 4, kv_heads: int = 2, size: int = 16
) -> Any:
    generator = torch.Generator().manual_seed(seed)
    keys = pack.num_carried + len(pack.token_ids_T)
    return tuple(
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((len(pack.token_ids_T), heads, size), (keys, kv_heads, size), (keys, kv_heads, size))
    )


def truth(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: PackedBatch, **options: Any
) -> torch.Tensor:
    """One dense product in fp64, with a mask that says key by key what each token sees."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bounds = [*pack.query_start_S.tolist(), pack.num_segment_tokens]
    runs = pack.key_runs
    seen = torch.zeros(len(query), len(key), dtype=torch.bool)
    for segment in range(pack.num_segments):
        rows = [
            row
            for run in range(runs.offset_S[segment], runs.offset_S[segment + 1])
            for row in range(int(runs.start_P[run]), int(runs.start_P[run] + runs.length_P[run]))
        ]
        first, stop = bounds[segment], bounds[segment + 1]
        for token in range(first, stop):
            prefix = rows[: len(rows) - (stop - 1 - token)]
            seen[token, prefix[-(options.get("sliding_window") or len(prefix)) :]] = True
    scores = torch.einsum("qhd,khd->qhk", query, key) * options["scaling"]
    if options.get("softcap"):
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    scores = scores.masked_fill(~seen[:, None, :], -torch.inf)
    if options.get("sinks") is not None:
        scores = torch.cat([scores, options["sinks"].double()[None, :, None].expand(len(query), -1, 1)], dim=2)
    return torch.einsum("qhk,khd->qhd", scores.softmax(dim=2)[:, :, : len(key)], value)


def cpu_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: VarlenCall,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the libraries' varlen functions do, in plain PyTorch: the orchestration around them runs here on a CPU."""
    cu_q, cu_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    assert max(b - a for a, b in itertools.pairwise(cu_q)) == call.max_seqlen_q
    assert max(b - a for a, b in itertools.pairwise(cu_k)) == call.max_seqlen_k
    out, lse = torch.zeros_like(query), torch.full(query.shape[:2], -torch.inf)
    groups = query.shape[1] // key.shape[1]
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        keys, values = key[k0:k1].repeat_interleave(groups, 1), value[k0:k1].repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->qhk", query[q0:q1], keys).float() * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if call.causal:
            position = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
            hidden = torch.arange(k1 - k0) > position
            if sliding_window is not None:
                hidden |= torch.arange(k1 - k0) <= position - sliding_window
            scores = scores.masked_fill(hidden[:, None, :], -torch.inf)
        out[q0:q1] = torch.einsum("qhk,khd->qhd", scores.softmax(-1).to(values.dtype), values)
        lse[q0:q1] = scores.logsumexp(-1)
    return out, lse if with_lse else None
