"""``answer_nll``: log-probabilities of target tokens straight from hidden states and the LM head.

Shapes: A answer rows, J targets per row, D hidden size, V vocabulary.

On a CPU the chunked reference runs, on a GPU the fused Triton kernel, or the library's GEMM with one Triton pass over
each chunk of its logits: where that was measured to be faster (:mod:`fastscore_kernels.path_table`), on architectures
without launch configurations, and for weights whose rows do not start at multiples of 16 entries. A PyTorch custom
operator, so that ``torch.compile`` and fake tensors pass through. Triton is imported at the first call that needs it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fastscore_kernels.answer_nll_reference import answer_nll_partials_reference
from fastscore_kernels.arguments import check_answer_nll_arguments, check_targets_inside
from fastscore_kernels.partials import Partials, nll_from_partials
from fastscore_kernels.path_table import choose_path


def answer_nll(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_A: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    check_targets: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of target tokens, without the ``[A, V]`` logits.

    ``logits = softcap(logit_scale * (hidden_AD @ weight_VD.T + bias))`` with ``softcap(x) = c * tanh(x / c)``, and
    ``nll = logsumexp(logits) - logits[target]``. Products accumulate in fp32, and the target's logit comes from the
    same accumulator as the LSE. The result does not depend on timing: no atomics, sums in a fixed order.

    Args:
        hidden_AD: hidden states ``[A, D]``, fp32, bf16 or fp16 (fp64 on a CPU); A may be 0.
        weight_VD: LM-head weight ``[V, D]``; on a GPU of the same dtype and contiguous along D.
        target_A: int64 ``[A]``, or ``[A, J]`` where J targets share a hidden state: the row's LSE is computed once.
            Where rows have different numbers of targets, repeat one of them. Each in ``[0, V)``.
        bias: optional ``[V]``; entries may be -inf.
        logit_scale: multiplies the logits (after the bias, before the soft cap).
        logit_softcap: c above, or None.
        check_targets: False leaves out the check of the targets where the caller has made it; a target outside
            ``[0, V)`` then gets an NLL of +inf.

    Returns:
        The NLL in nats, fp32, shaped like ``target_A``, and ``top1_A``, the most probable token of each row (int64;
        the lowest token id wins ties).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; on a CPU, a target outside the vocabulary. On
            a GPU the targets are checked by a device-side assertion, so that nothing waits.

    Method: the online softmax of Milakov and Gimelshein, 2018, in the epilogue of the LM head's product, as in Cut
    Cross-Entropy (Wijmans et al., 2024).
    """
    check_answer_nll_arguments(hidden_AD, weight_VD, target_A, bias, logit_softcap)
    target_AJ = target_A[:, None] if target_A.ndim == 1 else target_A
    partials = Partials(
        *torch.ops.fastscore.answer_nll_partials(
            hidden_AD, weight_VD, target_AJ, bias, logit_scale, logit_softcap, 0, check_targets
        )
    )
    return nll_from_partials(partials).reshape(target_A.shape), partials.top1_A


def answer_nll_partials(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_A: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_start: int = 0,
) -> Partials:
    """One shard's contribution, where the vocabulary is split over devices.

    ``weight_VD`` and ``bias`` are the shard ``[vocab_start, vocab_start + V)`` of the whole; targets are tokens of the
    whole vocabulary. Other arguments and errors are those of :func:`answer_nll`; targets are not checked.
    :func:`combine_partials` and :func:`nll_from_partials` make the NLL of it.
    """
    check_answer_nll_arguments(hidden_AD, weight_VD, target_A, bias, logit_softcap)
    target_AJ = target_A[:, None] if target_A.ndim == 1 else target_A
    return Partials(
        *torch.ops.fastscore.answer_nll_partials(
            hidden_AD, weight_VD, target_AJ, bias, logit_scale, logit_softcap, vocab_start, False
        )
    )


def answer_nll_path(device: torch.device) -> str:
    """In words, what computes the answer NLL on a device; for logs and metadata."""
    return "reference (PyTorch)" if device.type == "cpu" else "fused (Triton)"


OPERATOR = "fastscore::answer_nll_partials"
# Defined and implemented one by one: what torch.library.custom_op makes imports torch.compile's code, a second or more,
# when it is first called.
torch.library.define(
    OPERATOR,
    "(Tensor hidden_AD, Tensor weight_VD, Tensor target_AJ, Tensor? bias, float logit_scale, float? logit_softcap, "
    "SymInt vocab_start, bool check_targets) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(OPERATOR, "default")
def _partials_of_tensors(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_AJ: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    vocab_start: int,
    check_targets: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    # Here, because what is looked at in a custom operator breaks no graph.
    if check_targets:
        check_targets_inside(target_AJ, weight_VD.shape[0])
    compute: Callable[..., Partials] = answer_nll_partials_reference
    if hidden_AD.device.type != "cpu":
        from fastscore_kernels.fused_launch import fused_kernel_fits, fused_partials, gemm_partials

        path = choose_path(hidden_AD.device, hidden_AD.shape[0], *weight_VD.shape, weight_VD.dtype)
        compute = fused_partials if path == "fused" and fused_kernel_fits(weight_VD) else gemm_partials
    return compute(
        hidden_AD,
        weight_VD,
        target_AJ,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        vocab_start=vocab_start,
    )


@torch.library.register_fake(OPERATOR)  # type: ignore[untyped-decorator]
def _partials_of_fakes(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_AJ: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    vocab_start: int,
    check_targets: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows = hidden_AD.shape[0]
    accumulator = torch.float64 if hidden_AD.dtype == torch.float64 else torch.float32
    best_A = hidden_AD.new_empty(num_rows, dtype=accumulator)
    return (
        best_A,
        torch.empty_like(best_A),
        hidden_AD.new_empty(target_AJ.shape, dtype=accumulator),
        hidden_AD.new_empty(num_rows, dtype=torch.int64),
    )


def _no_gradient(*_: object) -> None:
    raise RuntimeError("answer_nll has no gradient: it is for scoring, not for training")


torch.library.register_autograd(OPERATOR, _no_gradient)
