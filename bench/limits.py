"""What the hardware allows: the arithmetic that a task cannot do without, and the rate of the model's own GEMMs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from workload import TokenPair


@dataclass(frozen=True, slots=True)
class UsefulWork:
    """Floating-point operations with every prefix that requests share computed once, and no padding.

    ``unique_tokens`` are the input tokens (a last answer token is never read) with a different history each.
    """

    unique_tokens: int
    answer_rows: int
    linear_flops: int
    head_flops: int
    attention_flops: int

    @property
    def flops(self) -> int:
        return self.linear_flops + self.head_flops + self.attention_flops


def useful_work(model: PreTrainedModel, pairs: Sequence[TokenPair]) -> UsefulWork:
    """Two operations for each weight of a linear layer and unique token, the LM head for the answer rows only.

    Attention is causal: the token at position p looks at p + 1 keys, for the scores and again for the values. For
    dense decoders with full attention.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    unique_tokens, keys_seen = _unique(pairs)
    weights = sum(layer.weight.numel() for layer in model.base_model.modules() if isinstance(layer, nn.Linear))
    answer_rows = sum(len(answer) for _, answer in pairs)
    return UsefulWork(
        unique_tokens=unique_tokens,
        answer_rows=answer_rows,
        linear_flops=2 * weights * unique_tokens,
        head_flops=2 * model.get_output_embeddings().weight.numel() * answer_rows,
        attention_flops=4 * config.num_hidden_layers * heads * head_size * keys_seen,
    )


@dataclass(frozen=True, slots=True)
class LayerGemms:
    """The matrix products of one decoder layer, with the model's own weights, over ``rows`` tokens."""

    flops: int
    run: Callable[[], None]


def layer_gemms(model: PreTrainedModel, rows: int, repeats: int) -> LayerGemms:
    """Layers change with each repeat, so that weights come from memory as they do in the model."""
    by_layer = [[m.weight for m in layer.modules() if isinstance(m, nn.Linear)] for layer in model.base_model.layers]
    chosen = [by_layer[repeat % len(by_layer)] for repeat in range(repeats)]
    inputs = {
        weight.shape[1]: torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
        for weight in chosen[0]
    }

    @torch.inference_mode()
    def run() -> None:
        for weights in chosen:
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)

    return LayerGemms(2 * rows * sum(weight.numel() for weights in chosen for weight in weights), run)


def _unique(pairs: Sequence[TokenPair]) -> tuple[int, int]:
    """Tokens with a different history each, and how many keys they look at together.

    In sorted order a sequence shares its longest known prefix with the one before it.
    """
    tokens = keys = 0
    before: tuple[int, ...] = ()
    for sequence in sorted((*prompt, *answer[:-1]) for prompt, answer in pairs):
        shared = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(before, sequence, strict=False)))
        tokens += len(sequence) - shared
        keys += (len(sequence) * (len(sequence) + 1) - shared * (shared + 1)) // 2
        before = sequence
    return tokens, keys
