"""A model that several processes hold together: whether it may be split, and that all of them run it alike.

transformers has a plan for many families; it has to fit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fastscore.language_model import LanguageModel
from fastscore.model_source import ModelSource
from fastscore.packed_forward import ModelForward
from fastscore.types import InputError

_BY_HEADS = ("q_proj", "k_proj")


def split_over_processes(source: ModelSource, hf_config: Any, device: torch.device) -> Any:
    """What transformers needs to load a part of the model into each process that torchrun started.

    Raises:
        InputError: there are no such processes, the family has no plan, or its numbers do not divide.
    """
    if not dist.is_initialized():
        raise InputError("tensor parallelism belongs to several processes: torchrun --nproc_per_node N -m fastscore")
    if source.gguf_file is not None:
        raise InputError("--tensor-parallel needs safetensors: a GGUF file is read whole by every process")
    if device.type == "cpu" and torch.cuda.is_available():
        raise InputError("--tensor-parallel uses the GPUs where there are any; found --device cpu")
    config, count = hf_config.get_text_config(), dist.get_world_size()
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise InputError(f"transformers has no plan for splitting {config.model_type} models over processes")
    styles = {name: style for name, style in plan.items() if name.endswith(_BY_HEADS)}
    if "colwise" in styles.values():
        for name in ("num_attention_heads", "num_key_value_heads"):
            if (heads := getattr(config, name, None) or config.num_attention_heads) % count:
                raise InputError(f"{name} is {heads}, which {count} processes cannot share evenly")
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise InputError("--tensor-parallel needs a newer transformers: pip install -U transformers") from error
    return DistributedConfig(tp_size=count)


def agree(model: LanguageModel) -> None:
    """See that every process runs the model in the same way, and take the smallest budget: all must cut the same packs.

    Raises:
        InputError: they do not (each has tried what its device can do); or scores would not be deterministic.
    """
    count = dist.get_world_size()
    if model.deterministic and count > 2 and isinstance(model.forward, ModelForward):
        # An all-reduce adds up in an order that depends on where a row lies; of two numbers there is only one sum.
        raise InputError(
            f"deterministic scores of {count} processes need fastscore's own forward pass; here run "
            f"{model.forward_name}"
        )
    provider = None if model.provider is None else model.provider.name
    way = model.mode, provider, model.forward_name, model.longest_packed
    ways: list[Any] = [None] * count
    dist.all_gather_object(ways, (way, model.max_batch_tokens))
    if len({other for other, _ in ways}) > 1:
        said = "; ".join(f"process {rank}: {', '.join(map(str, other))}" for rank, (other, _) in enumerate(ways))
        raise InputError(f"the processes would not run the model alike ({said}): their devices must be alike")
    model.max_batch_tokens = min(budget for _, budget in ways)
