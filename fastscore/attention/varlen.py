"""A pack through a library's varlen attention: one call over gathered keys, and one for each layer of rectangles.

Shapes: T packed tokens, S segments, H query heads, K key-value heads, d head size; ``q`` and ``k`` are the queries and
keys of one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fastscore.attention.merge import merge_parts
from fastscore.attention.split import AttentionParts, Rectangle, last_keys, split_attention
from fastscore.ranges import Ints, offsets, ranges
from fastscore.transfer import to_device
from fastscore.types import PackedBatch

MIN_RECTANGLE_KEYS = 256
"""On a GPU a copied key costs little beside one more launch in every layer; not yet measured."""


@dataclass(frozen=True, slots=True)
class VarlenCall:
    """Lengths of one call. Rows are None where the call takes everything as it stands."""

    query_rows: torch.Tensor | None
    key_rows: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool


class VarlenAttention(Protocol):
    """A library's function: ``out [q, H, d]`` and, where ``with_lse``, the log-sum-exp ``[q, H]`` (fp32).

    Causal is bottom-right; a sliding window of w lets a query see w keys, its own included.
    """

    def __call__(
        self,
        query_qHd: torch.Tensor,
        key_kKd: torch.Tensor,
        value_kKd: torch.Tensor,
        call: VarlenCall,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        with_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


def attend_varlen(
    varlen: VarlenAttention,
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
    """A provider's ``attend``, given the library's function."""
    window = pack.narrowed(sliding_window)
    rest, layers = _calls(pack, window, query_THd.device)

    def run(call: VarlenCall, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        return varlen(
            query_THd if call.query_rows is None else query_THd[call.query_rows],
            key_TKd if call.key_rows is None else key_TKd[call.key_rows],
            value_TKd if call.key_rows is None else value_TKd[call.key_rows],
            call,
            scaling=scaling,
            sliding_window=window if call.causal else None,
            softcap=softcap,
            with_lse=with_lse,
        )

    out_THd, lse_TH = run(rest, with_lse=bool(layers) or sinks is not None)
    if lse_TH is None:
        return out_THd
    parts = []
    for call, slices in layers:
        out_qHd, lse_qH = run(call, with_lse=True)
        assert lse_qH is not None
        sizes = [queries.stop - queries.start for queries in slices]
        parts += list(zip(slices, out_qHd.split(sizes), lse_qH.split(sizes), strict=True))
    return merge_parts(out_THd, lse_TH.clone(), parts, sinks)


def _calls(
    pack: PackedBatch, window: int | None, device: torch.device
) -> tuple[VarlenCall, list[tuple[VarlenCall, list[slice]]]]:
    """Made once for all layers that share the window."""
    key = ("varlen", window)
    if key not in pack.memo:
        bounds_q = np.append(pack.query_start_S, pack.num_segment_tokens)
        runs = pack.key_runs
        keys = ranges(runs.start_P, runs.length_P)
        plain = pack.num_carried == 0 and np.array_equal(keys, np.arange(len(pack.token_ids_T)))
        parts = AttentionParts((), runs)
        if window is None:
            parts = split_attention(pack, MIN_RECTANGLE_KEYS)
        elif not plain:
            # Inside a window a query does not see whole runs, so what some query sees is gathered, and no more.
            parts = AttentionParts((), last_keys(runs, np.diff(bounds_q) + window - 1))
        if parts.rest is not runs:
            runs, plain = parts.rest, False
            keys = ranges(runs.start_P, runs.length_P)
        bounds_k = offsets(np.add.reduceat(runs.length_P, runs.offset_S[:-1]))
        rest = _call(None, None if plain else keys, bounds_q, bounds_k, True, device)
        pack.memo[key] = rest, [_layer(layer, device) for layer in _layers(parts.rectangles)]
    made: tuple[VarlenCall, list[tuple[VarlenCall, list[slice]]]] = pack.memo[key]
    return made


def _layers(rectangles: tuple[Rectangle, ...]) -> list[list[Rectangle]]:
    """Rectangles whose queries do not overlap, so that one call takes them all."""
    layers: list[list[Rectangle]] = []
    for rectangle in sorted(rectangles, key=lambda each: (each.first_q, -each.last_q)):
        layer = next((each for each in layers if each[-1].last_q <= rectangle.first_q), None)
        if layer is None:
            layers.append([rectangle])
        else:
            layer.append(rectangle)
    return layers


def _layer(rectangles: list[Rectangle], device: torch.device) -> tuple[VarlenCall, list[slice]]:
    first_q, last_q, first_k, last_k = np.array(
        [(each.first_q, each.last_q, each.first_k, each.last_k) for each in rectangles], dtype=np.int64
    ).T
    call = _call(
        ranges(first_q, last_q - first_q),
        ranges(first_k, last_k - first_k),
        offsets(last_q - first_q),
        offsets(last_k - first_k),
        False,
        device,
    )
    return call, [slice(each.first_q, each.last_q) for each in rectangles]


def _call(
    query_rows: Ints | None, key_rows: Ints | None, bounds_q: Ints, bounds_k: Ints, causal: bool, device: torch.device
) -> VarlenCall:
    return VarlenCall(
        None if query_rows is None else to_device(torch.from_numpy(query_rows), device),
        None if key_rows is None else to_device(torch.from_numpy(key_rows), device),
        to_device(torch.from_numpy(bounds_q.astype(np.int32)), device),
        to_device(torch.from_numpy(bounds_k.astype(np.int32)), device),
        int(np.diff(bounds_q).max()),
        int(np.diff(bounds_k).max()),
        causal,
    )
