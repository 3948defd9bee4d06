"""Load a model and run packs through it: hidden states of the answer rows, and the head that turns them to logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from fastscore.attention import AttentionNeeds, choose_provider
from fastscore.config import ScorerConfig
from fastscore.context import longest_short_input
from fastscore.decoder import OwnForward, multiplies
from fastscore.devices import choose_device, choose_dtype
from fastscore.error_text import error_text
from fastscore.forwards import choose_forward
from fastscore.known_models import Place
from fastscore.language_model import ALIGNMENT, LanguageModel
from fastscore.lm_head import LMHead, check_lm_head, find_lm_head
from fastscore.model_source import ModelSource
from fastscore.packed_forward import ATTENTION_NAME, seq2seq_hidden
from fastscore.padding import seq2seq_batch, slot_offsets
from fastscore.pretrained import from_pretrained
from fastscore.probes import Truth, probe_requests
from fastscore.quantize import is_quantized, quantize_linears
from fastscore.ready_model import ready_model, short_dtype
from fastscore.recall import remember
from fastscore.self_check import SelfCheck
from fastscore.split_model import agree, split_over_processes
from fastscore.types import InputError, ScoringRequest, dtype_name
from fastscore.weight_files import adapter_folder, check_weight_files

logger = logging.getLogger("fastscore")


class Prepared(NamedTuple):
    """A model that is ready, and what it asks of attention. ``truth``: what it gives over packs, where it runs them."""

    model: LanguageModel
    needs: AttentionNeeds
    truth: Truth | None


def load_model(source: ModelSource, config: ScorerConfig, hf_config: Any, place: Place | None) -> LanguageModel:
    """Load weights, put them on the device, and find out by a self-check whether packs run through this model. It is
    noted at ``place``, as that was before any file was read, unless None.

    Raises:
        InputError: weights, adapter or device are not there, or as :func:`prepare_model`.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if config.attention != "auto":
        # A name that cannot be is refused before the weights are read; what the model itself needs is known after.
        needs = AttentionNeeds(device.type, dtype_name(dtype), deterministic=config.deterministic)
        choose_provider(config.attention, needs)
    auto = "AutoModelForSeq2SeqLM" if hf_config.is_encoder_decoder else "AutoModelForCausalLM"
    extra: dict[str, Any] = {"device_map": config.device_map} if config.device_map else {}
    if config.tensor_parallel:
        extra["distributed_config"] = split_over_processes(source, hf_config, device)
    check_weight_files(source, config, hf_config)
    adapter = None if config.adapter is None else _find_adapter(config, source)
    if source.gguf_file is None and not config.allow_pickle:
        extra["use_safetensors"] = True
    if source.local_files_only:  # transformers looks for an adapter beside the model, and asks the hub again for that
        extra["adapter_kwargs"] = {"local_files_only": True}
    model: PreTrainedModel
    model, found = from_pretrained(
        ("transformers", auto), source, config, dtype=dtype, output_loading_info=True, **extra
    )
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random numbers in their place
        raise InputError(f"model {config.model!r}: {_some(missing)} not among its weights: is it a language model?")
    if adapter is not None:
        model = _with_adapter(model, adapter, config)
    if not (config.device_map or config.tensor_parallel):
        model = model.to(device)  # type: ignore[arg-type]
        _align_weights(model)
    if config.quantize is not None:
        quantize_linears(model, config.quantize)
    prepared = _prepare(model, config)
    if config.tensor_parallel:
        agree(prepared.model)
    if place is not None and prepared.truth is not None:
        remember(place, source, config, hf_config, prepared.model, prepared.needs, prepared.truth)
    return prepared.model


def prepare_model(model: PreTrainedModel, config: ScorerConfig) -> LanguageModel:
    """Find out by a self-check whether packs run through a model in memory, and leave it ready for scoring.

    The model is changed: it is put into evaluation mode, and its attention runs packs from now on.

    Raises:
        InputError: the model is not causal, its LM head is of an unknown kind, or the attention provider that was
            asked for cannot serve it.
    """
    return _prepare(model, config).model


