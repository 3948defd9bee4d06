"""Packed scores of every family against each pair alone in plain transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny_models import PACKED_FAMILIES, PADDED_FAMILIES, SEQ2SEQ_FAMILIES, VOCAB_SIZE, make_tiny_model
from truth import alone

from fastscore import Scorer


def token_pairs(seed: int, count: int = 14) -> list[tuple[list[int], list[int]]]:
    """Odd lengths from 1 up, beyond every tiny sliding window; ids from 3 (no special tokens).

    Half of the prompts begin like an earlier pair, some of them in the middle of its answer; the last is a duplicate.
    """
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, VOCAB_SIZE) for _ in range(length)]

    pairs: list[tuple[list[int], list[int]]] = []
    for _ in range(count):
        prompt, answer = draw.choice(pairs) if pairs and draw.random() < 0.5 else ([], [])
        earlier = prompt + answer
        shared = earlier[: draw.randint(0, len(earlier))]
        pairs.append((shared + ids(draw.choice([1, 2, 7, 23, 61])), ids(draw.choice([1, 2, 5]))))
    return [*pairs, pairs[0]]


def check_family(folder: Path, mode: str, max_batch_tokens: int = 100) -> None:
    pairs = token_pairs(seed=5)
    scorer = Scorer(str(folder), dtype="fp32", device="cpu", max_batch_tokens=max_batch_tokens)
    scores = scorer.score_tokens(pairs)
    assert scorer.describe()["mode"] == mode, scorer.describe()["mode_reason"]
    for score, truth in zip(scores, alone(folder, pairs), strict=True):
        assert score.token_logprobs == pytest.approx(truth, abs=1e-5)
        assert score.mean_logprob == pytest.approx(sum(truth) / len(truth), abs=1e-5)
    assert min(min(score.token_logprobs) for score in scores) < -3, "the model should be far from certain everywhere"


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_packed_equals_alone(family: str, tmp_path: Path) -> None:
    check_family(make_tiny_model(tmp_path / family, family), "packed")


@pytest.mark.parametrize("family", PADDED_FAMILIES)
def test_padded_equals_alone(family: str, tmp_path: Path) -> None:
    check_family(make_tiny_model(tmp_path / family, family), "padded")


@pytest.mark.parametrize("family", SEQ2SEQ_FAMILIES)
def test_encoder_decoder_equals_alone(family: str, tmp_path: Path) -> None:
    check_family(make_tiny_model(tmp_path / family, family), "encoder-decoder")
