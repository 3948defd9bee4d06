"""Which products a device is made for."""

from __future__ import annotations

import platform

import torch


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has instructions for products of that dtype, and this PyTorch what uses them (for a CPU,
    Apple's builds do not). Without, PyTorch computes them all the same, in slower ways."""
    if device.type == "cpu":
        return _cpu_multiplies(dtype)
    if dtype == torch.bfloat16:
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # On x86 that means AVX-512, with which oneDNN emulates bf16: several instructions for each product.
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
