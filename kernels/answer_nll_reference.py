"""The answer NLL in plain PyTorch: the truth for the kernel's tests, and the path that runs on a CPU.

Shapes: A answer rows, D hidden size, V vocabulary; a suffix of ``v`` or ``a`` marks a tile of one of them.
"""

from __future__ import annotations

import torch

DEFAULT_LOGITS_BYTES = 16 << 20
"""Budget for one tile of logits; about what stays in a CPU's last-level cache between the passes over it."""


def answer_nll_reference(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_A: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    max_logits_bytes: int = DEFAULT_LOGITS_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of one target token per row, without the ``[A, V]`` logits.

    ``logits = softcap(logit_scale * (hidden_AD @ weight_VD.T + bias))`` with ``softcap(x) = c * tanh(x / c)``, and
    ``nll = logsumexp(logits) - logits[target]``. Products accumulate in fp32 (fp64 for fp64 input) whatever the
    dtype of the operands, and the target's logit is read from the same tile as the LSE. Low-precision weights are
    upcast one vocabulary tile at a time.

    Args:
        hidden_AD: hidden states ``[A, D]``; A may be 0.
        weight_VD: LM-head weight ``[V, D]``, on the same device.
        target_A: int64 ``[A]``, each in ``[0, V)``.
        bias: optional ``[V]``; entries may be -inf.
        logit_scale: multiplies the logits (after the bias, before the soft cap).
        logit_softcap: c above, or None.
        max_logits_bytes: upper bound for one tile of logits.

    Returns:
        ``nll_A`` in nats (fp32, or fp64 for fp64 input) and ``top1_A``, the most probable token (int64; the lowest
        index wins ties).

    Raises:
        ValueError: for shapes that do not fit together, or a target outside the vocabulary.

    Method: the online (streaming) softmax of Milakov and Gimelshein, 2018, over vocabulary tiles, as in Cut
    Cross-Entropy (Wijmans et al., 2024).
    """
    check_answer_nll_arguments(hidden_AD, weight_VD, target_A, bias, logit_softcap)
    num_rows, vocab_size = hidden_AD.shape[0], weight_VD.shape[0]
    if num_rows and not bool(((target_A >= 0) & (target_A < vocab_size)).all()):
        worst = int(target_A[(target_A < 0) | (target_A >= vocab_size)][0])
        raise ValueError(f"target_A must be in [0, {vocab_size}); found {worst}")

    accumulator = torch.float64 if hidden_AD.dtype == torch.float64 else torch.float32
    lse_A = torch.full((num_rows,), -torch.inf, dtype=accumulator, device=hidden_AD.device)
    best_A = torch.full((num_rows,), -torch.inf, dtype=accumulator, device=hidden_AD.device)
    target_logit_A = torch.full((num_rows,), -torch.inf, dtype=accumulator, device=hidden_AD.device)
    top1_A = torch.zeros(num_rows, dtype=torch.int64, device=hidden_AD.device)

    tile_rows, tile_vocab = _tile_shape(num_rows, vocab_size, max_logits_bytes, accumulator.itemsize)
    for first_v in range(0, vocab_size, tile_vocab):
        last_v = min(first_v + tile_vocab, vocab_size)
        weight_vD = weight_VD[first_v:last_v].to(accumulator)
        for first_a in range(0, num_rows, tile_rows):
            rows = slice(first_a, min(first_a + tile_rows, num_rows))
            logits_av = hidden_AD[rows].to(accumulator) @ weight_vD.T
            if bias is not None:
                logits_av += bias[first_v:last_v]
            if logit_scale != 1.0:
                logits_av *= logit_scale
            if logit_softcap is not None:
                logits_av = logits_av.div_(logit_softcap).tanh_().mul_(logit_softcap)

            # max() returns the first index of a maximum on CPU, which is what "lowest index wins" needs in a tile;
            # across tiles the strict comparison keeps the earlier one.
            tile_best_a, tile_top1_a = logits_av.max(dim=1)
            better_a = tile_best_a > best_A[rows]
            best_A[rows] = torch.where(better_a, tile_best_a, best_A[rows])
            top1_A[rows] = torch.where(better_a, tile_top1_a + first_v, top1_A[rows])

            here_a = (target_A[rows] >= first_v) & (target_A[rows] < last_v)
            local_a = (target_A[rows] - first_v).clamp(0, last_v - first_v - 1)
            found_a = logits_av.gather(1, local_a[:, None])[:, 0]
            target_logit_A[rows] = torch.where(here_a, found_a, target_logit_A[rows])

            # In place from here on: the tile is not needed any more. A tile of nothing but -inf has no maximum to
            # subtract.
            shift_a = torch.where(tile_best_a.isneginf(), torch.zeros_like(tile_best_a), tile_best_a)
            tile_lse_a = logits_av.sub_(shift_a[:, None]).exp_().sum(dim=1).log_().add_(shift_a)
            lse_A[rows] = torch.logaddexp(lse_A[rows], tile_lse_a)
    return lse_A - target_logit_A, top1_A


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
    if target_A.shape != hidden_AD.shape[:1] or target_A.dtype != torch.int64:
        raise ValueError(
            f"target_A must be int64 of shape ({hidden_AD.shape[0]},); "
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


def _tile_shape(num_rows: int, vocab_size: int, max_bytes: int, itemsize: int) -> tuple[int, int]:
    """Rows and vocabulary entries of a tile: many rows (the weight is upcast once a tile), then all the width left."""
    elements = max(1, max_bytes // itemsize)
    rows = max(1, min(num_rows, 512, elements))
    return rows, max(1, min(vocab_size, elements // rows))
