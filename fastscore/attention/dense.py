"""Varlen attention on a CPU: batched matrix products over spans of segments, and a softmax in fp32 between them.

torch's own fused attention for CPUs works in small blocks; two products with the scores between them in cache are
faster. ``bench/test_cpu_attention.py`` measures it. Queries and keys are multiplied in fp32 whatever their dtype,
weights and values in the values' dtype.

Shapes: T packed tokens, C + T key space, H query heads, K key-value heads, G = H / K, d head size; B spans of a batch,
R queries and k keys of each.
"""

from __future__ import annotations

import torch

from fastscore.attention.batches import SpanBatch, batch_spans
from fastscore.attention.spans import MAX_SCORES, split_spans
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
    """See :class:`fastscore.attention.Attend`; queries and keys may be wider than the values."""
    window = pack.narrowed(sliding_window)
    num_tokens, num_heads, _ = query_THd.shape
    num_kv = key_TKd.shape[1]
    group = num_heads // num_kv
    accumulator = torch.promote_types(query_THd.dtype, torch.float32)
    # A group's heads share their keys: they are further rows of one product. The scaling goes into the same pass.
    query_KTGd = torch.empty(num_kv, num_tokens, group, query_THd.shape[2], dtype=accumulator)
    torch.mul(query_THd.unflatten(1, (num_kv, group)).transpose(0, 1), scaling, out=query_KTGd)
    query_Nd = query_KTGd.flatten(0, 1).flatten(1)
    key_Nd = key_TKd.transpose(0, 1).to(accumulator).reshape(-1, key_TKd.shape[2])
    value_Nd = value_TKd.transpose(0, 1).reshape(-1, value_TKd.shape[2])
    # The row behind the last takes what padding gives.
    out_KTGd = value_TKd.new_zeros(num_kv, num_tokens + 1, group, value_TKd.shape[2])
    out_Nd = out_KTGd.flatten(0, 1).flatten(1)
    scratch = _Scratch(accumulator)
    for batch in _batches(pack, window, num_heads, num_kv, accumulator):
        num_spans, num_queries, num_keys = batch.shape
        rows_NRd = query_Nd.index_select(0, batch.query_row).view(-1, num_queries * group, query_THd.shape[2])
        keys_Nkd = key_Nd.index_select(0, batch.key_row).view(-1, num_keys, key_Nd.shape[1])
        scores_NRk = scratch.take("scores", (num_kv * num_spans, num_queries * group, num_keys))
        torch.bmm(rows_NRd, keys_Nkd.transpose(1, 2), out=scores_NRk)
        if softcap is not None:
            scores_NRk.div_(softcap).tanh_().mul_(softcap)
        scores_KBRGk = scores_NRk.view(num_kv, num_spans, num_queries, group, num_keys)
        scores_KBRGk += batch.mask_BRk[:, :, None]
        weights_NRk = _softmax(scores_KBRGk, sinks, scratch).view(scores_NRk.shape).to(value_Nd.dtype)
        out_NRd = torch.bmm(weights_NRk, value_Nd.index_select(0, batch.key_row).view(-1, num_keys, value_Nd.shape[1]))
        out_Nd.index_copy_(0, batch.output_row, out_NRd.view(-1, out_Nd.shape[1]))
    return out_KTGd[:, :num_tokens].transpose(0, 1).flatten(1, 2)


class _Scratch:
    """Memory that batches use in turn: fresh memory for each would cost as much as the passes over it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Uninitialised, and the same memory at every call with that name."""
        size = torch.Size(shape).numel()
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self._dtype)
        return self._buffers[name][:size].view(shape)


def _softmax(scores_KBRGk: torch.Tensor, sinks: torch.Tensor | None, scratch: _Scratch) -> torch.Tensor:
    if sinks is None:
        return torch.softmax(scores_KBRGk, dim=-1, out=scratch.take("weights", tuple(scores_KBRGk.shape)))
    # A sink is one more key that takes probability and gives no value.
    num_kv, *_, group, _ = scores_KBRGk.shape
    sink_KBRG1 = sinks.to(scores_KBRGk.dtype).view(num_kv, 1, 1, group, 1).expand(*scores_KBRGk.shape[:-1], 1)
    return torch.cat([scores_KBRGk, sink_KBRG1], dim=-1).softmax(dim=-1)[..., :-1].contiguous()


def _batches(pack: PackedBatch, window: int | None, num_heads: int, num_kv: int, dtype: torch.dtype) -> list[SpanBatch]:
    """Made once for all layers that share the window."""
    key = ("dense", window)
    if key not in pack.memo:
        spans = split_spans(pack, window, num_heads, dtype)
        num_tokens = len(pack.token_ids_T)
        num_keys = pack.num_carried + num_tokens
        pack.memo[key] = batch_spans(spans, num_kv, num_tokens, num_keys, MAX_SCORES // num_heads)
    batches: list[SpanBatch] = pack.memo[key]
    return batches
