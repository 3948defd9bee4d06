"""Requests to padding-free packs within a token budget, and to the padded batches of models that need them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate

import torch

from fastscore.types import PackedBatch, ScoringRequest, Seq2SeqBatch


def input_length(request: ScoringRequest) -> int:
    """Tokens the model has to read: the last answer token is only predicted."""
    return len(request.token_ids) - 1


def pack_requests(requests: Sequence[ScoringRequest], max_tokens: int) -> list[PackedBatch]:
    """Best-fit decreasing into packs of at most ``max_tokens``; a longer request gets a pack of its own.

    The longest requests come first, so that a pack that is too large for the device fails at the start of a run.
    """
    order = sorted(range(len(requests)), key=lambda index: -input_length(requests[index]))
    members: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (room left, pack), sorted by room
    for index in order:
        length = input_length(requests[index])
        place = bisect_left(open_packs, (length, -1))
        if place < len(open_packs):
            room, pack = open_packs.pop(place)
        else:
            room, pack = max_tokens, len(members)
            members.append([])
        members[pack].append(index)
        if room > length:
            insort(open_packs, (room - length, pack))
    return [build_pack(requests, indices) for indices in members]


def pad_groups(requests: Sequence[ScoringRequest], max_tokens: int) -> list[PackedBatch]:
    """Groups for the padded path: near-equal lengths, at most ``max_tokens`` with their padding."""
    order = sorted(range(len(requests)), key=lambda index: -input_length(requests[index]))
    widths = [(input_length(requests[index]),) for index in order]
    return [build_pack(requests, group) for group in _split(order, widths, max_tokens)]


def build_pack(requests: Sequence[ScoringRequest], indices: Sequence[int]) -> PackedBatch:
    """One pack of the requests at ``indices``, in that order."""
    chosen = [requests[index] for index in indices]
    lengths = [input_length(request) for request in chosen]
    starts = [0, *accumulate(lengths)]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    # The token before an answer token predicts it.
    rows = [
        row
        for request, start, length in zip(chosen, starts, lengths, strict=False)
        for row in range(start + request.answer_start - 1, start + length)
    ]
    return PackedBatch(
        token_ids_T=torch.tensor([token for request in chosen for token in request.token_ids[:-1]]),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        seqlens_q=tuple(lengths),
        seqlens_k=tuple(lengths),
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(lengths),
        answer_row_A=torch.tensor(rows),
        target_A=torch.tensor([token for request in chosen for token in request.token_ids[request.answer_start :]]),
        request_index=tuple(indices),
        answer_offsets=(0, *accumulate(request.num_answer_tokens for request in chosen)),
    )


def seq2seq_batches(
    requests: Sequence[ScoringRequest], max_tokens: int, *, start_token: int, pad_token: int
) -> list[Seq2SeqBatch]:
    """Right-padded batches for an encoder-decoder, near-equal prompts together: at most ``max_tokens`` with their
    padding on both sides."""
    widths = [(request.answer_start, request.num_answer_tokens) for request in requests]
    order = sorted(range(len(requests)), key=lambda index: widths[index], reverse=True)
    groups = _split(order, [widths[index] for index in order], max_tokens)
    return [_seq2seq_batch(requests, group, start_token, pad_token) for group in groups]


def _seq2seq_batch(
    requests: Sequence[ScoringRequest], indices: Sequence[int], start_token: int, pad_token: int
) -> Seq2SeqBatch:
    prompts = [requests[index].token_ids[: requests[index].answer_start] for index in indices]
    answers = [requests[index].token_ids[requests[index].answer_start :] for index in indices]
    width = max(map(len, answers))
    prompt_ids_BP = _right_pad(prompts, pad_token)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    return Seq2SeqBatch(
        prompt_ids_BP=prompt_ids_BP,
        prompt_mask_BP=(torch.arange(prompt_ids_BP.shape[1]) < lengths_B[:, None]).long(),
        decoder_ids_BL=_right_pad([(start_token, *answer[:-1]) for answer in answers], pad_token),
        answer_row_A=torch.tensor([b * width + i for b, answer in enumerate(answers) for i in range(len(answer))]),
        target_A=torch.tensor([token for answer in answers for token in answer]),
        request_index=tuple(indices),
        answer_offsets=(0, *accumulate(map(len, answers))),
    )


def _right_pad(rows: Sequence[Sequence[int]], pad_token: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad_token] * (width - len(row))] for row in rows])


def _split(order: Sequence[int], widths: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    """Cut ``order`` (longest first) into runs whose padded area stays within the budget; at least one a run.

    ``widths`` are the lengths of each member's parts, each part being padded to its own longest.
    """
    groups: list[list[int]] = []
    widest: tuple[int, ...] = ()
    for index, width in zip(order, widths, strict=True):
        wider = tuple(map(max, widest, width)) if groups else width
        if not groups or sum(wider) * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
            wider = width
        widest = wider
        groups[-1].append(index)
    return groups
