"""Tiny random models of many families, with a small real tokenizer, built in the test that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

VOCAB_SIZE = 512
CONTEXT = 256

TRAINING_TEXT = [
    "Knowledge: The river runs through the old town.\n\nQuestion: where does the river run\n\nAnswer: the old town",
    "Speaker 1: How many people live there? Speaker 2: About 1990 people, in 42 houses.",
    "Ελληνικά, 白 术, naïve café, Straße and 👩‍🚀 too; numbers 0 1 2 3 4 5 6 7 8 9.",
]

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "head_dim": 16,
}
_GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": {**_COMMON, "sliding_window": 8},
    "qwen2": _COMMON,
    "qwen3": _COMMON,
    "qwen3_moe": {
        **_COMMON,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "decoder_sparse_step": 1,
    },
    "mixtral": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_COMMON,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
    },
    "phimoe": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": _COMMON,
    "gemma2": {**_COMMON, "sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_COMMON, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": _COMMON,
    "phi3": {**_COMMON, "pad_token_id": 0},
    "gpt_neox": {**_COMMON, "num_key_value_heads": 4},
    "olmo2": _COMMON,
    "granite": {**_COMMON, "logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {**_COMMON, "logit_scale": 0.25},
    "cohere2": {**_COMMON, "logit_scale": 0.25, "sliding_window": 8},
    "starcoder2": {**_COMMON, "sliding_window": None},
    "smollm3": {**_COMMON, "pad_token_id": 0},
    "gpt_oss": {
        **_COMMON,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4": {**_COMMON, "pad_token_id": 0},
    "gpt2": _GPT2,
    "opt": {
        **_COMMON,
        "ffn_dim": 96,
        "word_embed_proj_dim": 64,
    },
    "gpt_bigcode": _GPT2,
    "exaone4": _COMMON,
    "ernie4_5": _COMMON,
    "deepseek_v3": {  # values narrower than queries and keys
        **_COMMON,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
    },
    # Not through the attention interface, or with state across the sequence: these take the padded path.
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": VOCAB_SIZE, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT},
    "mamba": {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "falcon": {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gptj": {**_GPT2, "rotary_dim": 8},
    "llama4_text": {
        **_COMMON,
        "intermediate_size_mlp": 96,
        "num_local_experts": 2,
        "attention_chunk_size": 16,
        "pad_token_id": 0,
    },
    "jamba": {
        **_COMMON,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
        "pad_token_id": 0,
    },
    "falcon_h1": {
        **_COMMON,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 32,
        "pad_token_id": 0,
    },
    "qwen3_next": {
        **_COMMON,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
        "layer_types": ["linear_attention", "full_attention"],
    },
    # Encoder-decoder.
    "t5": {
        "vocab_size": VOCAB_SIZE,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    },
    "bart": {
        "vocab_size": VOCAB_SIZE,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_position_embeddings": CONTEXT,
        "decoder_start_token_id": 2,
    },
}
PADDED_FAMILIES = ["bloom", "mpt", "mamba", "falcon", "gptj", "llama4_text", "jamba", "falcon_h1", "qwen3_next"]
SEQ2SEQ_FAMILIES = ["t5", "bart"]
PACKED_FAMILIES = [family for family in FAMILIES if family not in (*PADDED_FAMILIES, *SEQ2SEQ_FAMILIES)]


def make_tokenizer(folder: Path, *, add_bos: bool = False, add_eos: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most VOCAB_SIZE entries and save it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if add_bos or add_eos:
        single = ("<bos> " if add_bos else "") + "$A" + (" <eos>" if add_eos else "")
        used = [(token, backend.token_to_id(token)) for token in specials[1:]]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    add_bos: bool = False,
    add_eos: bool = False,
    **overrides: Any,
) -> Path:
    """Save a random model of the family with a tokenizer in ``folder`` and return the folder.

    Initial weights are widened so that attention and logits are far from uniform: a mistake shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder, add_bos=add_bos, add_eos=add_eos)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **overrides})
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
            elif name.endswith("bias") or "sinks" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder
