"""Does this model run packs correctly? Found out when it is loaded, by running it, not from a list of names."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from fastscore.attention import PROVIDERS, Attend, AttentionNeeds
from fastscore.packed_forward import ATTENTION_NAME, ModelForward, PackForward, padded_hidden
from fastscore.packing import cut_pack
from fastscore.padding import padded_batch, slot_offsets
from fastscore.prefix_tree import build_prefix_tree
from fastscore.quantize import is_quantized
from fastscore.types import CarriedKeys, PackedBatch, ScoringRequest, dtype_name

PROBE_LENGTHS = (14, 8)
SHARED_LENGTH = 6
SHARED_PACK = 10
"""Tokens of a pack where prefixes are shared: the probes make three, and the last needs keys of the first, which the
one between has to carry on."""
VARLEN_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types that varlen attention computes. Others (chunked, sparse, compressed) may differ only beyond a length that
no probe reaches."""


def probe_requests(vocab_size: int) -> list[ScoringRequest]:
    """Short requests of spread-out token ids: two, one that begins like the first, and one of the first's length."""
    generator = torch.Generator().manual_seed(20)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (length,), generator=generator).tolist())

    long, short = PROBE_LENGTHS
    first = tokens(long + 1)
    # Answers as long as can be: every token but the first is asked for, so every hidden state counts.
    return [
        ScoringRequest(ids, 1)
        for ids in (first, tokens(short + 1), first[:SHARED_LENGTH] + tokens(short), tokens(long + 1))
    ]


def tolerance_for(model: PreTrainedModel) -> float:
    """Relative difference that rounding can explain after a whole model. In eight bits a last bit that differs can move
    an activation by a whole step."""
    if any(map(is_quantized, model.modules())):
        return 0.3
    return 1e-3 if model.dtype == torch.float32 else 0.1


def error_text(error: Exception) -> str:
    """The kind and the first line of what foreign code raised."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"


class SelfCheck:
    """A few tokens through a model, its own way and ours. What a pass gave is kept for the questions after it: for a
    small model these passes are most of what loading takes.

    The model is left in its own attention until :meth:`packed` has found that packs work.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._tolerance = tolerance_for(model)
        self._requests = probe_requests(_vocab_size(model))
        self._alone: dict[ScoringRequest, torch.Tensor] = {}
        self._truth: torch.Tensor | None = None

    @torch.inference_mode()
    def causal(self) -> str:
        """Why this is no causal language model, or "": does a token know only what stands before it?

        In an encoder such as BERT later tokens change the hidden states of earlier ones, so there is no log-probability
        of an answer given its prompt.
        """
        first, _, _, other = self._requests
        kept = 3
        changed = ScoringRequest(first.token_ids[:kept] + other.token_ids[kept:], 1)
        difference = _relative(self.alone(changed)[:kept], self.alone(first)[:kept])
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

    def provider(self, attend: Attend) -> str:
        """How a provider's attention differs from the reference on a model that runs packs, or ""."""
        return self.forward(ModelForward(self._model, attend))

    @torch.inference_mode()
    def forward(self, forward: PackForward) -> str:
        """How a forward pass differs from the model's own with reference attention, where packs work; or ""."""
        try:
            found = self._run(forward, self._requests[:3])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a library may fail in any way; said, and the next one taken
            return f"it fails ({error_text(error)})"
        assert self._truth is not None, "packs work with this model"
        difference = _relative(found, self._truth)
        return "" if difference <= self._tolerance else f"it is wrong (relative difference {difference:.1e})"

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
        packed = self._run(forward, [first, second], share=False)
        replaced = self._run(forward, [other, second], share=False)
        length = PROBE_LENGTHS[0]
        leak = _relative(replaced[length:], packed[length:])
        if not leak <= self._tolerance / 10:
            return f"tokens of one sequence reach another in its pack (relative difference {leak:.1e})"
        difference = _relative(packed, torch.cat(alone[:2]))
        if not difference <= self._tolerance:
            return f"packed and separate sequences disagree (relative difference {difference:.1e})"
        self._truth = self._run(forward, [first, second, third])
        difference = _relative(self._truth, torch.cat(alone))
        if not difference <= self._tolerance:
            return f"sequences that share a prefix disagree with separate ones (relative difference {difference:.1e})"
        return ""

    def _run(self, forward: PackForward, requests: list[ScoringRequest], share: bool = True) -> torch.Tensor:
        """Hidden states of every request's tokens, one after the other; in several packs where prefixes are shared."""
        tree = build_prefix_tree(requests, share=share)
        size = SHARED_PACK if share else tree.num_tokens
        hidden: list[torch.Tensor] = []
        carried: CarriedKeys = []
        for start in range(0, tree.num_tokens, size):
            pack: PackedBatch = cut_pack(tree, start, min(size, tree.num_tokens - start)).to(self._device)
            hidden_TD, carried = forward(pack, carried, None)
            hidden.append(hidden_TD)
        rows = torch.from_numpy(tree.slot_row_Q[tree.request_slot]).to(self._device)
        return torch.cat(hidden)[rows]


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


def _vocab_size(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _relative(value_TD: torch.Tensor, truth_TD: torch.Tensor) -> float:
    value_TD, truth_TD = value_TD.float(), truth_TD.float()
    return float((value_TD - truth_TD).norm() / truth_TD.norm().clamp_min(1e-30))
