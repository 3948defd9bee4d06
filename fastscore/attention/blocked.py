"""Varlen attention whose sums do not depend on what else is in the pack, nor on how a request is cut into segments.

Queries are taken in blocks at fixed positions of their requests (0 to 63, 64 to 127, ...), and every block runs against
the same number of keys, whichever of its rows belong to the pack: one shape for each place in a text, so one order of
summation. Missing rows are zeros.

Shapes: T packed tokens, H query heads, K key-value heads, d head size; q queries and k keys of a block.
"""

from __future__ import annotations

import numpy as np
import torch

from fastscore.ranges import offsets, ranges
from fastscore.transfer import to_device
from fastscore.types import PackedBatch

BLOCK = 64

Blocks = list[tuple[int, torch.Tensor, torch.Tensor]]


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
    """See :class:`fastscore.attention.Attend`."""
    num_heads, num_kv = query_THd.shape[1], key_TKd.shape[1]
    # A row of zeros at the end stands for every missing query and key.
    query_THd, key_TKd, value_TKd = (
        torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 1)) for t in (query_THd, key_TKd, value_TKd)
    )
    out_THd = value_TKd.new_zeros(query_THd.shape[0], num_heads, value_TKd.shape[2])
    for position, query_rows_q, key_rows_k in _blocks(pack, query_THd.device):
        query_position_q = position + torch.arange(BLOCK, device=query_THd.device)[:, None]
        key_position_k = torch.arange(len(key_rows_k), device=query_THd.device)
        hidden_qk = key_position_k > query_position_q
        if sliding_window is not None:
            hidden_qk |= key_position_k <= query_position_q - sliding_window
        query_Hqd = query_THd[query_rows_q].transpose(0, 1)
        key_Hkd, value_Hkd = (
            tensor[key_rows_k].transpose(0, 1).repeat_interleave(num_heads // num_kv, dim=0)
            for tensor in (key_TKd, value_TKd)
        )
        scores_Hqk = torch.bmm(query_Hqd, key_Hkd.transpose(1, 2)).float() * scaling
        if softcap is not None:
            scores_Hqk = torch.tanh(scores_Hqk / softcap) * softcap
        scores_Hqk = scores_Hqk.masked_fill(hidden_qk, -torch.inf)
        if sinks is not None:
            sink_Hq1 = sinks.float()[:, None, None].expand(-1, BLOCK, 1)
            scores_Hqk = torch.cat([scores_Hqk, sink_Hq1], dim=-1)
        weights_Hqk = scores_Hqk.softmax(dim=-1)[:, :, : len(key_rows_k)].to(value_Hkd.dtype)
        out_THd[query_rows_q] = torch.bmm(weights_Hqk, value_Hkd).transpose(0, 1)
    return out_THd[:-1]


def _blocks(pack: PackedBatch, device: torch.device) -> Blocks:
    """First position, query rows and key rows of every block; a missing one is the row behind the last."""
    if "blocked" not in pack.memo:
        runs = pack.key_runs
        no_query, no_key = len(pack.token_ids_T), pack.num_carried + len(pack.token_ids_T)
        keys = ranges(runs.start_P, runs.length_P)
        key_bounds = offsets(np.add.reduceat(runs.length_P, runs.offset_S[:-1])).tolist()
        query_bounds = [*pack.query_start_S.tolist(), pack.num_segment_tokens]
        positions: list[int] = []
        rows: list[np.ndarray] = []
        for segment in range(pack.num_segments):
            chain = keys[key_bounds[segment] : key_bounds[segment + 1]]
            first_q, last_q = query_bounds[segment], query_bounds[segment + 1]
            shift = first_q - (len(chain) - (last_q - first_q))  # position 0's row, were it in the pack
            for position in range((first_q - shift) // BLOCK * BLOCK, len(chain), BLOCK):
                query_rows = np.arange(position, position + BLOCK) + shift
                key_rows = np.full(position + BLOCK, no_key)
                key_rows[: len(chain)] = chain[: position + BLOCK]
                positions.append(position)
                rows += np.where((query_rows >= first_q) & (query_rows < last_q), query_rows, no_query), key_rows
        split = to_device(torch.from_numpy(np.concatenate(rows)), device).split([len(each) for each in rows])
        pack.memo["blocked"] = list(zip(positions, split[::2], split[1::2], strict=True))
    made: Blocks = pack.memo["blocked"]
    return made
