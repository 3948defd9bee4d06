"""The answer NLL in plain PyTorch: the truth for the kernel's tests, and the path that runs on a CPU.

Shapes: A answer rows, J targets per row, D hidden size, V vocabulary; a suffix of ``v`` or ``a`` marks a tile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from fastscore_kernels.arguments import check_answer_nll_arguments, check_targets_inside
from fastscore_kernels.partials import Partials, nll_from_partials

_SWITCH = threading.Lock()
DEFAULT_LOGITS_BYTES = 16 << 20
"""Budget for one tile of logits (and one of their softmax); about what stays in a CPU's last-level cache between the
passes over it."""


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
    """Negative log-likelihood of target tokens, without the ``[A, V]`` logits.

    ``logits = softcap(logit_scale * (hidden_AD @ weight_VD.T + bias))`` with ``softcap(x) = c * tanh(x / c)``, and
    ``nll = logsumexp(logits) - logits[target]``. Products accumulate in fp32 (fp64 for fp64 input) whatever the
    dtype of the operands, and the target's logit is read from the same tile as the LSE. Low-precision weights are
    upcast one vocabulary tile at a time.

    Args:
        hidden_AD: hidden states ``[A, D]``; A may be 0.
        weight_VD: LM-head weight ``[V, D]``, on the same device.
        target_A: int64 ``[A]``, or ``[A, J]`` for several targets that share a row; each in ``[0, V)``.
        bias: optional ``[V]``; entries may be -inf.
        logit_scale: multiplies the logits (after the bias, before the soft cap).
        logit_softcap: c above, or None.
        max_logits_bytes: upper bound for one tile of logits; their softmax takes as much again.

    Returns:
        The NLL in nats, shaped like ``target_A`` (fp32, or fp64 for fp64 input), and ``top1_A``, the most probable
        token (int64; the lowest index wins ties).

    Raises:
        ValueError: for shapes that do not fit together, or a target outside the vocabulary.

    Method: the online (streaming) softmax of Milakov and Gimelshein, 2018, over vocabulary tiles, as in Cut
    Cross-Entropy (Wijmans et al., 2024).
    """
    check_answer_nll_arguments(hidden_AD, weight_VD, target_A, bias, logit_softcap)
    check_targets_inside(target_A, weight_VD.shape[0])
    partials = answer_nll_partials_reference(
        hidden_AD,
        weight_VD,
        target_A,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        max_logits_bytes=max_logits_bytes,
    )
    return nll_from_partials(partials).reshape(target_A.shape), partials.top1_A


def answer_nll_partials_reference(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_A: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_start: int = 0,
    max_logits_bytes: int = DEFAULT_LOGITS_BYTES,
) -> Partials:
    """The contribution of one shard of the vocabulary, ``[vocab_start, vocab_start + V)``; see :class:`Partials`.

    Arguments are those of :func:`answer_nll_reference`; targets are tokens of the whole vocabulary and may lie
    outside the shard.
    """
    check_answer_nll_arguments(hidden_AD, weight_VD, target_A, bias, logit_softcap)
    num_rows, vocab_size = hidden_AD.shape[0], weight_VD.shape[0]
    target_AJ = (target_A[:, None] if target_A.ndim == 1 else target_A) - vocab_start
    accumulator = torch.float64 if hidden_AD.dtype == torch.float64 else torch.float32
    best_A = torch.full((num_rows,), -torch.inf, dtype=accumulator, device=hidden_AD.device)
    sumexp_A = torch.zeros_like(best_A)
    target_logit_AJ = torch.full(target_AJ.shape, -torch.inf, dtype=accumulator, device=hidden_AD.device)
    top1_A = torch.zeros(num_rows, dtype=torch.int64, device=hidden_AD.device)

    tile_rows, tile_vocab = _tile_shape(num_rows, vocab_size, max_logits_bytes, accumulator.itemsize)
    # Both tiles are made once: fresh memory for each would cost more than the passes over it.
    logits = torch.empty(tile_rows * tile_vocab, dtype=accumulator, device=hidden_AD.device)
    softmax = torch.empty_like(logits)
    exact_bf16 = hidden_AD.dtype == weight_VD.dtype == torch.bfloat16
    for first_v in range(0, vocab_size, tile_vocab):
        last_v = min(first_v + tile_vocab, vocab_size)
        weight_vD = weight_VD[first_v:last_v].to(accumulator)
        for first_a in range(0, num_rows, tile_rows):
            rows = slice(first_a, min(first_a + tile_rows, num_rows))
            shape = (rows.stop - rows.start, last_v - first_v)
            logits_av, softmax_av = (tile[: shape[0] * shape[1]].view(shape) for tile in (logits, softmax))
            with _exact_bf16_products() if exact_bf16 else nullcontext():
                torch.mm(hidden_AD[rows].to(accumulator), weight_vD.T, out=logits_av)
            if bias is not None:
                logits_av += bias[first_v:last_v]
            if logit_scale != 1.0:
                logits_av *= logit_scale
            if logit_softcap is not None:
                logits_av.div_(logit_softcap).tanh_().mul_(logit_softcap)

            here_aJ = (target_AJ[rows] >= first_v) & (target_AJ[rows] < last_v)
            local_aJ = (target_AJ[rows] - first_v).clamp(0, last_v - first_v - 1)
            target_logit_AJ[rows] = torch.where(here_aJ, logits_av.gather(1, local_aJ), target_logit_AJ[rows])

            # max() returns the first index of a maximum on CPU, which is what "lowest index wins" needs in a tile;
            # across tiles the strict comparison keeps the earlier one.
            tile_best_a, tile_top1_a = logits_av.max(dim=1)
            top1_A[rows] = torch.where(tile_best_a > best_A[rows], tile_top1_a + first_v, top1_A[rows])
            # The sum of exp(logit - best) is one over the best one's probability within the tile, and softmax is one
            # fused pass where exponentials and their sum would be three. It adds up a row from end to end, which loses
            # the smallest terms of a large vocabulary (1.6e-5 nats with AVX2); sum() adds by halves, so that what the
            # probabilities sum up to says what was lost.
            torch.softmax(logits_av, dim=1, out=softmax_av)
            tile_sumexp_a = softmax_av.sum(dim=1) / softmax_av.gather(1, tile_top1_a[:, None])[:, 0]
            # Where all logits are -inf there is no softmax, and nothing to subtract.
            tile_sumexp_a = torch.where(tile_best_a.isneginf(), torch.zeros_like(tile_best_a), tile_sumexp_a)
            new_best_a = torch.maximum(best_A[rows], tile_best_a)
            shift_a = torch.where(new_best_a.isneginf(), torch.zeros_like(new_best_a), new_best_a)
            sumexp_A[rows] *= (best_A[rows] - shift_a).exp()
            sumexp_A[rows] += tile_sumexp_a * (tile_best_a - shift_a).exp()
            best_A[rows] = new_best_a
    return Partials(best_A, sumexp_A, target_logit_AJ, top1_A + vocab_start)


@contextmanager
def _exact_bf16_products() -> Iterator[None]:
    """Let a CPU's fp32 product run on its bf16 matrix unit. The operands were bf16, so that loses nothing, and the sums
    stay in fp32, which a bf16 product does not give.

    PyTorch has this switch for the whole process: an fp32 product that another thread begins meanwhile runs so too.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    # One thread at a time: another would take the switched value for the one to put back, and leave it for good.
    with _SWITCH:
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def _tile_shape(num_rows: int, vocab_size: int, max_bytes: int, itemsize: int) -> tuple[int, int]:
    """Rows and vocabulary entries of a tile: many rows (the weight is upcast once a tile), then all the width left."""
    elements = max(1, max_bytes // itemsize)
    rows = max(1, min(num_rows, 512, elements))
    return rows, max(1, min(vocab_size, elements // rows))
