"""A Hugging Face model's forward pass over packs: through its attention interface, or padded.

Shapes: T packed tokens, A answer rows, D hidden, H heads, K key-value heads, d head size, B batch, L padded length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fastscore.attention import Attend
from fastscore.types import PackedBatch

ATTENTION_NAME = "fastscore_packed"


@dataclass(frozen=True, slots=True)
class PackedForward:
    """What travels through the model's keyword arguments to its attention layers."""

    pack: PackedBatch
    attend: Attend


def _packed_attention(
    module: torch.nn.Module,
    query_1HTd: torch.Tensor,
    key_1KTd: torch.Tensor,
    value_1KTd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedForward,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The function that the model's attention layers call; ``[1, T, H, d]`` back, as they expect."""
    out_THd = packed.attend(
        query_1HTd[0].transpose(0, 1),
        key_1KTd[0].transpose(0, 1),
        value_1KTd[0].transpose(0, 1),
        packed.pack,
        scaling=query_1HTd.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out_THd[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """Segments are bounded by cu_seqlens: no mask is ever materialised."""
    return


AttentionInterface.register(ATTENTION_NAME, _packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def body_of(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its head. ``base_model`` is the whole model where its prefix names no part of it (Llama 4)."""
    base: torch.nn.Module = model.base_model
    return getattr(model, "model", base) if base is model else base


def packed_hidden(model: PreTrainedModel, pack: PackedBatch, attend: Attend) -> torch.Tensor:
    """Hidden states ``[T, D]`` of a pack. The model's attention implementation must be ``ATTENTION_NAME``."""
    output = body_of(model)(
        input_ids=pack.token_ids_T[None],
        position_ids=pack.position_ids_T[None],
        use_cache=False,
        packed=PackedForward(pack, attend),
    )
    return output.last_hidden_state[0]


def padded_hidden(model: PreTrainedModel, pack: PackedBatch) -> torch.Tensor:
    """Hidden states ``[T, D]`` of the same pack, its segments as one right-padded batch.

    On the right, so that padding comes after everything that is scored: no causal model can see it, whatever its
    positions or its recurrent state.
    """
    segments = pack.token_ids_T.split(list(pack.seqlens_q))
    ids_BL = pad_sequence(list(segments), batch_first=True, padding_value=0)
    lengths_B = torch.tensor(pack.seqlens_q, device=ids_BL.device)
    mask_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < lengths_B[:, None]
    output = body_of(model)(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False)
    return output.last_hidden_state[mask_BL]


def seq2seq_hidden(
    model: PreTrainedModel, prompt_ids_BP: torch.Tensor, prompt_mask_BP: torch.Tensor, decoder_ids_BL: torch.Tensor
) -> torch.Tensor:
    """Decoder states ``[B, L, D]`` of an encoder-decoder."""
    encoded = model.get_encoder()(input_ids=prompt_ids_BP, attention_mask=prompt_mask_BP)
    decoded = model.get_decoder()(
        input_ids=decoder_ids_BL,
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=prompt_mask_BP,
        use_cache=False,
    )
    return decoded.last_hidden_state
