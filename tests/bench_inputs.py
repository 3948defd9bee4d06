"""What the tests of the benchmarks score, and the plain models they compare with."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

from workload import TokenPair


def random_pairs(seed: int, count: int = 11, alphabet: int = 512) -> list[TokenPair]:
    """Short prompts and answers of odd lengths."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(alphabet) for _ in range(length))

    return [(ids(draw.choice([1, 2, 9, 40])), ids(draw.choice([1, 2, 6]))) for _ in range(count)]


def load(folder: Path) -> PreTrainedModel:
    """In fp32, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
