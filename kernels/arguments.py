"""What every form of the answer NLL asks of its arguments."""

from __future__ import annotations

import torch


def check_answer_nll_arguments(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_A: torch.Tensor,
    bias: torch.Tensor | None,
    logit_softcap: float | None,
) -> None:
    """Raise ValueError unless the shapes, dtypes and devices fit together (target values are not looked at)."""
    if hidden_AD.ndim != 2 or weight_VD.ndim != 2 or hidden_AD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden_AD [A, D] and weight_VD [V, D] do not fit: {tuple(hidden_AD.shape)} and {tuple(weight_VD.shape)}"
        )
    if weight_VD.shape[0] == 0:
        raise ValueError("weight_VD has no rows: the vocabulary is empty")
    if target_A.ndim not in (1, 2) or target_A.shape[:1] != hidden_AD.shape[:1] or target_A.dtype != torch.int64:
        raise ValueError(
            f"target_A must be int64 of shape ({hidden_AD.shape[0]},) or ({hidden_AD.shape[0]}, J); "
            f"found {target_A.dtype} of shape {tuple(target_A.shape)}"
        )
    if bias is not None and bias.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias must have shape ({weight_VD.shape[0]},); found {tuple(bias.shape)}")
    if not hidden_AD.is_floating_point() or not weight_VD.is_floating_point():
        raise ValueError(f"hidden_AD and weight_VD must be floating point: {hidden_AD.dtype} and {weight_VD.dtype}")
    devices = {tensor.device for tensor in (hidden_AD, weight_VD, target_A, bias) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; found {sorted(map(str, devices))}")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be positive; found {logit_softcap}")


def check_targets_inside(target_A: torch.Tensor, vocab_size: int) -> None:
    """Raise unless every target is in ``[0, vocab_size)``.

    Raises:
        ValueError: on a CPU. On a GPU the check runs on the device, as PyTorch's own indexing checks do, so that
            nothing waits for it: a device-side assertion that surfaces at the next synchronisation.
    """
    inside = (target_A >= 0) & (target_A < vocab_size)
    if target_A.device.type == "cpu":
        if not bool(inside.all()):
            raise ValueError(f"target_A must be in [0, {vocab_size}); found {int(target_A[~inside][0])}")
    else:
        torch._assert_async(inside.all(), f"target_A must be in [0, {vocab_size})")
