"""Which device and which dtype a model runs in."""

from __future__ import annotations

import torch

from fastscore.decoder import multiplies
from fastscore.error_text import error_text
from fastscore.types import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        raise InputError(f"device {name!r} cannot be used: {error_text(error)}") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 where the device multiplies bf16 natively, otherwise fp32."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if multiplies(device, torch.bfloat16) else torch.float32
