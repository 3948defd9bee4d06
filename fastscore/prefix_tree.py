"""The shared prefixes of a window of requests: every distinct prefix token once, in depth-first order.

Shapes: R requests, U distinct prefix tokens (the *stream*), S segments, P pieces, Q answer slots.

Requests are sorted by their token ids; what a request does not share with the one before it is its *segment*, a run of
new tokens in the stream. The tokens before a segment lie in earlier segments: its *chain*, a few runs of the stream
called pieces. Depth-first order has two consequences that packing and attention rest on: the descendants of a run are
contiguous, and all that the rest of the stream still needs of its past is the chain of the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from fastscore.ranges import Ints, offsets, ranges
from fastscore.types import ScoringRequest

_COMPARE_TOKENS = 1 << 22
"""Tokens compared at a time when neighbours are matched: bounds the memory of the index arrays."""


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Distinct prefix tokens of a window of requests, and where each request finds its own.

    token_ids_U, position_U: the stream; a token's position is its distance from the start of its requests.
    segment_start_S: first token of each segment; a segment ends where the next begins.
    piece_offset_S: pieces ``piece_offset_S[s]:piece_offset_S[s + 1]`` make up segment s's chain, first to last.
    piece_start_P, piece_length_P: runs of the stream.
    slot_row_Q, slot_target_Q: distinct (token that predicts, token predicted) pairs, sorted by row.
    request_slot: slots of every answer token of every request, request by request.
    request_offset_R: request r's are ``request_slot[request_offset_R[r]:request_offset_R[r + 1]]``.
    """

    token_ids_U: Ints
    position_U: Ints
    segment_start_S: Ints
    piece_offset_S: Ints
    piece_start_P: Ints
    piece_length_P: Ints
    slot_row_Q: Ints
    slot_target_Q: Ints
    request_slot: Ints
    request_offset_R: Ints

    @property
    def num_tokens(self) -> int:
        """U, the tokens that a model has to read."""
        return len(self.token_ids_U)


def build_prefix_tree(requests: Sequence[ScoringRequest], *, share: bool = True) -> PrefixTree:
    """The tree of the requests' inputs (all tokens but the last, which is only predicted).

    Costs a sort of the requests and a few passes over their tokens. ``share=False`` gives every request tokens of its
    own, for comparison.
    """
    total_R = np.array([len(request.token_ids) for request in requests], dtype=np.int64)
    offset_R = offsets(total_R)
    ids = np.fromiter(chain.from_iterable(r.token_ids for r in requests), dtype=np.int64, count=int(offset_R[-1]))
    input_R = total_R - 1
    order_R = _sorted_order(ids, offset_R, input_R) if share else np.arange(len(requests))
    shared_R = np.zeros(len(requests), dtype=np.int64)
    if share:
        shared_R = _shared_with_previous(ids, offset_R[order_R], input_R[order_R])
    order_R, shared_R = _longest_first(order_R, shared_R, input_R)

    new_R = input_R[order_R] - shared_R
    stream_start_R = offsets(new_R)[:-1]
    is_segment_R = new_R > 0
    source_U = ranges(offset_R[order_R] + shared_R, new_R)

    answer_start_R = np.array([request.answer_start for request in requests], dtype=np.int64)
    pieces, runs = _chains(
        shared_R.tolist(), input_R[order_R].tolist(), stream_start_R.tolist(), answer_start_R[order_R].tolist()
    )
    row_A = ranges(np.array(runs[0], dtype=np.int64), np.array(runs[1], dtype=np.int64))
    answers_R = (total_R - answer_start_R)[order_R]
    target_A = ids[ranges(offset_R[order_R] + answer_start_R[order_R], answers_R)]
    # One number per (row, target); sorting them sorts by row.
    slots_Q, slot_A = np.unique((row_A << 32) | target_A, return_inverse=True)

    # Back from the sorted order of the requests to theirs.
    begin_R = np.empty(len(requests), dtype=np.int64)
    begin_R[order_R] = offsets(answers_R)[:-1]
    count_R = total_R - answer_start_R
    return PrefixTree(
        token_ids_U=ids[source_U],
        position_U=ranges(shared_R, new_R),
        segment_start_S=stream_start_R[is_segment_R],
        piece_offset_S=np.array(pieces[0], dtype=np.int64),
        piece_start_P=np.array(pieces[1], dtype=np.int64),
        piece_length_P=np.array(pieces[2], dtype=np.int64),
        slot_row_Q=slots_Q >> 32,
        slot_target_Q=slots_Q & 0xFFFFFFFF,
        request_slot=slot_A[ranges(begin_R, count_R)],
        request_offset_R=offsets(count_R),
    )


