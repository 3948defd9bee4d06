"""What the hardware allows: the arithmetic that a task cannot do without, and the rate of the model's own GEMMs.

"Useful-FLOP efficiency" of a run is its useful work over (its time x that rate).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from workload import TokenPair

from fastscore.decoder import multiplies

GEMM, PACKED_GEMM, FP32_GEMM = "GEMM", "GEMM, packed weights", "GEMM in fp32, packed weights"


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
    skippable_flops: int
    """Part of the above: the last layer's work, keys and values aside, at tokens whose output nobody reads."""

    @property
    def flops(self) -> int:
        return self.linear_flops + self.head_flops + self.attention_flops


def useful_work(model: PreTrainedModel, pairs: Sequence[TokenPair]) -> UsefulWork:
    """Two operations for each weight of a linear layer and unique token, the LM head for the answer rows only.

    Attention is causal: the token at position p looks at p + 1 keys, for the scores and again for the values.

    Raises:
        ValueError: not a dense decoder whose layers are made of ``nn.Linear``.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    weights = sum(map(_linear_weights, _layers(model)))
    unique_tokens, keys_seen = _unique(pairs)
    answer_rows = sum(len(answer) for _, answer in pairs)
    attention_per_key = 4 * heads * head_size

    key_value_weights = 2 * config.num_key_value_heads * head_size * config.hidden_size
    last_layer = _linear_weights(_layers(model)[-1]) - key_value_weights
    # The token before an answer token is read; its position counted from one is the number of its keys.
    keys_read = sum(sum(range(len(prompt), len(prompt) + len(answer))) for prompt, answer in pairs)
    skippable_tokens, skippable_keys = max(0, unique_tokens - answer_rows), max(0, keys_seen - keys_read)
    return UsefulWork(
        unique_tokens=unique_tokens,
        answer_rows=answer_rows,
        linear_flops=2 * weights * unique_tokens,
        head_flops=2 * model.get_output_embeddings().weight.numel() * answer_rows,
        attention_flops=attention_per_key * config.num_hidden_layers * keys_seen,
        skippable_flops=2 * last_layer * skippable_tokens + attention_per_key * skippable_keys,
    )


@dataclass(frozen=True, slots=True)
class LayerGemms:
    """The matrix products of decoder layers, with the model's own weights, and nothing else."""

    flops: int
    runs: Mapping[str, Callable[[], None]]
    """Ways to run them, all of the same work. The fastest is the limit."""


def layer_gemms(model: PreTrainedModel, rows: int, repeats: int) -> LayerGemms:
    """Over ``rows`` tokens. Layers change with each repeat, so that weights come from memory, as in the model."""
    by_layer = [[m.weight for m in layer.modules() if isinstance(m, nn.Linear)] for layer in _layers(model)]
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

    runs: dict[str, Callable[[], None]] = {GEMM: run}
    if model.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # As oneDNN likes them best: a few percent faster than F.linear, which reorders weights in every call. In fp32
        # where the CPU has no instructions for the model's dtype: widening is not part of the limit.
        own = model.dtype if multiplies(model.device, model.dtype) else torch.float32
        reorder = torch.ops.mkldnn._reorder_linear_weight
        packed = [[(reorder(weight.detach().to(own), rows), weight.shape[1]) for weight in layer] for layer in chosen]
        rows_of = {width: input_RD.to(own) for width, input_RD in inputs.items()}

        @torch.inference_mode()
        def run_packed() -> None:
            for layer in packed:
                for weight, width in layer:
                    torch.ops.mkldnn._linear_pointwise(rows_of[width], weight, None, "none", [], "")

        runs[PACKED_GEMM if own == model.dtype else FP32_GEMM] = run_packed
    return LayerGemms(2 * rows * sum(weight.numel() for weights in chosen for weight in weights), runs)


def _layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    layers = list(getattr(model.base_model, "layers", ()))
    if not layers or not all(map(_linear_weights, layers)):
        raise ValueError(f"{type(model).__name__} is no decoder whose layers are made of nn.Linear")
    return layers


def _linear_weights(layer: nn.Module) -> int:
    return sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))


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
