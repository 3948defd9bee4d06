"""A sample of the packs that a file's requests make, and what it says about all of them.

A pack of the sample is a run of neighbours in the order of the prefix tree: prompts in it share what they share in the
whole. The time of the whole is a ratio estimate (Cochran, Sampling Techniques, 1977, chapter 6), and its interval
comes from how much the packs differ; it knows nothing of a device that becomes slower.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist

from fastscore.types import ScoringRequest

CONFIDENCE = 0.95


@dataclass(slots=True)
class Sample:
    """Packs that were run: their tokens and seconds."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_token(self) -> float:
        """Mean over the tokens of the sample."""
        return sum(self.seconds) / sum(self.tokens)

    def half_width(self, packs: int) -> float | None:
        """Half the confidence interval of ``seconds_per_token``, for a sample out of so many packs.

        None for fewer than three packs that are not all.
        """
        count = len(self.tokens)
        if count >= packs:
            return 0.0
        if count < 3:
            return None
        ratio = self.seconds_per_token
        residual = sum((s - ratio * t) ** 2 for t, s in zip(self.tokens, self.seconds, strict=True))
        variance = (1 - count / packs) * residual / (count - 1) / count
        return student_t(CONFIDENCE, count - 1) * math.sqrt(variance) * count / sum(self.tokens)


def cut_packs(requests: Sequence[ScoringRequest], max_tokens: int, shares: bool) -> Iterator[list[ScoringRequest]]:
    """The requests in runs of neighbours: as many as have ``max_tokens`` tokens to be computed, or one that has more.

    Where prefixes are shared, neighbours are those in the order of the tree; otherwise those of like length.
    """
    if shares:
        ordered = sorted(requests, key=lambda request: request.token_ids)
        shared = [0, *(_common(one.token_ids, other.token_ids) for one, other in pairwise(ordered))]
    else:
        ordered = sorted(requests, key=lambda request: len(request.token_ids), reverse=True)
        shared = [0] * len(ordered)
    pack: list[ScoringRequest] = []
    size = 0
    for request, common in zip(ordered, shared, strict=True):
        length = len(request.token_ids) - 1
        new = length - common
        if pack and size + new > max_tokens:
            yield pack
            pack, size, new = [], 0, length
        pack.append(request)
        size += new
    if pack:
        yield pack


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many first tokens are the same, the last of each left out: it is only predicted."""
    limit = min(len(one), len(other)) - 1
    return bisect_left(range(1, limit + 1), True, key=lambda length: one[:length] != other[:length])


def student_t(confidence: float, degrees: int) -> float:
    """Two-sided quantile of Student's t (Abramowitz and Stegun 26.7.5); 3% too small for two degrees, 1% for three."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))
