"""The forward pass of a decoder over a pack.

The residual stream, norms and rotary embeddings are in fp32 around products in the model's dtype (or in fp32, see
:class:`~fastscore.decoder.operators.Operators`): what a product gives is rounded once, and sums over layers are not
rounded at all. In the last layer the output projection and the
feed-forward network run for those rows alone that somebody asks for.

Shapes: T packed tokens, C carried keys, A rows that are asked for, D hidden, H query heads, K key-value heads, d head
size, F feed-forward size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastscore.attention import Attend
from fastscore.decoder.operators import Operators, Table
from fastscore.decoder.weights import Decoder, Layer
from fastscore.types import CarriedKeys, PackedBatch


@dataclass(frozen=True, slots=True)
class OwnForward:
    """A decoder, what runs it, and the attention between."""

    decoder: Decoder
    operators: Operators
    attend: Attend
    in_order: bool = False
    """Sums over processes are made in the order of the processes, whatever a row's place in its pack."""

    def __call__(
        self, pack: PackedBatch, carried: CarriedKeys, rows_A: torch.Tensor | None
    ) -> tuple[torch.Tensor, CarriedKeys]:
        """Hidden states ``[A, D]`` of those rows (``[T, D]`` of all where None) after the last norm, and the keys and
        values that the next pack needs. ``carried`` comes from the pack before."""
        decoder, operators = self.decoder, self.operators
        residual_TD = operators.embed(decoder, pack.token_ids_T)
        tables = operators.rotary_tables(decoder, pack.position_ids_T)
        carry: CarriedKeys = []
        for index, layer in enumerate(decoder.layers):
            normed_TD = operators.norm(residual_TD, layer.attention_norm, decoder.dtype)
            query_THd, key_TKd, value_TKd = self._heads(layer, normed_TD, tables)
            if pack.num_carried:
                key_CKd, value_CKd = carried[index]
                key_TKd, value_TKd = torch.cat([key_CKd, key_TKd]), torch.cat([value_CKd, value_TKd])
            carry.append((key_TKd[pack.carry_rows], value_TKd[pack.carry_rows]))
            out_THd = self.attend(
                query_THd,
                key_TKd,
                value_TKd,
                pack,
                scaling=layer.scaling,
                sliding_window=layer.sliding_window,
                softcap=layer.softcap,
                sinks=None,
            )
            if rows_A is not None and index == len(decoder.layers) - 1:
                out_THd, residual_TD = out_THd[rows_A], residual_TD[rows_A]
            delta_TD = self._summed(operators.linear(out_THd.flatten(1), layer.output))
            residual_TD = operators.add(residual_TD, delta_TD, layer.attention_post_norm, decoder.residual_scale)
            normed_TD = operators.norm(residual_TD, layer.feed_forward_norm, decoder.dtype)
            gated_TF = operators.gated(normed_TD, layer.gate_up, decoder.activation)
            delta_TD = self._summed(operators.linear(gated_TF, layer.down))
            residual_TD = operators.add(residual_TD, delta_TD, layer.feed_forward_post_norm, decoder.residual_scale)
        return operators.norm(residual_TD, decoder.norm, decoder.dtype), carry

    def _summed(self, delta_TD: torch.Tensor) -> torch.Tensor:
        """Over the processes that hold the model together, each of which has a part of every sum."""
        group = self.decoder.group
        if group is None:
            return delta_TD
        if not self.in_order:
            dist.all_reduce(delta_TD, group=group)
            return delta_TD
        parts = [torch.empty_like(delta_TD) for _ in range(group.size())]
        dist.all_gather(parts, delta_TD.contiguous(), group=group)
        total_TD = parts[0].float()
        for part_TD in parts[1:]:
            total_TD += part_TD
        return total_TD.to(delta_TD.dtype)

    def _heads(
        self, layer: Layer, normed_TD: torch.Tensor, tables: dict[str, Table]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys, turned by their positions, and values."""
        num_heads, num_kv_heads = self.decoder.num_heads, self.decoder.num_kv_heads
        heads_Thd = self.operators.linear(normed_TD, layer.qkv).unflatten(1, (-1, self.decoder.head_size))
        turned_Thd, value_TKd = heads_Thd.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
        table = None if layer.rotary is None else tables[layer.rotary]
        turned_Thd = self.operators.rotate(turned_Thd, num_heads, layer.head_norms, table)
        return turned_Thd[:, :num_heads], turned_Thd[:, num_heads:], value_TKd
