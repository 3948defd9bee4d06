"""A Hugging Face model's own forward pass: over packs through its attention interface, or over padded batches.

Shapes: T packed tokens, A rows that are asked for, C keys carried into a pack, D hidden, H heads, K key-value heads, d
head size, B batch, L padded length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from fastscore.attention import Attend
from fastscore.types import CarriedKeys, PackedBatch, PaddedBatch, Seq2SeqBatch

ATTENTION_NAME = "fastscore_packed"


@dataclass(slots=True)
class _Passage:
    """What travels through the model's keyword arguments to its attention layers."""

    pack: PackedBatch
    attend: Attend
    carried: CarriedKeys
    """From the pack before; empty where nothing was carried."""
    carry: CarriedKeys = field(default_factory=list)
    """For the next pack; grows by one entry with every attention call."""


def _packed_attention(
    module: torch.nn.Module,
    query_1HTd: torch.Tensor,
    key_1KTd: torch.Tensor,
    value_1KTd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: _Passage,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The function that the model's attention layers call; ``[1, T, H, d]`` back, as they expect."""
    key_TKd, value_TKd = key_1KTd[0].transpose(0, 1), value_1KTd[0].transpose(0, 1)
    if packed.carried:
        key_CKd, value_CKd = packed.carried[len(packed.carry)]
        key_TKd, value_TKd = torch.cat([key_CKd, key_TKd]), torch.cat([value_CKd, value_TKd])
    rows = packed.pack.carry_rows
    packed.carry.append((key_TKd[rows], value_TKd[rows]))
    out_THd = packed.attend(
        query_1HTd[0].transpose(0, 1),
        key_TKd,
        value_TKd,
        packed.pack,
        scaling=query_1HTd.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out_THd[None], None


# Segments are bounded by cu_seqlens: no mask is ever materialised. transformers makes none for attention that has no
# function registered for masks; for one with a function it looks at the positions first, which on CUDA waits for them.
AttentionInterface.register(ATTENTION_NAME, _packed_attention)


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model's own attention in place of the packed one, as long as the block lasts."""
    attention = model.config._attn_implementation
    if attention != ATTENTION_NAME:
        yield
        return
    model.set_attn_implementation(model.get_correct_attn_implementation(None))
    try:
        yield
    finally:
        model.set_attn_implementation(attention)


def body_of(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its head. ``base_model`` is the whole model where its prefix names no part of it (Llama 4)."""
    base: torch.nn.Module = model.base_model
    return getattr(model, "model", base) if base is model else base


@dataclass(frozen=True, slots=True)
class ModelForward:
    """The layers of the model itself, around attention over packs.

    The model's attention implementation must be ``ATTENTION_NAME``.
    """

    model: PreTrainedModel
    attend: Attend

    def __call__(
        self, pack: PackedBatch, carried: CarriedKeys, rows_A: torch.Tensor | None
    ) -> tuple[torch.Tensor, CarriedKeys]:
        """See :class:`fastscore.types.PackForward`."""
        passage = _Passage(pack, self.attend, carried if pack.num_carried else [])
        output = body_of(self.model)(
            input_ids=pack.token_ids_T[None], position_ids=pack.position_ids_T[None], use_cache=False, packed=passage
        )
        hidden_TD = output.last_hidden_state[0]
        return hidden_TD if rows_A is None else hidden_TD[rows_A], passage.carry


def padded_hidden(model: PreTrainedModel, batch: PaddedBatch) -> torch.Tensor:
    """Hidden states ``[B * L, D]`` of a right-padded batch, in the model's own attention."""
    output = body_of(model)(input_ids=batch.token_ids_BL, attention_mask=batch.mask_BL, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def seq2seq_hidden(model: PreTrainedModel, batch: Seq2SeqBatch) -> torch.Tensor:
    """Decoder states ``[B * L, D]`` of an encoder-decoder."""
    encoded = model.get_encoder()(input_ids=batch.prompt_ids_BP, attention_mask=batch.prompt_mask_BP)
    decoded = model.get_decoder()(
        input_ids=batch.decoder_ids_BL,
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=batch.prompt_mask_BP,
        use_cache=False,
    )
    return decoded.last_hidden_state.flatten(0, 1)
