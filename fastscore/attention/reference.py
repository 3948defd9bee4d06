"""Varlen attention in plain PyTorch, one segment at a time, with every option: the truth for the other providers.

Shapes: T packed tokens, H query heads, K key-value heads, d head size; lower-case q and k are one segment's tokens.
"""

from __future__ import annotations

import torch

from fastscore.ranges import ranges
from fastscore.transfer import to_device
from fastscore.types import PackedBatch


def attend(
    query_THd: torch.Tensor,
    key_TKd: torch.Tensor,
    value_TKd: torch.Tensor,
    pack: PackedBatch,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of each segment to its chain, queries aligned to the end of the keys (bottom-right)."""
    out_THd = value_TKd.new_zeros(query_THd.shape[0], query_THd.shape[1], value_TKd.shape[2])
    for first, last, rows_k in _segments(pack, query_THd.device):
        out_THd[first:last] = attend_segment(
            query_THd[first:last], key_TKd[rows_k], value_TKd[rows_k], scaling, sliding_window, softcap, sinks
        )
    return out_THd


def attend_segment(
    query_qHd: torch.Tensor,
    key_kKd: torch.Tensor,
    value_kKd: torch.Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One segment, softmax in fp32. A sliding window counts the query's own token."""
    query_Hqd, key_Kkd, value_Kkd = (tensor.transpose(0, 1) for tensor in (query_qHd, key_kKd, value_kKd))
    groups = query_Hqd.shape[0] // key_Kkd.shape[0]
    key_Hkd, value_Hkd = (tensor.repeat_interleave(groups, dim=0) for tensor in (key_Kkd, value_Kkd))
    scores_Hqk = (query_Hqd @ key_Hkd.transpose(1, 2)).float() * scaling
    if softcap is not None:
        scores_Hqk = torch.tanh(scores_Hqk / softcap) * softcap
    num_q, num_k = scores_Hqk.shape[1:]
    query_q = torch.arange(num_k - num_q, num_k, device=scores_Hqk.device)[:, None]
    key_k = torch.arange(num_k, device=scores_Hqk.device)
    hidden_qk = key_k > query_q
    if sliding_window is not None:
        hidden_qk |= key_k <= query_q - sliding_window
    scores_Hqk = scores_Hqk.masked_fill(hidden_qk, -torch.inf)
    if sinks is None:
        weights_Hqk = scores_Hqk.softmax(dim=-1)
    else:
        # A sink is one more key that takes probability and gives no value.
        sink_Hq1 = sinks.float()[:, None, None].expand(-1, num_q, 1)
        weights_Hqk = torch.cat([scores_Hqk, sink_Hq1], dim=-1).softmax(dim=-1)[..., :-1]
    return (weights_Hqk.to(value_Hkd.dtype) @ value_Hkd).transpose(0, 1)


def _segments(pack: PackedBatch, device: torch.device) -> list[tuple[int, int, torch.Tensor]]:
    """First and last query of each segment, and the rows of its keys."""
    if "reference" not in pack.memo:
        runs, bounds = pack.key_runs, [*pack.query_start_S.tolist(), pack.num_segment_tokens]
        rows = to_device(torch.from_numpy(ranges(runs.start_P, runs.length_P)), device)
        lengths = [
            int(runs.length_P[first:last].sum())
            for first, last in zip(runs.offset_S[:-1], runs.offset_S[1:], strict=True)
        ]
        pack.memo["reference"] = list(zip(bounds, bounds[1:], rows.split(lengths), strict=False))
    segments: list[tuple[int, int, torch.Tensor]] = pack.memo["reference"]
    return segments
