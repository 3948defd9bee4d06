"""Linear layers in eight bits, by torchao: weights quantised once, activations at every product, a scale for each row.

The LM head and the embeddings stay as they are. What it costs in fidelity is measured by ``bench/fidelity.py``.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch

from fastscore.error_text import error_text
from fastscore.shards import is_distributed
from fastscore.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fastscore")

FP8_CAPABILITY = (8, 9)
"""The first CUDA devices that multiply fp8."""


def quantize_linears(model: PreTrainedModel, how: str) -> None:
    """Quantise the model in place. It is told how much torchao leaves as it is.

    Args:
        model: in bf16 or fp16 (``fp8``: in bf16), where it is to run.
        how: ``int8`` or ``fp8``.

    Raises:
        InputError: torchao is missing or fails, the model's dtype or device does not allow it, or nothing in the model
            can be quantised.
    """
    if how == "fp8" and model.dtype != torch.bfloat16:
        raise InputError(f"quantize fp8 needs a model in bf16; this one is in {model.dtype} (--dtype bf16)")
    if model.dtype not in (torch.bfloat16, torch.float16):
        raise InputError(f"quantize {how} needs a model in bf16 or fp16; this one is in {model.dtype} (--dtype bf16)")
    if how == "fp8" and not _multiplies_fp8(model.device):
        raise InputError(f"quantize fp8 needs a CUDA device of capability 8.9 or newer, not {model.device}")
    config, quantize_ = _torchao(how)
    head = model.get_output_embeddings()
    try:
        quantize_(model, config, filter_fn=lambda module, _: isinstance(module, torch.nn.Linear) and module is not head)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InputError(f"quantize {how}: torchao cannot on {model.device}: {error_text(error)}") from error
    share = _share_in_eight_bits(model, head)
    if share == 0:
        raise InputError(f"quantize {how}: torchao quantises no layer of {type(model).__name__}")
    level = logging.INFO if share > 0.99 else logging.WARNING  # routers of experts and the like are small
    logger.log(level, "quantize %s: %.0f%% of the weights of the model's layers are in eight bits", how, 100 * share)


def _share_in_eight_bits(model: PreTrainedModel, head: torch.nn.Module) -> float:
    """Of the matrices between the embeddings and the head."""
    quantized = total = 0
    for module in model.modules():
        if module is head or isinstance(module, torch.nn.Embedding):
            continue
        sizes = [weight.numel() for weight in module.parameters(recurse=False) if weight.dim() > 1]
        total += sum(sizes)
        quantized += sum(sizes) if is_quantized(module) else 0
    return quantized / max(1, total)


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether a linear layer's weight is one of torchao's tensors in place of a plain one."""
    if not isinstance(module, torch.nn.Linear):
        return False
    return type(module.weight.data) is not torch.Tensor and not is_distributed(module.weight)


def _multiplies_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def _torchao(how: str) -> tuple[Any, Any]:
    try:
        with warnings.catch_warnings():  # about CUDA libraries that a CPU has no use for
            warnings.simplefilter("ignore")
            from torchao import quantization
    except ImportError as error:
        raise InputError("--quantize needs the torchao package: pip install 'fastscore[quantize]'") from error
    if how == "int8":
        return quantization.Int8DynamicActivationInt8WeightConfig(), quantization.quantize_
    config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    return config, quantization.quantize_