def _prepare(model: PreTrainedModel, config: ScorerConfig) -> Prepared:
    model.eval().requires_grad_(False)
    if model.config._attn_implementation == ATTENTION_NAME:  # prepared before: the check starts from its own attention
        model.set_attn_implementation(model.get_correct_attn_implementation(None))
    soft_cap = getattr(model.config, "attn_logit_softcapping", None)
    if model.config._attn_implementation == "sdpa" and soft_cap is not None:
        model.set_attn_implementation("eager")  # the SDPA of transformers 5.17 leaves the soft cap out
    device = model.device
    head = find_lm_head(model)
    chosen = truth = None
    needs = AttentionNeeds(device.type)
    if model.config.is_encoder_decoder:
        if getattr(model.config, "decoder_start_token_id", None) is None:
            raise InputError("the model's config has no decoder_start_token_id: what an answer begins with is unknown")
        mode, reason = "encoder-decoder", "an encoder-decoder is not packed"
        _check_seq2seq_head(model, head, device)
    else:
        check = SelfCheck(model, device)
        if reason := check.causal():
            raise InputError(reason)
        _check_head(model, head, check)
        reason, needs = check.packed()
        mode = "padded" if reason else "packed"
        if not reason:
            truth = check.truth
            chosen = choose_forward(model, config, needs, truth)
    if config.deterministic and mode != "packed":
        raise InputError(f"deterministic scores need packs, and this model runs without: {reason}")
    if chosen is None and config.own_forward_option:
        raise InputError(f"fastscore's own forward pass needs packs, and this model runs without: {reason}")
    longest_packed = longest_short_input(model.config)
    # Its own layers run, for all requests or for the long ones.
    slow = chosen is None or not isinstance(chosen.forward, OwnForward) or longest_packed is not None
    if (
        slow
        and device.type == "cpu"
        and not (multiplies(device, model.dtype) or any(map(is_quantized, model.modules())))
    ):
        logger.warning(
            "PyTorch has no fast %s products on this CPU, and this model's own layers use them: fp32 is faster, and "
            "nearer to the truth",
            short_dtype(model.dtype),
        )
    loaded = ready_model(model, head, device, config, chosen, mode=mode, reason=reason, longest_packed=longest_packed)
    return Prepared(loaded, needs, truth)


def _align_weights(model: PreTrainedModel) -> None:
    """Weights lie in memory as PyTorch allocates it: in a file's own pages they may begin anywhere, and the last bits
    of a product depend on that."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def _find_adapter(config: ScorerConfig, source: ModelSource) -> str:
    """The adapter's folder, seen to be loadable before the model's weights are read."""
    if find_spec("peft") is None:
        raise InputError("--adapter needs the peft package: pip install 'fastscore[lora]'")
    try:
        return adapter_folder(config, source.local_files_only)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"adapter {config.adapter!r} cannot be loaded: {error_text(error)}") from error


def _with_adapter(model: PreTrainedModel, folder: str, config: ScorerConfig) -> PreTrainedModel:
    """Add a LoRA adapter and fold it into the weights, so that a pack runs at the model's own speed."""
    from peft import PeftModel

    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except Exception as error:
        raise InputError(f"adapter {config.adapter!r} cannot be loaded: {error_text(error)}") from error
    return merged


@torch.inference_mode()
def _check_head(model: PreTrainedModel, head: LMHead, check: SelfCheck) -> None:
    """A few tokens through the whole model and through body and head: the logits must agree."""
    request = probe_requests(head.vocab_size)[0]
    ids_1L = torch.tensor([request.token_ids[:-1]], device=model.device)
    logits_LV = model(input_ids=ids_1L, use_cache=False).logits[0]
    check_lm_head(head, check.alone(request), logits_LV)


@torch.inference_mode()
def _check_seq2seq_head(model: PreTrainedModel, head: LMHead, device: torch.device) -> None:
    """The same for an encoder-decoder."""
    request = probe_requests(head.vocab_size)[0]
    pair = ScoringRequest(request.token_ids + request.token_ids, len(request.token_ids))
    batch = seq2seq_batch([pair], [0], slot_offsets([pair]), model.config.decoder_start_token_id, 0).to(device)
    hidden_LD = seq2seq_hidden(model, batch)
    logits_LV = model(input_ids=batch.prompt_ids_BP, decoder_input_ids=batch.decoder_ids_BL, use_cache=False).logits[0]
    check_lm_head(head, hidden_LD, logits_LV)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
