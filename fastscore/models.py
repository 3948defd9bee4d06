"""Load a model and run packs through it: hidden states of the answer rows, and the head that turns them to logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from fastscore.attention import AttentionNeeds, choose_provider
from fastscore.budget import default_budget
from fastscore.config import ScorerConfig
from fastscore.decoder import OwnForward, multiplies
from fastscore.forwards import choose_forward
from fastscore.language_model import LanguageModel
from fastscore.lm_head import LMHead, check_lm_head, find_lm_head
from fastscore.model_source import ModelSource
from fastscore.packed_forward import ATTENTION_NAME, seq2seq_hidden
from fastscore.padding import seq2seq_batch, slot_offsets
from fastscore.quantize import is_quantized, quantize_linears
from fastscore.self_check import SelfCheck, probe_requests
from fastscore.split_model import agree, split_over_processes
from fastscore.types import InputError, ScoringRequest, dtype_name
from fastscore.weight_files import ALLOW_PICKLE, adapter_folder, check_weight_files

logger = logging.getLogger("fastscore")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_config(source: ModelSource, config: ScorerConfig) -> Any:
    """The Hugging Face config of the model.

    Raises:
        InputError: the model is not there or cannot be read.
    """
    hf_config = _pretrained(AutoConfig, source, config)
    for name, otherwise in (("vocab_size", None), ("hidden_size", 1)):
        size = getattr(hf_config.get_text_config(), name, otherwise)
        if not isinstance(size, int) or size < 1:
            raise InputError(f"model {config.model!r} cannot be loaded: its config says {name} {size!r}")
    return hf_config


def load_tokenizer(source: ModelSource, config: ScorerConfig) -> Any:
    """The model's tokenizer.

    Raises:
        InputError: the tokenizer is not there or cannot be read.
    """
    tokenizer = _pretrained(AutoTokenizer, source, config)
    try:
        tokenizer("a")  # some settings are looked at only now
    except Exception as error:
        raise InputError(f"model {config.model!r}: its tokenizer cannot be used: {_first_line(error)}") from error
    return tokenizer


def max_context(hf_config: Any) -> int | None:
    """Most tokens the model's positions allow, or None for a model without such a limit."""
    text_config = hf_config.get_text_config()
    if hasattr(text_config, "relative_attention_num_buckets"):  # T5: its n_positions is no limit
        return None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(value := getattr(text_config, name, None), int) and value > 0:
            return value
    return None


def _longest_short_input(hf_config: Any) -> int | None:
    """LongRoPE (Phi-3) turns every position of a batch by other angles as soon as one sequence is longer than this: a
    short request must not share a batch with a long one. None for a model without it."""
    text_config = hf_config.get_text_config()
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or text_config.original_max_position_embeddings


