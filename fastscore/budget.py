"""How many tokens a pack should hold, from the model's sizes and the device's memory."""

from __future__ import annotations

from typing import Any

import torch

CPU_WORKING_SET = 48 << 20
"""Bytes of one layer's intermediate results: more tokens make attention's batches larger, until every step between two
products waits for memory."""
CPU_TOKENS = (512, 4096)
"""Fewer and the products lose speed; more bring next to nothing."""
GPU_SHARE = 0.25
"""Of the memory that is free beside the weights."""
GPU_TOKENS = (1024, 16384)


def default_budget(hf_config: Any, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of a pack when nobody says (``bench/budget.py`` measures them)."""
    bytes_per_token = layer_bytes_per_token(hf_config, dtype)
    if device.type == "cpu":
        return _rounded(CPU_WORKING_SET / bytes_per_token, *CPU_TOKENS)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return _rounded(free * GPU_SHARE / bytes_per_token, *GPU_TOKENS)
    return CPU_TOKENS[1]


def layer_bytes_per_token(hf_config: Any, dtype: torch.dtype) -> int:
    """What a token takes in the widest part of a layer, the feed-forward network: its input, gate, product and output,
    and the residual stream in fp32."""
    config = hf_config.get_text_config()
    hidden = int(getattr(config, "hidden_size", None) or getattr(config, "n_embd", None) or config.d_model)
    wide = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    return 4 * hidden + dtype.itemsize * (2 * hidden + 2 * int(wide))


def _rounded(tokens: float, least: int, most: int) -> int:
    return int(min(max(tokens, least), most)) // 128 * 128
