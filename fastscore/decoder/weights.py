"""What a decoder's forward pass needs of a Hugging Face model: weights, a few numbers, and no code of the model's own.

The query, key and value projections become one matrix, gate and up projections another (one product in place of
several). The model's own parameters are made views of the merged ones: it stays usable, and nothing is held twice.

Where several processes hold a model together, each has some of the heads and some of the feed-forward network's width.

Shapes: D hidden, H query heads, K key-value heads, d head size, F feed-forward size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastscore.quantize import is_quantized
from fastscore.shards import is_split, own_part, processes, with_own_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastscore.decoder.skeleton import Skeleton

LAYERS = {
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "SmolLM3DecoderLayer",
    "GraniteDecoderLayer",
    "Phi3DecoderLayer",
    "GemmaDecoderLayer",
    "Gemma2DecoderLayer",
    "Gemma3DecoderLayer",
}
"""Pre-norm layers of RMSNorm, rotary attention and a gated feed-forward network, with the options of :class:`Layer`."""
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


@dataclass(frozen=True, slots=True)
class Linear:
    """``x @ weight.T + bias``.

    packed: the weight once more, in the layout that a library multiplies fastest; gate and up projection apart.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    packed: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm: ``x / sqrt(mean(x^2) + eps) * weight``, the weight in fp32 and with Gemma's 1 added."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Norms that are None are left out."""

    attention_norm: Norm
    qkv: Linear
    """``[(H + 2K) d, D]``: queries, keys, values."""
    head_norms: tuple[Norm, Norm] | None
    """Of every query and every key head."""
    rotary: str | None
    """Which of the rotary tables; None for a layer without."""
    scaling: float
    sliding_window: int | None
    softcap: float | None
    output: Linear
    attention_post_norm: Norm | None
    feed_forward_norm: Norm
    gate_up: Linear
    """``[2F, D]``: gate, then up."""
    down: Linear
    feed_forward_post_norm: Norm | None


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model without its head. ``rotary_emb`` is the model's own module: positions to cosines and sines.

    dtype: of what products take and give; the weights' own, unless the operators widen them.
    num_heads, num_kv_heads: those of this process. group: the processes that hold the model together; what the output
        and the down projection give is to be summed over them. None where there is one.
    """

    embedding: torch.nn.Module
    embedding_scale: float
    rotary_emb: torch.nn.Module
    rotary_types: tuple[str, ...]
    """Names of the rotary tables; one empty name where there is only one table."""
    layers: tuple[Layer, ...]
    norm: Norm
    num_heads: int
    num_kv_heads: int
    head_size: int
    activation: str
    residual_scale: float
    dtype: torch.dtype
    group: Any = None


def read_decoder(model: PreTrainedModel | Skeleton, body: torch.nn.Module) -> Decoder | str:
    """The decoder in ``body``, the model without its head; or why it is none that is known here.

    Weights are merged in place, layer by layer. Whether the result computes the same is for a check to say, not for
    the names looked at here.
    """
    layers = getattr(body, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or not len(layers):
        return "its layers are not where they are looked for"
    names = {type(layer).__name__ for layer in layers}
    if not names <= LAYERS:
        return f"{', '.join(sorted(names - LAYERS))} is not among the layers known here"
    config = model.config.get_text_config()
    activation = ACTIVATIONS.get(getattr(config, "hidden_activation", None) or config.hidden_act)
    if activation is None:
        return f"its activation {config.hidden_act!r} is not known here"
    if any(_is_special(module) for module in body.modules()):
        return "its linear layers are not plain ones"
    if len({parameter.device for parameter in body.parameters()}) > 1:
        return "its layers are on several devices"
    parts, group = 1, None
    if any(map(is_split, layers.parameters())):
        if not all(map(_is_split_by_heads, layers)):
            return "its layers are not split by heads"
        group = processes(next(filter(is_split, layers.parameters())))
        parts = group.size()
    types = tuple(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    per_type = types if names == {"Gemma3DecoderLayer"} else ("",)
    return Decoder(
        embedding=body.embed_tokens,  # type: ignore[arg-type]
        embedding_scale=float(getattr(body, "embedding_multiplier", 1.0)),
        rotary_emb=body.rotary_emb,  # type: ignore[arg-type]
        rotary_types=per_type,
        layers=tuple(_read_layer(layer, per_type) for layer in layers),
        norm=_norm(body.norm),
        num_heads=config.num_attention_heads // parts,
        num_kv_heads=config.num_key_value_heads // parts,
        head_size=layers[0].self_attn.head_dim,  # type: ignore[union-attr, arg-type]
        activation=activation,
        residual_scale=float(getattr(config, "residual_multiplier", 1.0)),
        dtype=model.dtype,
        group=group,
    )


def _is_split_by_heads(layer: Any) -> bool:
    """Whether queries, keys, values, gate and up are split by what they give, and the two after them by what they take.
    Projections that a family has merged itself are split otherwise."""
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj") or hasattr(mlp, "gate_up_proj"):
        return False
    first = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
    return all(is_split(module.weight) for module in (*first, attention.o_proj, mlp.down_proj))


def _is_special(module: torch.nn.Module) -> bool:
    """A quantised or adapted linear layer, or one with a hook (accelerate's offloading)."""
    if hasattr(module, "_hf_hook"):
        return True
    return hasattr(module, "in_features") and (type(module) is not torch.nn.Linear or is_quantized(module))


def _read_layer(layer: Any, rotary_types: Sequence[str]) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    # Gemma 2 and 3 have four norms; the other families call the one before the feed-forward network "post attention".
    four = hasattr(layer, "pre_feedforward_layernorm")
    rotary: str | None = attention.layer_type if rotary_types != ("",) else ""
    if not getattr(attention, "use_rope", True):
        rotary = None
    window = getattr(attention, "sliding_window", None)
    if window is None and type(attention).__name__ in ("MistralAttention", "Phi3Attention"):
        window = getattr(attention.config, "sliding_window", None)
    return Layer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=_linear(attention.qkv_proj)
        if hasattr(attention, "qkv_proj")
        else _merge([attention.q_proj, attention.k_proj, attention.v_proj]),
        head_norms=(_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None,
        rotary=rotary,
        scaling=attention.scaling,
        sliding_window=window,
        softcap=getattr(attention, "attn_logit_softcapping", None),
        output=_summed_linear(attention.o_proj),
        attention_post_norm=_norm(layer.post_attention_layernorm) if four else None,
        feed_forward_norm=_norm(layer.pre_feedforward_layernorm if four else layer.post_attention_layernorm),
        gate_up=_linear(mlp.gate_up_proj) if hasattr(mlp, "gate_up_proj") else _merge([mlp.gate_proj, mlp.up_proj]),
        down=_summed_linear(mlp.down_proj),
        feed_forward_post_norm=_norm(layer.post_feedforward_layernorm) if four else None,
    )


def _norm(module: Any) -> Norm:
    weight = own_part(module.weight).detach().float()
    is_gemma = type(module).__name__.startswith("Gemma")
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(weight + 1.0 if is_gemma else weight, float(eps))


def _linear(module: Any) -> Linear:
    return Linear(own_part(module.weight).detach(), None if module.bias is None else own_part(module.bias).detach())


def _summed_linear(module: Any) -> Linear:
    """Where processes sum what theirs give, the bias is added by the first alone."""
    linear = _linear(module)
    if is_split(module.weight) and processes(module.weight).rank():
        return Linear(linear.weight, None)
    return linear


def _merge(modules: Sequence[Any]) -> Linear:
    """One matrix below another; each module's parameters become views of the result."""
    weight = _joined([module.weight for module in modules])
    biases = [module.bias for module in modules]
    return Linear(weight, None if biases[0] is None else _joined(biases))


def _joined(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    parts = [own_part(parameter) for parameter in parameters]
    base = parts[0]._base
    sizes = [len(part) for part in parts]
    if base is not None and len(base) == sum(sizes) and all(part._base is base for part in parts):  # merged before
        return base
    joined = torch.cat([part.detach() for part in parts])
    for parameter, part in zip(parameters, joined.split(sizes), strict=True):
        parameter.data = with_own_part(parameter, part)
    return joined
