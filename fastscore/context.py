"""How long an input a model takes, by its config."""

from __future__ import annotations

from typing import Any


def max_context(hf_config: Any) -> int | None:
    """Most tokens the model's positions allow, or None for a model without such a limit."""
    text_config = hf_config.get_text_config()
    if hasattr(text_config, "relative_attention_num_buckets"):  # T5: its n_positions is no limit
        return None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(value := getattr(text_config, name, None), int) and value > 0:
            return value
    return None


def longest_short_input(hf_config: Any) -> int | None:
    """LongRoPE (Phi-3) turns every position of a batch by other angles as soon as one sequence is longer than this: a
    short request must not share a batch with a long one. None for a model without it."""
    text_config = hf_config.get_text_config()
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or text_config.original_max_position_embeddings
