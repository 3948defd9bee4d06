"""The peers in plain transformers: padded batches as the reference system runs them, and as a careful user would.

Shapes: B batch, L padded length, K positions kept (at least the longest answer), V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from workload import TokenPair, lengths

IGNORED = -100
"""Label of a position that is not scored, as ``cross_entropy`` knows it."""
BATCH_SIZES = (4, 8, 16, 32)


class PairScore(NamedTuple):
    """Log-probabilities of the answer tokens, and their mean as the peer itself computes it."""

    token_logprobs: list[float]
    mean_logprob: float


def score_padded(model: PreTrainedModel, pairs: Sequence[TokenPair], batch_size: int = 4) -> list[PairScore]:
    """File order, left padding, logits of every position, cross entropy over all of them in the model's dtype."""
    scores: list[PairScore] = []
    for logits_BLV, labels_BL in padded_logits(model, pairs, batch_size):
        scores += answer_scores(logits_BLV, labels_BL)
    return scores


@torch.inference_mode()
def padded_logits(
    model: PreTrainedModel, pairs: Sequence[TokenPair], batch_size: int = 4
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of every position of a batch, and the labels they predict (shifted already)."""
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        ids_BL, mask_BL = _left_padded([(*prompt, *answer) for prompt, answer in batch], model.device)
        labels_BL = torch.full_like(ids_BL, IGNORED)
        for row, (_, answer) in enumerate(batch):
            labels_BL[row, -len(answer) :] = ids_BL[row, -len(answer) :]
        logits_BLV = _forward(model, ids_BL, mask_BL)
        yield logits_BLV[:, :-1], labels_BL[:, 1:]


def answer_scores(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> list[PairScore]:
    """Cross entropy of the labelled positions, and its mean per pair, in the dtype of the logits."""
    nll_BL = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), reduction="none", ignore_index=IGNORED)
    nll_BL = nll_BL.view(labels_BL.shape)
    answer_BL = labels_BL != IGNORED
    means = (-nll_BL.sum(dim=1) / answer_BL.sum(dim=1)).tolist()
    counts = answer_BL.sum(dim=1).tolist()
    tokens = (-nll_BL[answer_BL]).split(counts)
    return [PairScore(token.tolist(), mean) for token, mean in zip(tokens, means, strict=True)]


@torch.inference_mode()
def score_padded_tuned(model: PreTrainedModel, pairs: Sequence[TokenPair], batch_size: int) -> list[PairScore]:
    """Sorted by length (longest first), the last token not read, logits of the answers' positions only, in fp32."""
    size = lengths(pairs)
    order = sorted(range(len(pairs)), key=lambda index: -size[index])
    scores: list[PairScore | None] = [None] * len(pairs)
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        batch = [pairs[index] for index in indices]
        ids_BL, mask_BL = _left_padded([(*prompt, *answer[:-1]) for prompt, answer in batch], model.device)
        kept = max(len(answer) for _, answer in batch)
        labels_BK = torch.tensor([[IGNORED] * (kept - len(answer)) + list(answer) for _, answer in batch])
        logits_BKV = _forward(model, ids_BL, mask_BL, logits_to_keep=kept).float()
        for index, score in zip(indices, answer_scores(logits_BKV, labels_BK.to(model.device)), strict=True):
            scores[index] = score
    return [score for score in scores if score is not None]


def pick_batch_size(
    score: Callable[[int, Sequence[TokenPair]], object],
    pairs: Sequence[TokenPair],
    sizes: Sequence[int] = BATCH_SIZES,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[int, dict[int, float]]:
    """The batch size with which ``score(size, pairs)`` is fastest, and the seconds of each that fits.

    The better of two turns counts: a moment when the machine was busy must not decide. Sizes above the number of pairs
    are left out; so are those for which a GPU's memory is too small.
    """
    left = [size for size in sizes if size <= max(len(pairs), min(sizes))]
    seconds: dict[int, float] = {}
    with suppress(torch.OutOfMemoryError):
        score(min(sizes), pairs[: min(sizes)])  # warm-up
    for _ in range(2):
        for size in tuple(left):
            try:
                started = clock()
                score(size, pairs)
                seconds[size] = min(seconds.get(size, math.inf), clock() - started)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                left.remove(size)
    if not seconds:
        raise torch.OutOfMemoryError(f"no batch size of {', '.join(map(str, sizes))} fits")
    return min(seconds, key=lambda size: seconds[size]), seconds


def _forward(
    model: PreTrainedModel, ids_BL: torch.Tensor, mask_BL: torch.Tensor, logits_to_keep: int = 0
) -> torch.Tensor:
    # Positions counted from each row's first token: families with learned positions are scored right, too.
    position_ids_BL = (mask_BL.cumsum(dim=1) - 1).clamp_min(0)
    return model(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        position_ids=position_ids_BL,
        use_cache=False,
        logits_to_keep=logits_to_keep,
    ).logits


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids_BL = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask_BL = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids_BL.to(device), mask_BL.to(device)
