"""The stream of a prefix tree cut into packs of a token budget.

Shapes: T tokens of a pack, S segments in it, P pieces, A answer rows, Q answer slots.

A pack is any run of the stream, so packs are full whatever the lengths of the requests, a request longer than the
budget runs in several, and no prefix is computed twice. What a pack needs of the tokens before it is the chain of its
first token (depth-first order sees to that): their keys and values are kept from the packs before. That costs memory,
for the length of one request at most, where computing them again would cost a forward pass of that length at every cut.
"""

from __future__ import annotations

import numpy as np
import torch

from fastscore.prefix_tree import PrefixTree
from fastscore.ranges import Ints, offsets, ranges
from fastscore.types import KeyRuns, PackedBatch


def pack_size(tokens_left: int, max_tokens: int) -> int:
    """Tokens of the next pack, so that what is left is spread evenly over as few packs as the budget allows."""
    packs = -(-tokens_left // max_tokens)
    return -(-tokens_left // packs)


def cut_pack(tree: PrefixTree, start: int, num_tokens: int, padded_to: int = 0) -> PackedBatch:
    """The pack of the stream's tokens ``start`` to ``start + num_tokens``.

    ``padded_to`` fills the pack up to a fixed size with tokens that belong to no segment; their hidden states mean
    nothing.
    """
    stop = start + num_tokens
    carried = _chain_at(tree, start)
    space = _KeySpace(start, *carried)
    runs, query_start_S = _key_runs(tree, start, stop, space)
    lengths_q = np.diff(np.append(query_start_S, num_tokens))
    lengths_k = np.add.reduceat(runs.length_P, runs.offset_S[:-1])

    first_slot, last_slot = np.searchsorted(tree.slot_row_Q, [start, stop])
    row_A, slot_row = np.unique(tree.slot_row_Q[first_slot:last_slot] - start, return_inverse=True)
    token_ids, positions = tree.token_ids_U[start:stop], tree.position_U[start:stop]
    if padding := max(0, padded_to - num_tokens):
        token_ids, positions = np.pad(token_ids, (0, padding)), np.pad(positions, (0, padding))
    return PackedBatch(
        token_ids_T=torch.from_numpy(token_ids),
        position_ids_T=torch.from_numpy(positions),
        cu_seqlens_q=_int32(offsets(lengths_q)),
        cu_seqlens_k=_int32(offsets(lengths_k)),
        max_seqlen_q=int(lengths_q.max()),
        max_seqlen_k=int(lengths_k.max()),
        key_runs=runs,
        query_start_S=query_start_S,
        num_segment_tokens=num_tokens,
        num_carried=space.size,
        carry_rows=torch.from_numpy(_next_carry(tree, stop, space)),
        answer_row_A=torch.from_numpy(row_A),
        target_Q=tree.slot_target_Q[first_slot:last_slot],
        slot_row_Q=slot_row,
        slot_Q=np.arange(first_slot, last_slot),
    )


class _KeySpace:
    """Where the keys of stream tokens stand in a pack: those carried into it first, in chain order, then its own."""

    def __init__(self, start: int, carried_start: Ints, carried_length: Ints) -> None:
        self.start = start
        # Runs that touch are one run: a later segment may refer to them as one.
        breaks = np.flatnonzero(carried_start[1:] != (carried_start + carried_length)[:-1]) + 1
        first = np.concatenate([[0], breaks]) if len(carried_start) else np.zeros(0, dtype=np.int64)
        self._run_start = carried_start[first]
        self._run_place = offsets(carried_length)[:-1][first]
        self.size = int(carried_length.sum())

    def place(self, stream_start: Ints, length: Ints) -> tuple[Ints, Ints, Ints]:
        """Runs of the stream as ``(run, start, length)`` in the key space, each cut in two at the pack's start."""
        before = np.clip(self.start - stream_start, 0, length)
        index = np.maximum(np.searchsorted(self._run_start, stream_start, side="right") - 1, 0)
        if len(self._run_start):
            carried_place = self._run_place[index] + stream_start - self._run_start[index]
        else:
            carried_place = np.zeros_like(stream_start)
        own_place = np.maximum(stream_start, self.start) - self.start + self.size
        run = np.arange(len(stream_start))
        starts = np.stack([carried_place, own_place], axis=1).ravel()
        lengths = np.stack([before, length - before], axis=1).ravel()
        kept = lengths > 0
        return np.repeat(run, 2)[kept], starts[kept], lengths[kept]


def _chain_at(tree: PrefixTree, token: int) -> tuple[Ints, Ints]:
    """The runs of the stream that stand before a token in its requests; none at either end of the stream."""
    if token == 0 or token >= tree.num_tokens:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    segment = int(np.searchsorted(tree.segment_start_S, token, side="right")) - 1
    pieces = slice(tree.piece_offset_S[segment], tree.piece_offset_S[segment + 1])
    start, length = tree.piece_start_P[pieces], tree.piece_length_P[pieces]
    first = tree.segment_start_S[segment]
    if token > first:
        start, length = np.append(start, first), np.append(length, token - first)
    return start, length


def _key_runs(tree: PrefixTree, start: int, stop: int, space: _KeySpace) -> tuple[KeyRuns, Ints]:
    """Every segment's keys, its own tokens last; and where its queries start."""
    first, last = np.searchsorted(tree.segment_start_S, [start, stop - 1], side="right")
    segment_start = tree.segment_start_S[first - 1 : last].copy()
    num_segments = len(segment_start)
    pieces = slice(tree.piece_offset_S[first - 1], tree.piece_offset_S[last])
    segment_P = np.repeat(np.arange(num_segments), np.diff(tree.piece_offset_S[first - 1 : last + 1]))
    piece_start, piece_length = tree.piece_start_P[pieces], tree.piece_length_P[pieces]
    # Of the first segment some tokens may lie in the pack before: with the pack's own they are one run.
    own_stop = np.append(segment_start[1:], stop)
    run_segment = np.concatenate([segment_P, np.arange(num_segments)])
    order = np.argsort(run_segment, kind="stable")
    run_start = np.concatenate([piece_start, segment_start])[order]
    run_length = np.concatenate([piece_length, own_stop - segment_start])[order]
    run, place, length = space.place(run_start, run_length)
    segment = run_segment[order][run]
    runs = KeyRuns(offsets(np.bincount(segment, minlength=num_segments)), place, length)
    return runs, np.maximum(segment_start, start) - start


def _next_carry(tree: PrefixTree, stop: int, space: _KeySpace) -> Ints:
    """Places of the keys that the pack after this one needs."""
    _, place, length = space.place(*_chain_at(tree, stop))
    return ranges(place, length)


def _int32(values: Ints) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))