def load_model(source: ModelSource, config: ScorerConfig, hf_config: Any) -> LanguageModel:
    """Load weights, put them on the device, and find out by a self-check whether packs run through this model.

    Raises:
        InputError: weights, adapter or device are not there, or as :func:`prepare_model`.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if config.attention != "auto":
        # A name that cannot be is refused before the weights are read; what the model itself needs is known after.
        needs = AttentionNeeds(device.type, dtype_name(dtype), deterministic=config.deterministic)
        choose_provider(config.attention, needs)
    auto = AutoModelForSeq2SeqLM if hf_config.is_encoder_decoder else AutoModelForCausalLM
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
    model, found = _pretrained(auto, source, config, dtype=dtype, output_loading_info=True, **extra)
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random numbers in their place
        raise InputError(f"model {config.model!r}: {_some(missing)} not among its weights: is it a language model?")
    if adapter is not None:
        model = _with_adapter(model, adapter, config)
    if not (config.device_map or config.tensor_parallel):
        model = model.to(device)  # type: ignore[arg-type]
    if config.quantize is not None:
        quantize_linears(model, config.quantize)
    prepared = prepare_model(model, config)
    if config.tensor_parallel:
        agree(prepared)
    return prepared


def prepare_model(model: PreTrainedModel, config: ScorerConfig) -> LanguageModel:
    """Find out by a self-check whether packs run through a model in memory, and leave it ready for scoring.

    The model is changed: it is put into evaluation mode, and its attention runs packs from now on.

    Raises:
        InputError: the model is not causal, its LM head is of an unknown kind, or the attention provider that was
            asked for cannot serve it.
    """
    model.eval().requires_grad_(False)
    if model.config._attn_implementation == ATTENTION_NAME:  # prepared before: the check starts from its own attention
        model.set_attn_implementation(model.get_correct_attn_implementation(None))
    soft_cap = getattr(model.config, "attn_logit_softcapping", None)
    if model.config._attn_implementation == "sdpa" and soft_cap is not None:
        model.set_attn_implementation("eager")  # the SDPA of transformers 5.17 leaves the soft cap out
    device = model.device
    head = find_lm_head(model)
    chosen = None
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
            chosen = choose_forward(model, config, needs, check)
    if config.deterministic and mode != "packed":
        raise InputError(f"deterministic scores need packs, and this model runs without: {reason}")
    if chosen is None and config.own_forward_option:
        raise InputError(f"fastscore's own forward pass needs packs, and this model runs without: {reason}")
    own = chosen.forward if chosen is not None and isinstance(chosen.forward, OwnForward) else None
    longest_packed = _longest_short_input(model.config)
    # Its own layers run, for all requests or for the long ones.
    slow = own is None or longest_packed is not None
    if (
        slow
        and device.type == "cpu"
        and not (multiplies(device, model.dtype) or any(map(is_quantized, model.modules())))
    ):
        logger.warning(
            "PyTorch has no fast %s products on this CPU, and this model's own layers use them: fp32 is faster, and "
            "nearer to the truth",
            _dtype_name(model.dtype),
        )
    loaded = LanguageModel(
        model=model,
        head=head,
        device=device,
        dtype=model.dtype,
        provider=None if chosen is None else chosen.provider,
        forward=None if chosen is None else chosen.forward,
        forward_name="the model's own layers" if chosen is None else chosen.name,
        mode=mode,
        reason=reason,
        max_batch_tokens=config.max_batch_tokens
        or default_budget(model.config, device, model.dtype if own is None else own.decoder.dtype),
        share_prefixes=config.share_prefixes,
        deterministic=config.deterministic,
        longest_packed=longest_packed,
    )
    if chosen is not None:
        logger.info("%s, %s, packed, attention by %s", device, _dtype_name(model.dtype), chosen.provider.name)
    else:
        logger.warning("%s, %s, not packed: %s", device, _dtype_name(model.dtype), reason)
    return loaded


def choose_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device when there is one, otherwise the CPU.

    Raises:
        InputError: a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch asserts when it was built without CUDA
        raise InputError(f"device {name!r} cannot be used: {_first_line(error)}") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 where the device multiplies bf16 natively, otherwise fp32."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if multiplies(device, torch.bfloat16) else torch.float32


def _dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), dtype_name(dtype))


def _pretrained(auto: Any, source: ModelSource, config: ScorerConfig, **extra: Any) -> Any:
    named = {"revision": config.revision, "cache_dir": config.cache_dir, "gguf_file": source.gguf_file}
    options: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    options |= {"trust_remote_code": config.trust_remote_code, "local_files_only": source.local_files_only}
    try:
        return auto.from_pretrained(source.name_or_path, **options, **extra)
    except Exception as error:
        hint = " (--trust-remote-code allows that)" if "trust_remote_code=True" in str(error) else ""
        if "ignore_mismatched_sizes" in str(error):
            raise InputError(f"model {config.model!r}: its weights have other shapes than its config says") from error
        if "use_safetensors=True" in str(error):  # a model on the hub
            hint = f" ({ALLOW_PICKLE}, if it has any)"
        raise InputError(f"model {config.model!r} cannot be loaded: {_first_line(error)}{hint}") from error


def _find_adapter(config: ScorerConfig, source: ModelSource) -> str:
    """The adapter's folder, seen to be loadable before the model's weights are read."""
    if find_spec("peft") is None:
        raise InputError("--adapter needs the peft package: pip install 'fastscore[lora]'")
    try:
        return adapter_folder(config, source.local_files_only)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"adapter {config.adapter!r} cannot be loaded: {_first_line(error)}") from error


def _with_adapter(model: PreTrainedModel, folder: str, config: ScorerConfig) -> PreTrainedModel:
    """Add a LoRA adapter and fold it into the weights, so that a pack runs at the model's own speed."""
    from peft import PeftModel

    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except Exception as error:
        raise InputError(f"adapter {config.adapter!r} cannot be loaded: {_first_line(error)}") from error
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


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {' '.join(lines[:2] if lines[0].endswith(':') else lines[:1])}"
