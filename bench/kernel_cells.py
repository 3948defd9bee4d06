"""The shapes at which the answer NLL is measured, their random inputs, and the fp64 truth about them.

Shapes: N answer rows, D hidden size, V vocabulary; a suffix of ``r`` marks the rows that are checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from fastscore_kernels.answer_nll_reference import answer_nll_reference

CHECKED_ROWS = 256
"""fp64 is slow: where there are more rows, this many, evenly spread, are compared with it."""
TRUTH_BYTES = 1 << 30
"""Of fp64 weight in memory at a time."""


@dataclass(frozen=True, slots=True)
class Cell:
    """N rows against the LM head ``[V, D]``."""

    num_rows: int
    hidden_size: int
    vocab_size: int

    def __str__(self) -> str:
        return f"N{self.num_rows}-D{self.hidden_size}-V{self.vocab_size}"

    @property
    def flops(self) -> int:
        return 2 * self.num_rows * self.hidden_size * self.vocab_size

    def bytes_moved(self, itemsize: int) -> int:
        """Each input read once, each output (NLL and top token) and target once."""
        return (self.num_rows + self.vocab_size) * self.hidden_size * itemsize + self.num_rows * (8 + 4 + 8)

    def logits_bytes(self) -> int:
        """Of the fp32 logits that nobody should need."""
        return 4 * self.num_rows * self.vocab_size


def make_weights(cell: Cell, dtype: torch.dtype, device: torch.device, cache_bytes: int) -> list[torch.Tensor]:
    """LM heads of random weights, as many as make the cache useless: eight times what it holds."""
    weight_bytes = cell.vocab_size * cell.hidden_size * dtype.itemsize
    copies = max(1, math.ceil(8 * cache_bytes / weight_bytes))
    # Logits with a standard deviation of two nats.
    scale = 2 / cell.hidden_size**0.5
    shape = (cell.vocab_size, cell.hidden_size)
    return [torch.randn(shape, dtype=dtype, device=device).mul_(scale) for _ in range(copies)]


def make_rows(cell: Cell, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and targets, the first and the last token among them."""
    hidden_ND = torch.randn(cell.num_rows, cell.hidden_size, dtype=dtype, device=device)
    target_N = torch.randint(cell.vocab_size, (cell.num_rows,), device=device)
    target_N[-1] = 0
    target_N[0] = cell.vocab_size - 1
    return hidden_ND, target_N


@dataclass(frozen=True, slots=True)
class Truth:
    """What fp64 says about some rows, and how far the plain reference in the inputs' own dtype is from it."""

    rows: torch.Tensor
    hidden_rD: torch.Tensor
    weight_VD: torch.Tensor
    nll_r: torch.Tensor
    best_r: torch.Tensor
    reference_error: float

    @property
    def tolerance(self) -> float:
        """The reference's own error, and the dtype's precision (or that of the fp32 result, if it is the coarser)."""
        result = 8 * torch.finfo(torch.float32).eps * float(self.nll_r.abs().max())
        return self.reference_error + max(torch.finfo(self.weight_VD.dtype).eps, result)


def find_truth(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor) -> Truth:
    num_rows = hidden_ND.shape[0]
    count = min(num_rows, CHECKED_ROWS)
    rows = torch.linspace(0, num_rows - 1, count, device=hidden_ND.device).round().long()
    hidden_rD, target_r = hidden_ND[rows], target_N[rows]
    hidden64_rD = hidden_rD.double()
    lse_r = torch.full((count,), -torch.inf, dtype=torch.float64, device=hidden_ND.device)
    best_r = lse_r.clone()
    step = max(1, TRUTH_BYTES // (8 * weight_VD.shape[1]))
    for first_v in range(0, weight_VD.shape[0], step):
        logits_rv = hidden64_rD @ weight_VD[first_v : first_v + step].double().T
        lse_r = torch.logaddexp(lse_r, logits_rv.logsumexp(dim=1))
        best_r = torch.maximum(best_r, logits_rv.amax(dim=1))
    nll_r = lse_r - _logit(hidden_rD, weight_VD, target_r)
    reference_r, _ = answer_nll_reference(hidden_rD, weight_VD, target_r)
    error = float((reference_r - nll_r).abs().max())
    return Truth(rows, hidden_rD, weight_VD, nll_r, best_r, error)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a contender is from the truth, in nats; of the rows that fp64 looked at, except where it says all."""

    max_error: float | None
    """None where a result is not finite."""
    mean_error: float | None
    all_rows_difference: float | None
    """Largest difference, over all rows, from an independent computation of theirs."""
    top1_error: float | None
    """By how much a top token's logit falls short of the best; None where the contender names none."""
    agrees: bool

    def report(self) -> dict[str, float | bool | None]:
        return asdict(self)


def compare_with_truth(
    nll_N: torch.Tensor, top1_N: torch.Tensor | None, truth: Truth, others_N: torch.Tensor, tolerance: float
) -> Agreement:
    """Within the tolerance of the truth, every row finite, and all rows within twice the tolerance of the others'."""
    nll_N = nll_N.double()
    if nll_N.shape != others_N.shape or not bool(nll_N.isfinite().all()):
        return Agreement(None, None, None, None, False)
    error_r = (nll_N[truth.rows] - truth.nll_r).abs()
    apart = float((nll_N - others_N).abs().max())
    top1_error = None
    if top1_N is not None:
        inside = bool(((top1_N >= 0) & (top1_N < truth.weight_VD.shape[0])).all())
        if not inside:
            return Agreement(float(error_r.max()), float(error_r.mean()), apart, None, False)
        top1_error = float((truth.best_r - _logit(truth.hidden_rD, truth.weight_VD, top1_N[truth.rows])).max())
    agrees = float(error_r.max()) <= tolerance and apart <= 2 * tolerance and (top1_error or 0.0) <= tolerance
    return Agreement(float(error_r.max()), float(error_r.mean()), apart, top1_error, agrees)


def parse_shapes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """``4096x128256`` is D and V."""
    shapes = []
    for text in texts:
        hidden_size, _, vocab_size = text.partition("x")
        if not (hidden_size.isdigit() and vocab_size.isdigit()):
            raise SystemExit(f"a shape is written DxV, 4096x128256 for one; found {text!r}")
        shapes.append((int(hidden_size), int(vocab_size)))
    return shapes


def _logit(hidden_rD: torch.Tensor, weight_VD: torch.Tensor, token_r: torch.Tensor) -> torch.Tensor:
    return (hidden_rD.double() * weight_VD[token_r].double()).sum(dim=1)
