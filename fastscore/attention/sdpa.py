"""Varlen attention on a CPU by torch's scaled_dot_product_attention, segments of near-equal length in one call.

Shapes: T packed tokens, H query heads, K key-value heads, d head size; of a group of segments: G members, q and k their
padded numbers of queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastscore.attention.merge import merge_parts, rectangle_attention
from fastscore.attention.split import AttentionParts, split_attention
from fastscore.ranges import Ints, ranges
from fastscore.types import KeyRuns, PackedBatch

MAX_GROUP_SCORES = 1 << 22
"""Scores (G x q x k) of one group: bounds the memory of its mask."""


@dataclass(frozen=True, slots=True)
class Group:
    """Segments that run in one call. Padding repeats row 0 and is cut off (queries) or masked (keys).

    mask_Gqk: 0 or -inf, or None where the plain causal mask does it: no keys but the segments' own.
    """

    query_rows_Gq: torch.Tensor
    key_rows_Gk: torch.Tensor
    mask_Gqk: torch.Tensor | None
    is_query_Gq: torch.Tensor


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
    """See :class:`fastscore.attention.Attend`. No soft cap."""
    assert softcap is None, "the registry keeps models with a soft cap away"
    window = sliding_window if sliding_window is not None and sliding_window < pack.max_seqlen_k else None
    parts, groups = _plan(pack, window, query_THd.dtype)
    out_THd = query_THd.new_zeros(query_THd.shape)
    with_lse = bool(parts.rectangles) or sinks is not None
    lse_TH = torch.full(query_THd.shape[:2], -torch.inf) if with_lse else None
    repeats = query_THd.shape[1] // key_TKd.shape[1]
    for group in groups:
        query_GHqd, key_GHkd, value_GHkd = (
            tensor[rows.flatten()].unflatten(0, rows.shape).transpose(1, 2)
            for tensor, rows in (
                (query_THd, group.query_rows_Gq),
                (key_TKd, group.key_rows_Gk),
                (value_TKd, group.key_rows_Gk),
            )
        )
        if repeats > 1:
            key_GHkd, value_GHkd = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key_GHkd, value_GHkd))
        mask_G1qk = None if group.mask_Gqk is None else group.mask_Gqk[:, None]
        # The operator below scaled_dot_product_attention, because it gives the log-sum-exp too.
        out_GHqd, lse_GHq = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_GHqd, key_GHkd, value_GHkd, 0.0, mask_G1qk is None, attn_mask=mask_G1qk, scale=scaling
        )
        rows = group.query_rows_Gq[group.is_query_Gq]
        out_THd[rows] = out_GHqd.transpose(1, 2)[group.is_query_Gq]
        if lse_TH is not None:
            lse_TH[rows] = lse_GHq.transpose(1, 2)[group.is_query_Gq].float()
    if lse_TH is None:
        return out_THd
    return merge_parts(out_THd, lse_TH, rectangle_attention(query_THd, key_TKd, value_TKd, parts, scaling), sinks)


def _plan(pack: PackedBatch, window: int | None, dtype: torch.dtype) -> tuple[AttentionParts, list[Group]]:
    """Made once for all layers that share the window."""
    key = ("sdpa", window)
    if key not in pack.memo:
        # Inside a window a query does not see whole runs, so everything is gathered.
        parts = split_attention(pack) if window is None else AttentionParts((), pack.key_runs)
        pack.memo[key] = parts, _groups(pack, parts.rest, window, dtype)
    plan: tuple[AttentionParts, list[Group]] = pack.memo[key]
    return plan


def _groups(pack: PackedBatch, runs: KeyRuns, window: int | None, dtype: torch.dtype) -> list[Group]:
    first_q = pack.query_start_S
    num_q = np.diff(np.append(first_q, pack.num_segment_tokens))
    num_k = np.add.reduceat(runs.length_P, runs.offset_S[:-1])
    shape = np.stack([_rounded(num_q), _rounded(num_k - num_q)])
    order = np.lexsort(shape[::-1])
    shape = shape[:, order]
    bounds = np.flatnonzero((np.diff(shape) != 0).any(axis=0)) + 1
    groups = []
    for same in np.split(order, bounds):
        wide_q, wide_p = int(_rounded(num_q[same[:1]])[0]), int(_rounded(num_k[same[:1]] - num_q[same[:1]])[0])
        size = max(1, MAX_GROUP_SCORES // (wide_q * (wide_p + wide_q)))
        for start in range(0, len(same), size):
            members = same[start : start + size]
            groups.append(_group(runs, members, first_q, num_q, num_k, wide_q, wide_p, window, dtype))
    return groups


def _group(
    runs: KeyRuns,
    members: Ints,
    first_q: Ints,
    num_q: Ints,
    num_k: Ints,
    wide_q: int,
    wide_p: int,
    window: int | None,
    dtype: torch.dtype,
) -> Group:
    """Keys of a member: its prefix in columns 0 to ``wide_p``, its own tokens after them, padding behind each."""
    q_G, p_G = num_q[members], num_k[members] - num_q[members]
    query_rows = np.zeros((len(members), wide_q), dtype=np.int64)
    column_q = np.arange(wide_q)
    is_query = column_q < q_G[:, None]
    query_rows[is_query] = ranges(first_q[members], q_G)
    key_rows = np.zeros((len(members), wide_p + wide_q), dtype=np.int64)
    is_prefix = np.arange(wide_p) < p_G[:, None]
    run_P = ranges(runs.offset_S[members], np.diff(runs.offset_S)[members])
    keys = ranges(runs.start_P[run_P], runs.length_P[run_P])
    is_own = ranges(np.zeros(len(members), dtype=np.int64), num_k[members]) >= np.repeat(p_G, num_k[members])
    key_rows[:, :wide_p][is_prefix] = keys[~is_own]
    key_rows[:, wide_p:][is_query] = keys[is_own]

    mask_Gqk = None
    if wide_p or window is not None:
        seen = np.empty((len(members), wide_q, wide_p + wide_q), dtype=bool)
        seen[:, :, :wide_p] = is_prefix[:, None, :]
        seen[:, :, wide_p:] = column_q <= column_q[:, None]
        if window is not None:
            query_position = p_G[:, None] + column_q
            key_position = np.concatenate([np.broadcast_to(np.arange(wide_p), is_prefix.shape), query_position], axis=1)
            seen &= key_position[:, None, :] > query_position[:, :, None] - window
        mask_Gqk = torch.zeros(seen.shape, dtype=dtype).masked_fill_(torch.from_numpy(~seen), -torch.inf)
    return Group(torch.from_numpy(query_rows), torch.from_numpy(key_rows), mask_Gqk, torch.from_numpy(is_query))


def _rounded(length: Ints) -> Ints:
    """Up to a step of an eighth of the length or so (at least 8): few shapes, little padding."""
    step = np.maximum(8, 2 ** np.maximum(0, np.ceil(np.log2(np.maximum(length, 1))).astype(np.int64) - 3))
    return -(-length // step) * step
