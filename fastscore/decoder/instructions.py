"""Which products a device has instructions for."""

from __future__ import annotations

import torch


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has instructions for products of that dtype, and this PyTorch what uses them (for a CPU,
    Apple's builds do not). Without, PyTorch computes them all the same, in other ways."""
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        if not torch.backends.mkldnn.is_available():
            return False
        name = "bf16" if dtype == torch.bfloat16 else "fp16"
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    if dtype == torch.bfloat16:
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return True
