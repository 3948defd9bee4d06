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


def padded_groups(requests: Sequence[ScoringRequest], max_tokens: int) -> list[list[int]]:
    """Requests for :func:`padded_batch`: near-equal lengths together, at most ``max_tokens`` with their padding."""
    return _group([(len(request.token_ids) - 1,) for request in requests], max_tokens)


def seq2seq_groups(requests: Sequence[ScoringRequest], max_tokens: int) -> list[list[int]]:
    """Requests for :func:`seq2seq_batch`: at most ``max_tokens`` with their padding on both sides."""
    return _group([(request.answer_start, request.num_answer_tokens) for request in requests], max_tokens)


def padded_batch(requests: Sequence[ScoringRequest], group: Sequence[int], slot_offset_R: Ints) -> PaddedBatch:
    """The requests at ``group`` as one batch."""
    members = [requests[index] for index in group]
    inputs = [request.token_ids[:-1] for request in members]
    token_ids_BL, mask_BL = _right_pad(inputs, 0)
    start_B = np.array([request.answer_start for request in members], dtype=np.int64)
    count_B = np.array([request.num_answer_tokens for request in members], dtype=np.int64)
    # The token before an answer token predicts it.
    row_A = ranges(np.arange(len(members)) * token_ids_BL.shape[1] + start_B - 1, count_B)
    return PaddedBatch(
        token_ids_BL=token_ids_BL,
        mask_BL=mask_BL,
        answer_row_A=torch.from_numpy(row_A),
        target_Q=_targets(members),
        slot_row_Q=np.arange(len(row_A)),
        slot_Q=ranges(slot_offset_R[list(group)], count_B),
        num_tokens=sum(map(len, inputs)),
    )


def seq2seq_batch(
    requests: Sequence[ScoringRequest], group: Sequence[int], slot_offset_R: Ints, start_token: int, pad_token: int
) -> Seq2SeqBatch:
    """The requests at ``group`` as one batch; answers are decoded after ``start_token``."""
    members = [requests[index] for index in group]
    prompts = [request.token_ids[: request.answer_start] for request in members]
    answers = [request.token_ids[request.answer_start :] for request in members]
    prompt_ids_BP, prompt_mask_BP = _right_pad(prompts, pad_token)
    decoder_ids_BL, _ = _right_pad([(start_token, *answer[:-1]) for answer in answers], pad_token)
    count_B = np.array([len(answer) for answer in answers], dtype=np.int64)
    row_A = ranges(np.arange(len(members)) * decoder_ids_BL.shape[1], count_B)
    return Seq2SeqBatch(
        prompt_ids_BP=prompt_ids_BP,
        prompt_mask_BP=prompt_mask_BP,
        decoder_ids_BL=decoder_ids_BL,
        answer_row_A=torch.from_numpy(row_A),
        target_Q=_targets(members),
        slot_row_Q=np.arange(len(row_A)),
        slot_Q=ranges(slot_offset_R[list(group)], count_B),
        num_tokens=sum(len(request.token_ids) for request in members),
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
