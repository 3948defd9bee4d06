"""Who takes part in a comparison, on the same token ids: fastscore and the peers in plain transformers.

Peers in packages of their own are in ``peer_lm_eval.py`` and ``peer_vllm.py``.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from padded import BATCH_SIZES, pick_batch_size, score_padded, score_padded_tuned
from rounds import Timed
from transformers import AutoModelForCausalLM, PreTrainedModel
from workload import TokenPair, lengths, spread_sample

from fastscore import Scorer
from fastscore.devices import DTYPES

OURS, NO_TREE, PADDED, TUNED = "fastscore", "fastscore, no tree", "padded", "padded-tuned"

TokenLogprobs = list[list[float]]
"""Per pair the log-probabilities of its answer tokens in nats, or their sum alone (``Contender.sums_only``)."""

BATCH_SIZE_SAMPLE = 4 * max(BATCH_SIZES)
"""Pairs on which batch sizes are tried: enough that sorted neighbours are about as long as in the whole."""


class Unavailable(Exception):
    """A peer that cannot take part here, and what would let it."""


@dataclass(frozen=True, slots=True)
class Computed:
    """Tokens that went through the model; ``fill`` is their share of the packs' budgets or of the padded batches."""

    tokens: int
    fill: float


class Contender(ABC):
    """Scores pairs of token ids its own way."""

    name: str
    sums_only: ClassVar[bool] = False
    """Only the sum over an answer's tokens comes back."""
    scores_nothing: ClassVar[bool] = False
    """A limit, not a peer: the same tokens go through the model, and nobody asks for their log-probabilities."""

    def __init__(self) -> None:
        self.scores: TokenLogprobs = []
        """Of the last run."""

    @abstractmethod
    def score(self, pairs: Sequence[TokenPair]) -> Timed | None:
        """Fill ``scores``, in the order of the pairs; says how long that took where the wall clock would not know."""

    def computed(self, pairs: Sequence[TokenPair]) -> Computed | None:
        """What a run over the pairs computes, where that can be known. May look at the last run."""
        return None

    def settings(self) -> dict[str, Any]:
        """What it chose or was told, for the record."""
        return {}


class FastScore(Contender):
    """fastscore as a library; loaded when it first scores."""

    def __init__(self, scorer: Scorer, name: str = OURS) -> None:
        super().__init__()
        self.name, self.scorer = name, scorer
        self._last = (0, 0)

    def score(self, pairs: Sequence[TokenPair]) -> None:
        stats = self.scorer.stats
        before = stats.tokens_computed, stats.pack_tokens
        self.scores = [list(score.token_logprobs) for score in self.scorer.score_tokens(pairs)]
        self._last = stats.tokens_computed - before[0], stats.pack_tokens - before[1]

    def computed(self, pairs: Sequence[TokenPair]) -> Computed:
        tokens, budget = self._last
        return Computed(tokens, tokens / budget)

    def settings(self) -> dict[str, Any]:
        told = {key: value for key, value in self.scorer.describe().items() if key != "model_path"}
        # No folder of this machine: a model in memory is called by where it was loaded from.
        return {**told, "model": os.path.basename(told["model"]) if os.path.isabs(told["model"]) else told["model"]}

    def without_tree(self) -> FastScore:
        """A second contender around the same weights that computes every request by itself."""
        model = self.scorer.hugging_face_model()  # loaded again, where it was recalled without its code
        budget = self.scorer.load().max_batch_tokens
        scorer = Scorer.from_model(model, self.scorer.tokenizer, share_prefixes=False, max_batch_tokens=budget)
        return FastScore(scorer, NO_TREE)


class Padded(Contender):
    """The reference system's way: batches of four in file order."""

    name = PADDED
    batch_size = 4

    def __init__(self, plain: PreTrainedModel) -> None:
        super().__init__()
        self.plain = plain

    def score(self, pairs: Sequence[TokenPair]) -> None:
        self.scores = [score.token_logprobs for score in score_padded(self.plain, pairs, self.batch_size)]

    def computed(self, pairs: Sequence[TokenPair]) -> Computed:
        return padded_tokens(lengths(pairs), self.batch_size)

    def settings(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size}


class PaddedTuned(Contender):
    """A careful user's way; see :func:`padded.score_padded_tuned`."""

    name = TUNED

    def __init__(self, plain: PreTrainedModel, batch_size: int, batch_size_seconds: Mapping[int, float]) -> None:
        super().__init__()
        self.plain, self.batch_size, self.batch_size_seconds = plain, batch_size, batch_size_seconds

    @classmethod
    def picked(cls, plain: PreTrainedModel, pairs: Sequence[TokenPair]) -> PaddedTuned:
        """With the batch size that is fastest on a sample of the pairs."""
        sample = spread_sample(pairs, BATCH_SIZE_SAMPLE)
        return cls(plain, *pick_batch_size(lambda size, some: score_padded_tuned(plain, some, size), sample))

    def score(self, pairs: Sequence[TokenPair]) -> None:
        self.scores = [score.token_logprobs for score in score_padded_tuned(self.plain, pairs, self.batch_size)]

    def computed(self, pairs: Sequence[TokenPair]) -> Computed:
        return padded_tokens(sorted((length - 1 for length in lengths(pairs)), reverse=True), self.batch_size)

    def settings(self) -> dict[str, Any]:
        return batch_settings(self.batch_size, self.batch_size_seconds)


def batch_settings(batch_size: int, batch_size_seconds: Mapping[int, float]) -> dict[str, Any]:
    """A batch size and what it was chosen from (nothing where it was given)."""
    seconds = {str(size): value for size, value in batch_size_seconds.items()}
    return {"batch_size": batch_size, "batch_size_seconds": seconds}


def padded_tokens(sizes: Sequence[int], batch_size: int) -> Computed:
    """What batches of these sequences, in this order, make of them."""
    batches = [sizes[first : first + batch_size] for first in range(0, len(sizes), batch_size)]
    tokens = sum(max(batch) * len(batch) for batch in batches)
    return Computed(tokens, sum(sizes) / tokens)


def load_both(model: str, dtype: str, **options: Any) -> tuple[Scorer, PreTrainedModel]:
    """fastscore's side, and the same weights in plain transformers for the peers and the limit."""
    scorer = Scorer(model, dtype=dtype, **options)  # type: ignore[arg-type]
    loaded = scorer.load()
    plain = AutoModelForCausalLM.from_pretrained(scorer.model_path, dtype=loaded.dtype).eval()
    return scorer, plain.to(loaded.device)


def dtype_name(dtype: torch.dtype) -> str:
    """``fp32``, ``bf16`` or ``fp16``."""
    return next(name for name, known in DTYPES.items() if known == dtype)
