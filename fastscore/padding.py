"""Right-padded batches, for models that cannot run packs: causal ones that fail the self-check, encoder-decoders.

Shapes: B requests of a batch, L its padded length, P padded length of the prompts, A answer rows.

Every answer token of every request has a slot, request by request; nothing is shared here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastscore.ranges import Ints, offsets, ranges
from fastscore.types import PaddedBatch, ScoringRequest, Seq2SeqBatch


def slot_offsets(requests: Sequence[ScoringRequest]) -> Ints:
    """Slots of request r: ``slot_offsets[r]`` to ``slot_offsets[r + 1]``."""
    return offsets(np.array([request.num_answer_tokens for request in requests], dtype=np.int64))


def padded_batches(requests: Sequence[ScoringRequest], max_tokens: int) -> list[PaddedBatch]:
    """Near-equal lengths together, the longest first; at most ``max_tokens`` with their padding."""
    widths = [(len(request.token_ids) - 1,) for request in requests]
    slots_R = slot_offsets(requests)
    return [_padded_batch([requests[i] for i in group], slots_R[group]) for group in _group(widths, max_tokens)]


def seq2seq_batches(
    requests: Sequence[ScoringRequest], max_tokens: int, *, start_token: int, pad_token: int
) -> list[Seq2SeqBatch]:
    """Near-equal prompts together: at most ``max_tokens`` with their padding on both sides."""
    widths = [(request.answer_start, request.num_answer_tokens) for request in requests]
    slots_R = slot_offsets(requests)
    return [
        _seq2seq_batch([requests[i] for i in group], slots_R[group], start_token, pad_token)
        for group in _group(widths, max_tokens)
    ]


def _padded_batch(requests: Sequence[ScoringRequest], first_slot_B: Ints) -> PaddedBatch:
    inputs = [request.token_ids[:-1] for request in requests]
    token_ids_BL, mask_BL = _right_pad(inputs, 0)
    start_B = np.array([request.answer_start for request in requests], dtype=np.int64)
    count_B = np.array([request.num_answer_tokens for request in requests], dtype=np.int64)
    # The token before an answer token predicts it.
    row_A = ranges(np.arange(len(requests)) * token_ids_BL.shape[1] + start_B - 1, count_B)
    return PaddedBatch(
        token_ids_BL=token_ids_BL,
        mask_BL=mask_BL,
        answer_row_A=torch.from_numpy(row_A),
        target_Q=_targets(requests),
        slot_row_Q=np.arange(len(row_A)),
        slot_Q=ranges(first_slot_B, count_B),
        num_tokens=sum(map(len, inputs)),
    )


def _seq2seq_batch(
    requests: Sequence[ScoringRequest], first_slot_B: Ints, start_token: int, pad_token: int
) -> Seq2SeqBatch:
    prompts = [request.token_ids[: request.answer_start] for request in requests]
    answers = [request.token_ids[request.answer_start :] for request in requests]
    prompt_ids_BP, prompt_mask_BP = _right_pad(prompts, pad_token)
    decoder_ids_BL, _ = _right_pad([(start_token, *answer[:-1]) for answer in answers], pad_token)
    count_B = np.array([len(answer) for answer in answers], dtype=np.int64)
    row_A = ranges(np.arange(len(requests)) * decoder_ids_BL.shape[1], count_B)
    return Seq2SeqBatch(
        prompt_ids_BP=prompt_ids_BP,
        prompt_mask_BP=prompt_mask_BP,
        decoder_ids_BL=decoder_ids_BL,
        answer_row_A=torch.from_numpy(row_A),
        target_Q=_targets(requests),
        slot_row_Q=np.arange(len(row_A)),
        slot_Q=ranges(first_slot_B, count_B),
        num_tokens=sum(len(request.token_ids) for request in requests),
    )


def _targets(requests: Sequence[ScoringRequest]) -> Ints:
    return np.array([token for request in requests for token in request.token_ids[request.answer_start :]])


def _right_pad(rows: Sequence[Sequence[int]], pad_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and an int64 mask that is 1 on them."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_token] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(width) < lengths[:, None]).long()


def _group(widths: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    """Indices, widest first, in runs whose padded area stays within the budget; at least one a run.

    A member's width has a part for each tensor; each part is padded to its own longest.
    """
    groups: list[list[int]] = []
    widest: tuple[int, ...] = ()
    for index in sorted(range(len(widths)), key=lambda index: widths[index], reverse=True):
        wider = tuple(map(max, widest, widths[index])) if groups else widths[index]
        if not groups or sum(wider) * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
            wider = widths[index]
        widest = wider
        groups[-1].append(index)
    return groups
