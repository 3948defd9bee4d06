"""Right-padded batches against a plain recomputation, request by request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastscore.packing import cut_pack
from fastscore.padding import padded_batch, padded_groups, seq2seq_batch, seq2seq_groups, slot_offsets
from fastscore.prefix_tree import build_prefix_tree
from fastscore.types import ScoringRequest


@st.composite
def requests_of(draw: st.DrawFn, max_length: int = 40) -> list[ScoringRequest]:
    lengths = draw(st.lists(st.tuples(st.integers(1, max_length), st.integers(1, max_length)), max_size=30))
    counter = iter(range(10**6))  # every token id occurs once: a token in the wrong place shows
    return [ScoringRequest(tuple(next(counter) for _ in range(p + a)), p) for p, a in lengths]


def once_each(groups: Sequence[Sequence[int]], requests: Sequence[ScoringRequest]) -> None:
    assert sorted(index for group in groups for index in group) == list(range(len(requests)))


def check_slots(slots: list[int], group: Sequence[int], requests: Sequence[ScoringRequest]) -> None:
    """Slots count the answer tokens of all requests, in their order."""
    firsts = [sum(request.num_answer_tokens for request in requests[:index]) for index in group]
    counts = [requests[index].num_answer_tokens for index in group]
    assert slots == [first + i for first, count in zip(firsts, counts, strict=True) for i in range(count)]


@given(requests=requests_of(), budget=st.integers(1, 200))
def test_padded_batches(requests: list[ScoringRequest], budget: int) -> None:
    groups = padded_groups(requests, budget)
    once_each(groups, requests)
    lengths = [len(requests[index].token_ids) for group in groups for index in group]
    assert lengths == sorted(lengths, reverse=True), "near-equal lengths stand together, the longest first"
    for group in groups:
        batch = padded_batch(requests, group, slot_offsets(requests))
        inputs = [requests[index].token_ids[:-1] for index in group]
        width = max(map(len, inputs))
        assert batch.token_ids_BL.tolist() == [[*ids, *[0] * (width - len(ids))] for ids in inputs]
        assert batch.mask_BL.tolist() == [[1] * len(ids) + [0] * (width - len(ids)) for ids in inputs]
        assert batch.token_ids_BL.numel() <= budget or len(group) == 1
        # The token before an answer token predicts it.
        places = [
            (b * width + place - 1, requests[index].token_ids[place])
            for b, index in enumerate(group)
            for place in range(requests[index].answer_start, len(requests[index].token_ids))
        ]
        rows = batch.answer_row_A[batch.slot_row_Q]
        assert list(zip(rows.tolist(), batch.target_Q.tolist(), strict=True)) == places
        check_slots(batch.slot_Q.tolist(), group, requests)
        assert batch.num_tokens == sum(map(len, inputs))


@given(requests=requests_of(), budget=st.integers(1, 300))
def test_encoder_decoder_batches(requests: list[ScoringRequest], budget: int) -> None:
    start, pad = -7, -9
    groups = seq2seq_groups(requests, budget)
    once_each(groups, requests)
    for group in groups:
        batch = seq2seq_batch(requests, group, slot_offsets(requests), start, pad)
        prompts = [requests[index].token_ids[: requests[index].answer_start] for index in group]
        answers = [requests[index].token_ids[requests[index].answer_start :] for index in group]
        assert batch.prompt_ids_BP.numel() + batch.decoder_ids_BL.numel() <= budget or len(group) == 1
        width, answer_width = max(map(len, prompts)), max(map(len, answers))
        assert batch.prompt_ids_BP.tolist() == [[*ids, *[pad] * (width - len(ids))] for ids in prompts]
        assert batch.prompt_mask_BP.tolist() == [[1] * len(ids) + [0] * (width - len(ids)) for ids in prompts]
        decoded = [[start, *ids[:-1], *[pad] * (answer_width - len(ids))] for ids in answers]
        assert batch.decoder_ids_BL.tolist() == decoded
        rows = [b * answer_width + i for b, answer in enumerate(answers) for i in range(len(answer))]
        assert batch.answer_row_A[batch.slot_row_Q].tolist() == rows
        assert batch.target_Q.tolist() == [token for answer in answers for token in answer]
        check_slots(batch.slot_Q.tolist(), group, requests)
        assert batch.num_tokens == sum(len(requests[index].token_ids) for index in group)


def test_nothing_makes_no_batches() -> None:
    assert padded_groups([], 10) == []
    assert seq2seq_groups([], 10) == []


def test_a_request_longer_than_the_budget_is_alone() -> None:
    requests = [ScoringRequest(tuple(range(length + 1)), 1) for length in (3, 50, 3, 10)]
    assert padded_groups(requests, 10) == [[1], [3], [0, 2]]


def test_moving_to_a_device_moves_every_tensor() -> None:
    requests = [ScoringRequest((5, 6, 7), 1), ScoringRequest((8, 9), 1)]
    meta, slots = torch.device("meta"), slot_offsets(requests)
    pack = cut_pack(build_prefix_tree(requests), 0, 3)
    for batch in (pack, padded_batch(requests, [0, 1], slots), seq2seq_batch(requests, [0, 1], slots, 0, 0)):
        moved = batch.to(meta)
        tensors = [name for name in type(batch).__slots__ if isinstance(getattr(batch, name), torch.Tensor)]
        assert len(tensors) >= 3
        assert all(getattr(moved, name).device == meta for name in tensors)
        assert moved.slot_Q is batch.slot_Q
