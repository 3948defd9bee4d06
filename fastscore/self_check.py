"""Does this model run packs correctly? Found out when it is loaded, by running it, not from a list of names."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from fastscore.attention import PROVIDERS, Attend, AttentionNeeds
from fastscore.error_text import error_text
from fastscore.packed_forward import ATTENTION_NAME, ModelForward, padded_hidden
from fastscore.padding import padded_batch, slot_offsets
from fastscore.probes import (
    PROBE_LENGTHS,
    Truth,
    probe_requests,
    relative_difference,
    run_packed,
    tolerance_for,
)
from fastscore.quantize import is_quantized
from fastscore.types import PackedBatch, ScoringRequest, dtype_name

VARLEN_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types that varlen attention computes. Others (chunked, sparse, compressed) may differ only beyond a length that
no probe reaches."""


class SelfCheck:
    """A few tokens through a model, its own way and ours. What a pass gave is kept for the questions after it: for a
    small model these passes are most of what loading takes.

    The model is left in its own attention until :meth:`packed` has found that packs work.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._tolerance = tolerance_for(model.dtype, any(map(is_quantized, model.modules())))
        self._vocab_size = model.get_input_embeddings().weight.shape[0]
        self._requests = probe_requests(self._vocab_size)
        self._alone: dict[ScoringRequest, torch.Tensor] = {}
        self._truth: Truth | None = None

    @torch.inference_mode()
    def causal(self) -> str:
        """Why this is no causal language model, or "": does a token know only what stands before it?

        In an encoder such as BERT later tokens change the hidden states of earlier ones, so there is no log-probability
        of an answer given its prompt.
        """
        first, _, _, other = self._requests
        kept = 3
        changed = ScoringRequest(first.token_ids[:kept] + other.token_ids[kept:], 1)
        difference = relative_difference(self.alone(changed)[:kept], self.alone(first)[:kept])
        if difference <= self._tolerance:
            return ""
        return (
            f"{type(self._model).__name__} is not a causal language model: later tokens change earlier hidden states "
            f"(relative difference {difference:.1e})"
        )

    @torch.inference_mode()
    def packed(self) -> tuple[str, AttentionNeeds]:
        """Why packs do not work with this model, or "" when they do (then it is left ready for them); and its needs.

        Three questions, asked with the plain reference attention. Agreement: are two sequences in a pack what each is
        alone, in the model's own attention? Isolation: does the second stay the same when the first is replaced by
        another of its length? The shapes are the same then, so that even in low precision a leak shows. Sharing: are
        sequences still the same when they share a prefix and are cut into several packs?
        """
        model = self._model
        recorder = _Recorder(PROVIDERS["reference"].load(), AttentionNeeds(self._device.type, dtype_name(model.dtype)))
        if others := set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - VARLEN_LAYERS:
            return f"layers of type {', '.join(sorted(others))}", recorder.needs
        original = model.config._attn_implementation
        try:
            reason = self._differences(recorder)
        except torch.OutOfMemoryError:  # says nothing about packs; processes that hold a model together must agree
            raise
        except Exception as error:  # noqa: BLE001 - foreign model code may fail in any way; said, and run padded
            reason = f"its forward pass fails on a pack ({error_text(error)})"
        reason = reason or _lost_window(model, recorder.needs)
        if reason:
            model.set_attn_implementation(original)
        return reason, recorder.needs

    @property
    def truth(self) -> Truth:
        """What a forward pass over packs must give; once :meth:`packed` has found that they work."""
        assert self._truth is not None, "packs work with this model"
        return self._truth

    @torch.inference_mode()
    def alone(self, request: ScoringRequest) -> torch.Tensor:
        """Hidden states of a request's input tokens, in the model's own attention: not after :meth:`packed`."""
        if request not in self._alone:
            batch = padded_batch([request], [0], slot_offsets([request])).to(self._device)
            self._alone[request] = padded_hidden(self._model, batch)
        return self._alone[request]

    def _differences(self, attend: Attend) -> str:
        model, (first, second, third, other) = self._model, self._requests
        alone = [self.alone(request) for request in (first, second, third)]
        model.set_attn_implementation(ATTENTION_NAME)
        if model.config._attn_implementation != ATTENTION_NAME:
            return "its attention does not go through transformers' attention interface"
        # Nothing shared here, so the longer request stands first.
        forward = ModelForward(model, attend)
        packed = run_packed(forward, [first, second], self._device, share=False)
        replaced = run_packed(forward, [other, second], self._device, share=False)
        length = PROBE_LENGTHS[0]
        leak = relative_difference(replaced[length:], packed[length:])
        if not leak <= self._tolerance / 10:
            return f"tokens of one sequence reach another in its pack (relative difference {leak:.1e})"
        difference = relative_difference(packed, torch.cat(alone[:2]))
        if not difference <= self._tolerance:
            return f"packed and separate sequences disagree (relative difference {difference:.1e})"
        shared = run_packed(forward, [first, second, third], self._device)
        difference = relative_difference(shared, torch.cat(alone))
        if not difference <= self._tolerance:
            return f"sequences that share a prefix disagree with separate ones (relative difference {difference:.1e})"
        self._truth = Truth(shared, self._vocab_size, self._tolerance)
        return ""


class _Recorder:
    """Attention that notes what the model asks of it."""

    def __init__(self, attend: Attend, needs: AttentionNeeds) -> None:
        self._attend = attend
        self.needs = needs

    def __call__(
        self,
        query_THd: torch.Tensor,
        key_TKd: torch.Tensor,
        value_TKd: torch.Tensor,
        pack: PackedBatch,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        self.needs = replace(
            self.needs,
            dtype=dtype_name(query_THd.dtype),
            head_size=query_THd.shape[2],
            value_head_size=value_TKd.shape[2],
            sliding_window=self.needs.sliding_window or sliding_window is not None,
            softcap=self.needs.softcap or softcap is not None,
            sinks=self.needs.sinks or sinks is not None,
        )
        return self._attend(
            query_THd,
            key_TKd,
            value_TKd,
            pack,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
        )


def _lost_window(model: PreTrainedModel, needs: AttentionNeeds) -> str:
    """Why a sliding window would be lost, or "". Some models have it in the mask alone, which packs don't take, and the
    probes are shorter than any window."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if not window or needs.sliding_window or "sliding_attention" not in types:
        return ""
    longest = getattr(config, "max_position_embeddings", None)
    if not getattr(config, "use_sliding_window", True) or (longest is not None and window >= longest):
        return ""
    return f"its layers don't tell their attention of the sliding window of {window} tokens"
