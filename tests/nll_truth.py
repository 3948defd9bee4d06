"""The independent truth for the answer NLL: fp64 logits of the same inputs, whole, and what follows from them.

Shapes: A answer rows, J targets per row, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastscore_kernels.answer_nll_reference import answer_nll_partials_reference, answer_nll_reference
from fastscore_kernels.launch_configs import LaunchConfig
from fastscore_kernels.partials import Partials, nll_from_partials

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Small blocks: the interpreter's time is that of the number of programs and steps. All of them also run on a GPU.
ROWS_FIRST = LaunchConfig(32, 128, 64, False, 4, 3)
VOCAB_FIRST = LaunchConfig(16, 128, 64, True, 4, 3)
LAYOUTS = {
    "rows-ptr": ROWS_FIRST,
    "rows-tma": LaunchConfig(32, 128, 64, False, 4, 3, use_tma=True),
    "vocab-ptr": VOCAB_FIRST,
    "vocab-tma": LaunchConfig(16, 128, 64, True, 4, 3, use_tma=True),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call."""

    hidden_AD: torch.Tensor
    weight_VD: torch.Tensor
    target_AJ: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"bias": self.bias, "logit_scale": self.logit_scale, "logit_softcap": self.logit_softcap}


@dataclass(frozen=True, slots=True)
class Truth:
    """In fp64."""

    logits_AV: torch.Tensor
    nll_AJ: torch.Tensor
    lse_A: torch.Tensor


def make_inputs(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    num_targets: int = 1,
    logit_std: float = 2.0,
    seed: int = 0,
    **options: Any,
) -> Inputs:
    """Random inputs whose logits have that standard deviation; the first and the last token are among the targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden_AD = normal(num_rows, hidden_size)
    weight_VD = normal(vocab_size, hidden_size) * (logit_std / hidden_size**0.5)
    target_AJ = torch.randint(vocab_size, (num_rows, num_targets), generator=generator)
    target_AJ.view(-1)[:1] = vocab_size - 1
    target_AJ.view(-1)[-1:] = 0
    return Inputs(hidden_AD.to(DEVICE, dtype), weight_VD.to(DEVICE, dtype), target_AJ.to(DEVICE), **options)


def find_truth(inputs: Inputs) -> Truth:
    logits_AV = inputs.hidden_AD.double() @ inputs.weight_VD.double().T
    if inputs.bias is not None:
        logits_AV = logits_AV + inputs.bias.double()
    logits_AV = logits_AV * inputs.logit_scale
    if inputs.logit_softcap is not None:
        logits_AV = inputs.logit_softcap * torch.tanh(logits_AV / inputs.logit_softcap)
    lse_A = logits_AV.logsumexp(dim=1)
    return Truth(logits_AV, lse_A[:, None] - logits_AV.gather(1, inputs.target_AJ), lse_A)


Compute = Callable[[Inputs], Partials]


def fused(config: LaunchConfig | None = ROWS_FIRST, num_splits: int | None = 3, **more: Any) -> Compute:
    """With None what a call would get: the shipped configuration, as many splits as suit the device."""
    from fastscore_kernels.fused_launch import fused_partials

    def compute(inputs: Inputs) -> Partials:
        arguments = (inputs.hidden_AD, inputs.weight_VD, inputs.target_AJ)
        return fused_partials(*arguments, **inputs.options, config=config, num_splits=num_splits, **more)

    return compute


def gemm(**more: Any) -> Compute:
    from fastscore_kernels.fused_launch import gemm_partials

    def compute(inputs: Inputs) -> Partials:
        return gemm_partials(inputs.hidden_AD, inputs.weight_VD, inputs.target_AJ, **inputs.options, **more)

    return compute


def reference(**more: Any) -> Compute:
    def compute(inputs: Inputs) -> Partials:
        arguments = (inputs.hidden_AD, inputs.weight_VD, inputs.target_AJ)
        return answer_nll_partials_reference(*arguments, **inputs.options, **more)

    return compute


# Both kernels, the fused one with rows and with vocabulary on the wide axis. Several tiles, splits and chunks each.
COMPUTES: dict[str, Callable[[], Compute]] = {
    **{name: (lambda config=config: fused(config)) for name, config in LAYOUTS.items()},
    "gemm": lambda: gemm(max_logits_bytes=1),
}
# For tests that the reference has to pass as well.
ALL_COMPUTES = {**COMPUTES, "reference": lambda: reference(max_logits_bytes=2000)}


def tolerance(inputs: Inputs, truth: Truth) -> float:
    """The reference's own error with the same inputs, and eps(fp32) at the size of what is subtracted.

    The reference's error is its largest over every token of the vocabulary as a target: that of the few targets alone
    may be small by luck. The NLL is the difference of an LSE and a logit, and fp32 holds either, of size x, only to
    eps(fp32) * x.
    """
    every_AV = torch.arange(inputs.weight_VD.shape[0], device=DEVICE).expand_as(truth.logits_AV)
    reference_AV, _ = answer_nll_reference(inputs.hidden_AD, inputs.weight_VD, every_AV, **inputs.options)
    error_AV = (reference_AV.double() - (truth.lse_A[:, None] - truth.logits_AV)).abs()
    targets_AJ = truth.logits_AV.gather(1, inputs.target_AJ)
    sizes = torch.cat([torch.ones_like(truth.lse_A[:1]), truth.lse_A.abs(), targets_AJ.abs().flatten()])
    finite = sizes[sizes.isfinite()]
    return float(error_AV[error_AV.isfinite()].max()) + torch.finfo(torch.float32).eps * float(finite.max())


def check(partials: Partials, inputs: Inputs, *, top1: bool = True) -> None:
    """NLL within the tolerance of the truth, finite where that is; the top token's true logit is the best one's."""
    truth = find_truth(inputs)
    nll_AJ = nll_from_partials(partials)
    assert nll_AJ.dtype == torch.float32
    assert nll_AJ.shape == inputs.target_AJ.shape
    if nll_AJ.numel() == 0:
        return
    allowed = tolerance(inputs, truth)
    special_AJ = ~truth.nll_AJ.isfinite()
    assert torch.equal(nll_AJ[special_AJ].double().nan_to_num(nan=-1.0), truth.nll_AJ[special_AJ].nan_to_num(nan=-1.0))
    error = float((nll_AJ.double() - truth.nll_AJ)[~special_AJ].abs().max())
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    if top1:
        check_top1(partials.top1_A, inputs, truth)


def check_top1(top1_A: torch.Tensor, inputs: Inputs, truth: Truth) -> None:
    """fp32 cannot tell logits apart that differ by less than its rounding; a top token may be any of those."""
    assert top1_A.dtype == torch.int64
    assert int(top1_A.min()) >= 0
    assert int(top1_A.max()) < inputs.weight_VD.shape[0]
    best_A = truth.logits_AV.amax(dim=1)
    found_A = truth.logits_AV.gather(1, top1_A[:, None])[:, 0]
    size_A = inputs.hidden_AD.double().norm(dim=1) * inputs.weight_VD.double().norm(dim=1).max() + best_A.abs()
    assert bool((best_A - found_A <= torch.finfo(torch.float32).eps * size_A * abs(inputs.logit_scale)).all())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN, and the largest integer: what is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # Only warned of: cuBLAS asks for a workspace setting that has nothing to do with this.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
