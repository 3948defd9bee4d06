"""Does this model run packs correctly? Found out when it is loaded, by running it, not from a list of names."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from fastscore.attention import Attend
from fastscore.packed_forward import ATTENTION_NAME, packed_hidden, padded_hidden
from fastscore.packing import build_pack
from fastscore.types import InputError, ScoringRequest

PROBE_LENGTHS = (9, 14, 9)
VARLEN_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types that varlen attention computes. Others (chunked, sparse, compressed) may differ only beyond a length that
no probe reaches."""


def probe_requests(vocab_size: int) -> list[ScoringRequest]:
    """Three short requests of spread-out token ids; the first and the last have the same length."""
    generator = torch.Generator().manual_seed(20)
    return [
        ScoringRequest(tuple(torch.randint(vocab_size, (length + 1,), generator=generator).tolist()), 1)
        for length in PROBE_LENGTHS
    ]


def tolerance_for(dtype: torch.dtype) -> float:
    """Relative difference that rounding can explain after a whole model."""
    return 1e-3 if dtype == torch.float32 else 0.1


def check_packed(model: PreTrainedModel, attend: Attend, device: torch.device) -> str:
    """Why packs do not work with this model, or "" when they do; then it is left ready for them.

    Two questions. Agreement: are two sequences in a pack what each is alone, in the model's own attention?
    Isolation: does the second stay the same when the first is replaced by another of its length? The shapes are the
    same then, so that even in low precision a leak shows.
    """
    if others := set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - VARLEN_LAYERS:
        return f"layers of type {', '.join(sorted(others))}"
    original = model.config._attn_implementation
    try:
        reason = _differences(model, attend, device)
    except Exception as error:  # noqa: BLE001 - foreign model code may fail in any way; said, and run padded
        reason = f"its forward pass fails on a pack ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
    if reason:
        model.set_attn_implementation(original)
    return reason


@torch.inference_mode()
def _differences(model: PreTrainedModel, attend: Attend, device: torch.device) -> str:
    requests = probe_requests(model.get_input_embeddings().weight.shape[0])
    alone = [padded_hidden(model, build_pack(requests, [index]).to(device)).float() for index in (0, 1)]
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        return "its attention does not go through transformers' attention interface"
    packed = packed_hidden(model, build_pack(requests, [0, 1]).to(device), attend).float()
    replaced = packed_hidden(model, build_pack(requests, [2, 1]).to(device), attend).float()

    tolerance = tolerance_for(model.dtype)
    first = PROBE_LENGTHS[0]
    leak = _relative(replaced[first:], packed[first:])
    if not leak <= tolerance / 10:
        return f"tokens of one sequence reach another in its pack (relative difference {leak:.1e})"
    difference = _relative(packed, torch.cat(alone))
    if not difference <= tolerance:
        return f"packed and separate sequences disagree (relative difference {difference:.1e})"
    return ""


@torch.inference_mode()
def check_causal(model: PreTrainedModel, device: torch.device) -> None:
    """Does a token know only what stands before it?

    Raises:
        InputError: later tokens change the hidden states of earlier ones (an encoder such as BERT), so there is no
            log-probability of an answer given its prompt.
    """
    probe, _, other = probe_requests(model.get_input_embeddings().weight.shape[0])
    kept = 3
    changed = ScoringRequest(probe.token_ids[:kept] + other.token_ids[kept:], 1)
    before, after = (
        padded_hidden(model, build_pack([request], [0]).to(device)).float() for request in (probe, changed)
    )
    difference = _relative(after[:kept], before[:kept])
    if not difference <= tolerance_for(model.dtype):
        raise InputError(
            f"{type(model).__name__} is not a causal language model: later tokens change earlier hidden states "
            f"(relative difference {difference:.1e})"
        )


def _relative(value_TD: torch.Tensor, truth_TD: torch.Tensor) -> float:
    return float((value_TD - truth_TD).norm() / truth_TD.norm().clamp_min(1e-30))
