"""What one part of the vocabulary contributes to an answer's NLL, and how the parts come together.

Shapes: A answer rows, J targets per row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Partials(NamedTuple):
    """Sufficient statistics of the logits of one part of the vocabulary (a tile, a split, a device's shard).

    best_A: largest logit, fp32; -inf where the part holds nothing but -inf.
    sumexp_A: sum of exp(logit - best), fp32; 0 where best is -inf.
    target_logit_AJ: logit of each target inside the part, -inf for one outside; fp32.
    top1_A: lowest token id among those with the largest logit, int64, counted over the whole vocabulary.
    """

    best_A: torch.Tensor
    sumexp_A: torch.Tensor
    target_logit_AJ: torch.Tensor
    top1_A: torch.Tensor


def combine_partials(parts: Sequence[Partials]) -> Partials:
    """The statistics of the union of disjoint parts. Sums run in the order of ``parts``; ties go to the lowest token.

    Raises:
        ValueError: no parts.

    Source: the online softmax's rescaling (Milakov and Gimelshein, 2018).
    """
    if not parts:
        raise ValueError("combine_partials needs at least one part")
    best_PA = torch.stack([part.best_A for part in parts])
    best_A = best_PA.amax(dim=0)
    shift_A = torch.where(best_A.isneginf(), torch.zeros_like(best_A), best_A)
    sumexp_A = torch.zeros_like(best_A)
    for part in parts:
        sumexp_A = sumexp_A + part.sumexp_A * (part.best_A - shift_A).exp()
    no_token = torch.iinfo(torch.int64).max
    top1_A = torch.stack([part.top1_A for part in parts]).where(best_PA == best_A, no_token).amin(dim=0)
    target_logit_AJ = torch.stack([part.target_logit_AJ for part in parts]).amax(dim=0)
    return Partials(best_A, sumexp_A, target_logit_AJ, top1_A)


def nll_from_partials(partials: Partials) -> torch.Tensor:
    """``[A, J]`` NLL in nats from the statistics of the whole vocabulary.

    The maximum is taken from the target first: both are large where logits are, and their difference is exact.
    """
    return (partials.best_A[:, None] - partials.target_logit_AJ) + partials.sumexp_A.log()[:, None]