def _sorted_order(ids: Ints, offset_R: Ints, input_R: Ints) -> Ints:
    """Requests by their input tokens. As big-endian bytes they compare like numbers, at the speed of memcmp."""
    data = ids.astype(">u4").tobytes()
    keys = [data[4 * start : 4 * (start + length)] for start, length in zip(offset_R, input_R, strict=False)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def _shared_with_previous(ids: Ints, start_R: Ints, length_R: Ints) -> Ints:
    """How many first tokens each request of the sorted order has in common with the one before it."""
    shared_R = np.zeros(len(start_R), dtype=np.int64)
    common_R = np.minimum(length_R[1:], length_R[:-1])
    bounds = np.searchsorted(np.cumsum(common_R), np.arange(0, common_R.sum() + _COMPARE_TOKENS, _COMPARE_TOKENS))
    for first, last in zip(bounds, [*bounds[1:], len(common_R)], strict=True):
        if first == last:
            continue
        length = common_R[first:last]
        left = ids[ranges(start_R[first:last], length)]
        right = ids[ranges(start_R[first + 1 : last + 1], length)]
        differs = np.flatnonzero(left != right)
        begin = offsets(length)
        # The first difference at or after each pair's begin, or its end where there is none.
        place = np.searchsorted(differs, begin[:-1])
        found = np.concatenate([differs, [begin[-1]]])[place]
        shared_R[first + 1 : last + 1] = np.minimum(found, begin[1:]) - begin[:-1]
    return shared_R


def _longest_first(order_R: Ints, shared_R: Ints, input_R: Ints) -> tuple[Ints, Ints]:
    """Groups that share no token with one another, those with the longest request first; and within a group those parts
    that share no more than all of it does, such as a template's first words."""
    if not len(order_R):
        return order_R, shared_R
    is_group_R = shared_R == 0
    group_R = np.cumsum(is_group_R) - 1
    # What all of a group share is the least that any two neighbours do.
    common_G = np.minimum.reduceat(np.where(is_group_R, input_R.max(), shared_R), np.flatnonzero(is_group_R))
    part_R = np.cumsum(shared_R <= common_G[group_R]) - 1
    length_R = input_R[order_R]
    longest_R = [np.maximum.reduceat(length_R, np.flatnonzero(np.diff(of, prepend=-1)))[of] for of in (group_R, part_R)]
    # Stable, and each part is contiguous: its requests stay together and in their order.
    place_R = np.lexsort((part_R, -longest_R[1], group_R, -longest_R[0]))
    order_R, shared_R, group_R, part_R = order_R[place_R], shared_R[place_R], group_R[place_R], part_R[place_R]
    is_part_R = np.diff(part_R, prepend=-1) != 0
    shared_R = np.where(is_part_R, common_G[group_R], shared_R)
    return order_R, np.where(np.diff(group_R, prepend=-1) != 0, 0, shared_R)


def _chains(
    shared: list[int], length: list[int], stream_start: list[int], answer_start: list[int]
) -> tuple[tuple[list[int], list[int], list[int]], tuple[list[int], list[int]]]:
    """Pieces of every segment's chain; and the runs of the stream that predict each request's answer tokens."""
    offsets, starts, lengths = [0], [], []
    run_starts: list[int] = []
    run_lengths: list[int] = []
    # The chain of the current request as (first position, start in the stream); a run ends where the next begins.
    positions: list[int] = []
    places: list[int] = []
    for common, end, place, answer in zip(shared, length, stream_start, answer_start, strict=True):
        while positions and positions[-1] >= common:
            positions.pop()
            places.pop()
        if end > common:
            for index, position in enumerate(positions):
                stop = positions[index + 1] if index + 1 < len(positions) else common
                starts.append(places[index])
                lengths.append(stop - position)
            offsets.append(len(starts))
            # A segment that continues the run before it makes it longer instead of another.
            if not positions or places[-1] + common - positions[-1] != place:
                positions.append(common)
                places.append(place)
        # Answer token i is predicted by the token at position i - 1; usually all of them lie in the last run.
        stop, first = end, len(run_starts)
        for position, start in zip(reversed(positions), reversed(places), strict=True):
            begin = max(position, answer - 1)
            if begin < stop:
                run_starts.insert(first, start + begin - position)
                run_lengths.insert(first, stop - begin)
                stop = begin
            if position < answer:
                break
    return (offsets, starts, lengths), (run_starts, run_lengths)
