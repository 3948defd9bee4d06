"""Who computes the answer NLL: fastscore's two paths and its public call, and the peers.

All take ``hidden_ND``, ``weight_VD`` and ``target_N`` and give the NLL of each row; fastscore also gives the top token.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fastscore_kernels.answer_nll import answer_nll
from fastscore_kernels.partials import Partials, nll_from_partials

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

ANSWER_NLL, FUSED, GEMM_PATH = "answer_nll", "fused", "gemm"
OURS = (ANSWER_NLL, FUSED, GEMM_PATH)
TORCH_CHUNKED = "torch-chunked"
PEERS = ("cce", "liger", TORCH_CHUNKED, "F.linear_ce", "F.linear_ce-chunked")

PEER_TOLERANCE = 0.15
"""In nats; peers that round logits or losses to bf16 (a loss of 12 to 0.03) are not held to our own tolerance."""
CHUNK_BYTES = 512 << 20
"""Of fp32 logits at a time in ``torch-chunked``."""


@dataclass(frozen=True, slots=True)
class Contender:
    """``captured`` is what a CUDA graph may hold in its place; None where the call waits for the host."""

    name: str
    compute: Compute
    captured: Compute | None


def find_contenders(device: torch.device, names: tuple[str, ...]) -> tuple[list[Contender], dict[str, str]]:
    """Those that can run, and why the others cannot."""
    found: list[Contender] = []
    absent: dict[str, str] = {}
    for name in names:
        try:
            found.append(_MAKERS[name](device))
        except (ImportError, NotImplementedError) as error:
            absent[name] = str(error)
    return found, absent


def _public(device: torch.device) -> Contender:
    return Contender(ANSWER_NLL, answer_nll, answer_nll)


def _path(name: str) -> Callable[[torch.device], Contender]:
    """One of the two paths that the public call chooses from on a GPU."""

    def make(device: torch.device) -> Contender:
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise NotImplementedError("runs on a GPU, or anywhere with TRITON_INTERPRET=1")
        from fastscore_kernels.fused_launch import fused_partials, gemm_partials

        partials: Callable[..., Partials] = fused_partials if name == FUSED else gemm_partials

        def compute(
            hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            parts = partials(hidden_ND, weight_VD, target_N[:, None])
            return nll_from_partials(parts)[:, 0], parts.top1_A

        return Contender(name, compute, compute)

    return make


def _cce(device: torch.device) -> Contender:
    if device.type != "cuda":
        raise NotImplementedError("runs on a GPU only")
    from cut_cross_entropy import linear_cross_entropy
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel
    from cut_cross_entropy.indexed_dot import indexed_neg_dot_forward_kernel

    def compute(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        return linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="none"), None

    def kernels_alone(
        hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        # The public call looks for ignored targets on the host before it launches these.
        lse_N = cce_lse_forward_kernel(hidden_ND, weight_VD)
        return indexed_neg_dot_forward_kernel(hidden_ND, weight_VD, target_N, out_dtype=lse_N.dtype).add_(lse_N), None

    return Contender("cce", compute, kernels_alone)


def _liger(device: torch.device) -> Contender:
    if device.type != "cuda":
        raise NotImplementedError("runs on a GPU only")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def compute(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        bias, class_weight, ignored, z_loss, smoothing = None, None, -100, 0.0, 0.0
        loss_N, *_ = LigerFusedLinearCrossEntropyFunction.apply(
            hidden_ND, weight_VD, target_N, bias, class_weight, ignored, z_loss, smoothing, "none"
        )
        return loss_N, None

    return Contender("liger", compute, None)  # It counts the targets on the host.


def _torch_chunked(device: torch.device) -> Contender:
    def compute(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = max(1, CHUNK_BYTES // (4 * weight_VD.shape[0]))
        nll_N = torch.empty(len(target_N), dtype=torch.float32, device=target_N.device)
        for first in range(0, len(target_N), rows):
            chunk = slice(first, first + rows)
            nll_N[chunk] = F.cross_entropy(_fp32_logits(hidden_ND[chunk], weight_VD), target_N[chunk], reduction="none")
        return nll_N, None

    return Contender(TORCH_CHUNKED, compute, compute)


def _fp32_logits(hidden_nD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    if hidden_nD.is_cuda and hidden_nD.dtype != torch.float32:
        return torch.mm(hidden_nD, weight_VD.T, out_dtype=torch.float32)
    return (hidden_nD @ weight_VD.T).float()


def _linear_cross_entropy(chunked: bool) -> Callable[[torch.device], Contender]:
    name = PEERS[4] if chunked else PEERS[3]

    def make(device: torch.device) -> Contender:
        if not hasattr(F, "linear_cross_entropy"):
            raise NotImplementedError(f"torch {torch.__version__} has none")
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None

        def compute(
            hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor
        ) -> tuple[torch.Tensor, None]:
            return F.linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="none", options=options), None

        return Contender(name, compute, None if chunked else compute)

    return make


_MAKERS: dict[str, Callable[[torch.device], Contender]] = {
    ANSWER_NLL: _public,
    FUSED: _path(FUSED),
    GEMM_PATH: _path(GEMM_PATH),
    "cce": _cce,
    "liger": _liger,
    TORCH_CHUNKED: _torch_chunked,
    "F.linear_ce": _linear_cross_entropy(False),
    "F.linear_ce-chunked": _linear_cross_entropy(True),
}
