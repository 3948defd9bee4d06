"""The work between a decoder's products, in plain PyTorch; and what can be fused with a product, or with itself.

Shapes: T tokens, D hidden, h heads (queries' and keys' together), H query heads, d head size, r the part of it that
turns, F feed-forward size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastscore.decoder.instructions import multiplies
from fastscore.decoder.weights import Decoder, Linear, Norm


class Table(NamedTuple):
    """Cosines and sines ``[T, 1, r]`` of every token's position, fp32; the two halves of r are alike.

    turn_T1c: one half of them as complex numbers, for operators that turn their heads so.
    """

    cos_T1r: torch.Tensor
    sin_T1r: torch.Tensor
    turn_T1c: torch.Tensor | None = None


class Operators:
    """Plain PyTorch, for every device and dtype.

    residual_dtype: of the residual stream.
    wide: whether attention takes queries and keys in fp32, as they come from their rotation.
    widened: whether products are made in fp32 whatever the weights' dtype. Each weight is widened when it is needed, so
        that memory holds it as it was loaded.
    """

    description = "plain PyTorch"

    def __init__(self, residual_dtype: torch.dtype, wide: bool, *, widened: bool = False) -> None:
        self.residual_dtype = residual_dtype
        self._wide = wide
        self._widened = widened
        if widened:
            self.description += ", products in float32"

    def prepare(self, decoder: Decoder) -> Decoder:
        """The decoder with its weights as these operators want them."""
        return replace(decoder, dtype=torch.float32) if self._widened else decoder

    def embed(self, decoder: Decoder, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Embeddings in the residual's dtype."""
        # A copy, even where the dtype stays: the residual is added to in place.
        hidden_TD: torch.Tensor = decoder.embedding(token_ids_T).to(self.residual_dtype, copy=True)
        return hidden_TD if decoder.embedding_scale == 1.0 else hidden_TD.mul_(decoder.embedding_scale)

    def rotary_tables(self, decoder: Decoder, position_ids_T: torch.Tensor) -> dict[str, Table]:
        """By the model's own module, which knows every way of stretching positions; asked in fp32."""
        like = torch.empty(0, dtype=torch.float32, device=position_ids_T.device)
        tables = {}
        for name in decoder.rotary_types:
            cos_1Tr, sin_1Tr = decoder.rotary_emb(like, position_ids_T[None], *([name] if name else []))
            tables[name] = Table(cos_1Tr[0, :, None], sin_1Tr[0, :, None])
        return tables

    def norm(self, hidden_TD: torch.Tensor, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
        """RMSNorm in fp32, rounded once."""
        return rms_norm(hidden_TD, norm.weight, norm.eps).to(dtype)

    def linear(self, hidden_TD: torch.Tensor, linear: Linear) -> torch.Tensor:
        """The product in the weights' dtype, or in fp32 where they are widened; rounded to it."""
        if not self._widened:
            return F.linear(hidden_TD, linear.weight, linear.bias)
        return F.linear(hidden_TD, linear.weight.float(), None if linear.bias is None else linear.bias.float())

    def rotate(
        self, heads_Thd: torch.Tensor, num_heads: int, norms: tuple[Norm, Norm] | None, table: Table | None
    ) -> torch.Tensor:
        """Queries (the first ``num_heads``) and keys, normed where the family does, turned by their positions."""
        turned_Thd = normed_heads(heads_Thd.float(), num_heads, norms)
        if table is not None:
            turned_Thd = turn(turned_Thd, table.cos_T1r, table.sin_T1r)
        return turned_Thd if self._wide else turned_Thd.to(heads_Thd.dtype)

    def gated(self, hidden_TD: torch.Tensor, gate_up: Linear, activation: str) -> torch.Tensor:
        """``activation(gate) * up``, ``[T, F]``."""
        return gate(self.linear(hidden_TD, gate_up), activation)

    def add(self, residual_TD: torch.Tensor, delta_TD: torch.Tensor, norm: Norm | None, scale: float) -> torch.Tensor:
        """The residual with ``scale * norm(delta)`` added, in place."""
        if norm is not None:
            delta_TD = rms_norm(delta_TD, norm.weight, norm.eps)
        return residual_TD.add_(delta_TD, alpha=scale)


class PackedOperators(Operators):
    """bf16 on a CPU: weights in oneDNN's own layout, and the activation and the product with the gate applied to sums
    that are still in fp32. Entries of a head that turn together lie side by side, as a complex number's parts do: one
    product turns them."""

    description = "weights packed by oneDNN"

    def prepare(self, decoder: Decoder) -> Decoder:
        paired = _turns_whole_heads(super().rotary_tables(decoder, torch.zeros(1, dtype=torch.int64)), decoder)
        layers = [
            replace(
                layer,
                qkv=_packed_pairs(layer.qkv, decoder) if paired else _packed(layer.qkv),
                head_norms=_paired_norms(layer.head_norms) if paired else layer.head_norms,
                output=_packed(layer.output),
                gate_up=_packed(layer.gate_up, parts=2),
                down=_packed(layer.down),
            )
            for layer in decoder.layers
        ]
        return replace(decoder, layers=tuple(layers))

    def rotary_tables(self, decoder: Decoder, position_ids_T: torch.Tensor) -> dict[str, Table]:
        tables = super().rotary_tables(decoder, position_ids_T)
        if not _turns_whole_heads(tables, decoder):
            return tables
        half = decoder.head_size // 2
        return {
            name: Table(cos, sin, torch.complex(cos[..., :half].contiguous(), sin[..., :half].contiguous()))
            for name, (cos, sin, _) in tables.items()
        }

    def rotate(
        self, heads_Thd: torch.Tensor, num_heads: int, norms: tuple[Norm, Norm] | None, table: Table | None
    ) -> torch.Tensor:
        if table is None or table.turn_T1c is None:
            return super().rotate(heads_Thd, num_heads, norms, table)
        turned_Thd = normed_heads(heads_Thd.to(torch.float32, copy=True), num_heads, norms).contiguous()
        torch.view_as_complex(turned_Thd.unflatten(2, (-1, 2))).mul_(table.turn_T1c)
        return turned_Thd if self._wide else turned_Thd.to(heads_Thd.dtype)

    def norm(self, hidden_TD: torch.Tensor, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
        # PyTorch's RMSNorm writes the squares to memory before it sums them; its norm of a row does not.
        hidden_TD = hidden_TD.float()
        rms_T1 = torch.linalg.vector_norm(hidden_TD, dim=1, keepdim=True) * hidden_TD.shape[1] ** -0.5
        return (hidden_TD * rms_T1.square_().add_(norm.eps).rsqrt_()).mul_(norm.weight).to(dtype)

    def linear(self, hidden_TD: torch.Tensor, linear: Linear) -> torch.Tensor:
        out_TD: torch.Tensor = _pointwise()(hidden_TD, linear.packed[0], linear.bias, "none", [], "")
        return out_TD

    def gated(self, hidden_TD: torch.Tensor, gate_up: Linear, activation: str) -> torch.Tensor:
        name, algorithm = {"silu": ("swish", ""), "gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none")}[activation]
        gate_FD, up_FD = gate_up.packed
        gate_F, up_F = (None, None) if gate_up.bias is None else gate_up.bias.chunk(2)
        gate_TF = _pointwise()(hidden_TD, gate_FD, gate_F, name, [], algorithm)
        gated_TF: torch.Tensor = _pointwise().binary(hidden_TD, gate_TF, up_FD, up_F, "mul")
        return gated_TF


class CompiledOperators(Operators):
    """The plain functions through ``torch.compile``: one kernel for each, whatever the number of tokens."""

    description = "compiled"

    def __init__(self, residual_dtype: torch.dtype, wide: bool, *, widened: bool = False) -> None:
        super().__init__(residual_dtype, wide, widened=widened)
        self._norm, self._gate = _compiled(_rounded_norm), _compiled(gate)
        self._turn = _compiled(_rounded_turn)

    def norm(self, hidden_TD: torch.Tensor, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
        return self._norm(hidden_TD, norm.weight, norm.eps, dtype)

    def rotate(
        self, heads_Thd: torch.Tensor, num_heads: int, norms: tuple[Norm, Norm] | None, table: Table | None
    ) -> torch.Tensor:
        if norms is not None or table is None:
            return super().rotate(heads_Thd, num_heads, norms, table)
        return self._turn(heads_Thd, table.cos_T1r, table.sin_T1r, torch.float32 if self._wide else heads_Thd.dtype)

    def gated(self, hidden_TD: torch.Tensor, gate_up: Linear, activation: str) -> torch.Tensor:
        return self._gate(self.linear(hidden_TD, gate_up), activation)


def rms_norm(hidden_TD: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension; in fp32 whatever comes in."""
    return F.rms_norm(hidden_TD.float(), weight.shape, weight, eps)


def normed_heads(heads_Thd: torch.Tensor, num_heads: int, norms: tuple[Norm, Norm] | None) -> torch.Tensor:
    """Queries (the first ``num_heads``) by the first norm, keys by the second."""
    if norms is None:
        return heads_Thd
    parts = (heads_Thd[:, :num_heads], heads_Thd[:, num_heads:])
    return torch.cat([rms_norm(part, norm.weight, norm.eps) for part, norm in zip(parts, norms, strict=True)], dim=1)


def turn(heads_Thd: torch.Tensor, cos_T1r: torch.Tensor, sin_T1r: torch.Tensor) -> torch.Tensor:
    """The first r entries of every head turned, each of the first half together with its fellow in the second; fp32."""
    size = cos_T1r.shape[2]
    half = size // 2
    turning_Thr = heads_Thd[..., :size].float()
    turned_Thr = turning_Thr * cos_T1r
    turned_Thr[..., :half].addcmul_(turning_Thr[..., half:], sin_T1r[..., :half], value=-1)
    turned_Thr[..., half:].addcmul_(turning_Thr[..., :half], sin_T1r[..., half:])
    if size == heads_Thd.shape[2]:
        return turned_Thr
    return torch.cat([turned_Thr, heads_Thd[..., size:].float()], dim=2)


def gate(gate_up_T2F: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) * up`` in the dtype of its input."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=1)
    if activation == "silu":
        return F.silu(gate_TF) * up_TF
    return F.gelu(gate_TF, approximate="tanh" if activation == "gelu_tanh" else "none") * up_TF


def choose_operators(
    device: torch.device, dtype: torch.dtype, residual_dtype: torch.dtype, *, wide: bool, compiled: bool
) -> Operators:
    """What is fastest on that device. ``compiled`` takes torch.compile."""
    # Without instructions for them, products of 16-bit operands take a CPU several times as long as those of fp32.
    widened = device.type == "cpu" and not multiplies(device, dtype)
    if compiled:
        return CompiledOperators(residual_dtype, wide, widened=widened)
    if device.type == "cpu" and dtype == torch.bfloat16 and packing_works():
        return PackedOperators(residual_dtype, wide)
    return Operators(residual_dtype, wide, widened=widened)


def packing_works() -> bool:
    """Whether this PyTorch has oneDNN's layout for bf16 weights, and this CPU the instructions that it is read with."""
    return multiplies(torch.device("cpu"), torch.bfloat16) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _packed(linear: Linear, parts: int = 1) -> Linear:
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return replace(linear, packed=tuple(reorder(part.contiguous()) for part in linear.weight.chunk(parts)))


def _turns_whole_heads(tables: dict[str, Table], decoder: Decoder) -> bool:
    """In every layer that turns them at all."""
    return all(table.cos_T1r.shape[2] == decoder.head_size for table in tables.values())


def _packed_pairs(qkv: Linear, decoder: Decoder) -> Linear:
    """As :func:`_packed`, with the entries of queries and keys in another order: products of the two stay the same."""
    num_turning = decoder.num_heads + decoder.num_kv_heads

    def paired(rows: torch.Tensor) -> torch.Tensor:
        rows_hd = rows.unflatten(0, (-1, decoder.head_size))
        return torch.cat([_pairs(rows_hd[:num_turning]), rows_hd[num_turning:]]).flatten(0, 1)

    bias = None if qkv.bias is None else paired(qkv.bias)
    return replace(qkv, bias=bias, packed=_packed(replace(qkv, weight=paired(qkv.weight))).packed)


def _paired_norms(norms: tuple[Norm, Norm] | None) -> tuple[Norm, Norm] | None:
    if norms is None:
        return None
    query, key = (replace(norm, weight=_pairs(norm.weight[None])[0]) for norm in norms)
    return query, key


def _pairs(heads_hd: torch.Tensor) -> torch.Tensor:
    """Entry i of every head's first half, then i of the second, and so on."""
    return heads_hd.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _pointwise() -> Any:
    """A product with something applied to it. Private in PyTorch: what its own compiler calls on a CPU."""
    return torch.ops.mkldnn._linear_pointwise


def _rounded_norm(hidden_TD: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    return rms_norm(hidden_TD, weight, eps).to(dtype)


def _rounded_turn(
    heads_Thd: torch.Tensor, cos_T1r: torch.Tensor, sin_T1r: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return turn(heads_Thd, cos_T1r, sin_T1r).to(dtype)


def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    # Sizes differ from pack to pack: one kernel for all of them.
    compiled: Callable[..., torch.Tensor] = torch.compile(function, dynamic=True)
    return compiled
