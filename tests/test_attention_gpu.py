"""Attention providers on a GPU, against fp64 on the CPU; and deterministic scores there."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_truth import OPTIONS, inputs, packs_of, truth
from tiny_models import VOCAB_SIZE, make_tiny_model

from fastscore import Scorer
from fastscore.attention import PROVIDERS, AttentionNeeds
from fastscore.types import ScoringRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def long_requests() -> list[ScoringRequest]:
    """Stems longer than a rectangle needs, branches at several depths, lone requests."""
    draw = random.Random(7)
    stems = [[draw.randrange(100) for _ in range(length)] for length in (300, 700, 40)]
    made = []
    for index in range(24):
        tokens = [*stems[index % 3], *(stems[2] if index % 2 else [])]
        tokens += [draw.randrange(100) for _ in range(draw.randint(1, 60))]
        made.append(ScoringRequest(tuple(tokens), len(tokens) - 1))
    return made


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_are_as_near_to_the_truth_as_the_reference(name: str, dtype: torch.dtype, options: str) -> None:
    asked: dict[str, Any] = {"sliding_window": None, "softcap": None, "sinks": None, "scaling": 0.125} | OPTIONS[
        options
    ]
    needs = AttentionNeeds(
        "cuda",
        str(dtype).removeprefix("torch."),
        64,
        64,
        sliding_window=asked["sliding_window"] is not None,
        softcap=asked["softcap"] is not None,
        sinks=asked["sinks"] is not None,
        deterministic=name == "blocked",
    )
    if reason := PROVIDERS[name].unusable(needs):
        pytest.skip(reason)
    on_device = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in asked.items()}
    for size in (10_000, 500):
        for pack in packs_of(long_requests(), size):
            tensors = inputs(pack, dtype, heads=8, kv_heads=2, size=64)
            expected = truth(*tensors, pack, **asked)
            there, moved = pack.to(torch.device("cuda")), [tensor.cuda() for tensor in tensors]
            own, plain = (
                (PROVIDERS[each].load()(*moved, there, **on_device).double().cpu() - expected).abs().max()
                for each in (name, "reference")
            )
            assert own <= 2 * plain + torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_deterministic_scores_are_bitwise_the_same(dtype: Any, family: str, tmp_path: Path) -> None:
    """Whatever the order and the neighbours."""
    folder = make_tiny_model(tmp_path / family, family, hidden_size=512, head_dim=64)
    draw = random.Random(3)
    stems = [[draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (30, 90, 150)]
    pairs = [([*draw.choice(stems), draw.randrange(3, VOCAB_SIZE)], [draw.randrange(3, VOCAB_SIZE)]) for _ in range(40)]
    scorer = Scorer(str(folder), dtype=dtype, device="cuda", deterministic=True)
    first = scorer.score_tokens(pairs)
    for _ in range(5):
        chosen = draw.sample(range(len(pairs)), draw.randint(1, len(pairs)))
        for index, score in zip(chosen, scorer.score_tokens([pairs[index] for index in chosen]), strict=True):
            assert score == first[index]
