"""Packs and padded batches against a plain recomputation, request by request."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastscore.packing import build_pack, pack_requests, pad_groups, seq2seq_batches
from fastscore.types import PackedBatch, ScoringRequest, Seq2SeqBatch


@st.composite
def requests_of(draw: st.DrawFn, max_length: int = 40) -> list[ScoringRequest]:
    lengths = draw(st.lists(st.tuples(st.integers(1, max_length), st.integers(1, max_length)), max_size=30))
    counter = iter(range(10**6))  # every token id occurs once: a token in the wrong place shows
    return [ScoringRequest(tuple(next(counter) for _ in range(p + a)), p) for p, a in lengths]


def check_pack(pack: PackedBatch, requests: Sequence[ScoringRequest]) -> None:
    tokens, positions, starts, rows, targets, offsets = [], [], [0], [], [], [0]
    for index in pack.request_index:
        request = requests[index]
        for position, token in enumerate(request.token_ids):
            if position >= request.answer_start:
                rows.append(len(tokens) - 1)  # the token read just before this one predicts it
                targets.append(token)
            if position < len(request.token_ids) - 1:
                tokens.append(token)
                positions.append(position)
        starts.append(len(tokens))
        offsets.append(len(targets))
    assert pack.token_ids_T.tolist() == tokens
    assert pack.position_ids_T.tolist() == positions
    assert pack.cu_seqlens_q.tolist() == pack.cu_seqlens_k.tolist() == starts
    assert pack.answer_row_A.tolist() == rows
    assert pack.target_A.tolist() == targets
    assert list(pack.answer_offsets) == offsets
    lengths = [stop - start for start, stop in pairwise(starts)]
    assert list(pack.seqlens_q) == list(pack.seqlens_k) == lengths
    assert pack.max_seqlen_q == pack.max_seqlen_k == max(lengths)
    assert pack.num_tokens == len(tokens)
    integers = (pack.token_ids_T, pack.position_ids_T, pack.answer_row_A, pack.target_A)
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert pack.cu_seqlens_q.dtype == torch.int32


def once_each(batches: Sequence[PackedBatch | Seq2SeqBatch], requests: Sequence[ScoringRequest]) -> None:
    assert sorted(index for batch in batches for index in batch.request_index) == list(range(len(requests)))


@given(requests=requests_of(), budget=st.integers(1, 120))
def test_packs(requests: list[ScoringRequest], budget: int) -> None:
    packs = pack_requests(requests, budget)
    once_each(packs, requests)
    for pack in packs:
        check_pack(pack, requests)
        assert pack.num_tokens <= budget or len(pack.request_index) == 1
    longest = [pack.max_seqlen_q for pack in packs]
    assert longest == sorted(longest, reverse=True), "a pack too large for the device is among the first"


@given(requests=requests_of(), budget=st.integers(1, 120))
def test_no_two_packs_would_fit_into_one(requests: list[ScoringRequest], budget: int) -> None:
    sizes = sorted(pack.num_tokens for pack in pack_requests(requests, budget))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > budget


@given(requests=requests_of(), budget=st.integers(1, 200))
def test_padded_groups(requests: list[ScoringRequest], budget: int) -> None:
    groups = pad_groups(requests, budget)
    once_each(groups, requests)
    for group in groups:
        check_pack(group, requests)
        assert group.max_seqlen_q * len(group.request_index) <= budget or len(group.request_index) == 1
    lengths = [length for group in groups for length in group.seqlens_q]
    assert lengths == sorted(lengths, reverse=True), "near-equal lengths stand together"


@given(requests=requests_of(), budget=st.integers(1, 300))
def test_encoder_decoder_batches(requests: list[ScoringRequest], budget: int) -> None:
    start, pad = -7, -9
    batches = seq2seq_batches(requests, budget, start_token=start, pad_token=pad)
    once_each(batches, requests)
    for batch in batches:
        members = [requests[index] for index in batch.request_index]
        prompts = [request.token_ids[: request.answer_start] for request in members]
        answers = [request.token_ids[request.answer_start :] for request in members]
        area = batch.prompt_ids_BP.numel() + batch.decoder_ids_BL.numel()
        assert area <= budget or len(members) == 1
        for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            padding = batch.prompt_ids_BP.shape[1] - len(prompt)
            assert batch.prompt_ids_BP[b].tolist() == [*prompt, *[pad] * padding]
            assert batch.prompt_mask_BP[b].tolist() == [1] * len(prompt) + [0] * padding
            padding = batch.decoder_ids_BL.shape[1] - len(answer)
            assert batch.decoder_ids_BL[b].tolist() == [start, *answer[:-1], *[pad] * padding]
            rows = batch.answer_row_A[batch.answer_offsets[b] : batch.answer_offsets[b + 1]]
            assert rows.tolist() == [b * batch.decoder_ids_BL.shape[1] + i for i in range(len(answer))]
        assert batch.target_A.tolist() == [token for answer in answers for token in answer]
        assert batch.num_tokens == sum(len(request.token_ids) for request in members)
        assert batch.prompt_ids_BP.shape[1] == max(map(len, prompts))
        assert batch.decoder_ids_BL.shape[1] == max(map(len, answers))


def test_nothing_makes_no_batches() -> None:
    assert pack_requests([], 10) == []
    assert pad_groups([], 10) == []
    assert seq2seq_batches([], 10, start_token=0, pad_token=0) == []


def test_a_request_longer_than_the_budget_is_alone() -> None:
    requests = [ScoringRequest(tuple(range(length + 1)), 1) for length in (3, 50, 3, 10)]
    assert [pack.request_index for pack in pack_requests(requests, 10)] == [(1,), (3,), (0, 2)]
    assert [group.request_index for group in pad_groups(requests, 10)] == [(1,), (3,), (0, 2)]


def test_build_pack_keeps_the_given_order() -> None:
    requests = [ScoringRequest((5, 6, 7), 1), ScoringRequest((8, 9), 1), ScoringRequest((1, 2, 3, 4), 3)]
    pack = build_pack(requests, [2, 0])
    assert pack.request_index == (2, 0)
    assert pack.token_ids_T.tolist() == [1, 2, 3, 5, 6]
    assert pack.answer_row_A.tolist() == [2, 3, 4]
    assert pack.target_A.tolist() == [4, 6, 7]


def nq_like(count: int) -> list[ScoringRequest]:
    """Lengths as the Natural Questions pairs have them: about 143 tokens, the longest a few times that."""
    draw = random.Random(1)
    lengths = [min(max(30, round(draw.gauss(143, 35))), 400) + draw.choice([0, 0, 0, 150]) for _ in range(count)]
    return [ScoringRequest(tuple(range(length)), length - draw.randint(1, 8)) for length in lengths]


@pytest.mark.parametrize("budget", [4096, 16384])
def test_fill(budget: int) -> None:
    """At least 99% of the token budget of 1,600 such pairs is used, all but the last pack counted."""
    packs = pack_requests(nq_like(1600), budget)
    sizes = sorted(pack.num_tokens for pack in packs)[1:]
    assert sum(sizes) / (budget * len(sizes)) > 0.99


def test_packing_costs_little() -> None:
    """Linear in the requests, about: four times as many take less than ten times as long."""
    seconds = []
    for count in (2000, 8000):
        requests = nq_like(count)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            pack_requests(requests, 4096)
            times.append(time.perf_counter() - started)
        seconds.append(min(times))
    assert seconds[1] < 10 * seconds[0]


def test_moving_to_a_device_moves_every_tensor() -> None:
    requests = [ScoringRequest((5, 6, 7), 1), ScoringRequest((8, 9), 1)]
    meta = torch.device("meta")
    for batch in (*pack_requests(requests, 10), *seq2seq_batches(requests, 10, start_token=0, pad_token=0)):
        moved = batch.to(meta)
        tensors = [name for name in type(batch).__slots__ if isinstance(getattr(batch, name), torch.Tensor)]
        assert len(tensors) >= 5
        assert all(getattr(moved, name).device == meta for name in tensors)
        assert (moved.request_index, moved.answer_offsets) == (batch.request_index, batch.answer_offsets)
