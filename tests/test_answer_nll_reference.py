"""The PyTorch reference against full fp64 logits, its budget, its errors; and the custom operator around it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastscore_kernels.answer_nll import answer_nll, answer_nll_path
from fastscore_kernels.answer_nll_reference import answer_nll_partials_reference, answer_nll_reference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = [(1, 1, 1), (3, 5, 2), (17, 33, 251), (63, 123, 1021), (64, 64, 4096), (600, 16, 300)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"logit_softcap": 5.0},
    "all": {"bias": True, "logit_scale": 0.3, "logit_softcap": 5.0},
}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    num_rows, hidden_size, vocab_size = shape
    generator = torch.Generator().manual_seed(seed)
    hidden_AD = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    weight_VD = torch.randn(vocab_size, hidden_size, generator=generator).to(dtype)
    target_A = torch.randint(vocab_size, (num_rows,), generator=generator)
    target_A[0], target_A[-1] = 0, vocab_size - 1
    return hidden_AD, weight_VD, target_A, torch.randn(vocab_size, generator=generator)


def full_logits(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> torch.Tensor:
    """fp64, whole."""
    logits_AV = hidden_AD.double() @ weight_VD.double().T
    logits_AV = logit_scale * (logits_AV if bias is None else logits_AV + bias.double())
    return logits_AV if logit_softcap is None else logit_softcap * torch.tanh(logits_AV / logit_softcap)


def shape_id(shape: tuple[int, int, int]) -> str:
    return "A{}-D{}-V{}".format(*shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_equals_full_logits(shape: tuple[int, int, int], name: str, dtype: torch.dtype) -> None:
    hidden_AD, weight_VD, target_A, bias = inputs(shape, dtype)
    options = {**OPTIONS[name], **({"bias": bias} if "bias" in OPTIONS[name] else {})}
    logits_AV = full_logits(hidden_AD, weight_VD, **options)
    truth_A = torch.nn.functional.cross_entropy(logits_AV, target_A, reduction="none")
    # The bound: the rounding of one fp32 product of this length and size, and of the sum over the vocabulary.
    largest = float(logits_AV.abs().max().clamp_min(1))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    bound = 8 * torch.finfo(accumulator).eps * largest * max(1.0, shape[1] ** 0.5 / 4)
    for max_bytes in (16 << 20, 4096, 4):
        if max_bytes == 4 and shape[0] * shape[2] > 5000:
            continue  # a tile for every logit
        nll_A, top1_A = answer_nll_reference(hidden_AD, weight_VD, target_A, max_logits_bytes=max_bytes, **options)
        assert nll_A.dtype == accumulator
        assert (nll_A.double() - truth_A).abs().max() <= bound
        chosen_A = logits_AV.gather(1, top1_A[:, None])[:, 0]
        assert (logits_AV.max(dim=1).values - chosen_A).max() <= bound


@pytest.mark.parametrize("width", [1, 7, 8, 9, 15, 16, 17, 31, 64, 100, 1000, 4097])
def test_lowest_token_wins_ties(width: int) -> None:
    """In every tile width, whatever the vector length of the CPU."""
    generator = torch.Generator().manual_seed(width)
    hidden_AD = torch.randint(-2, 3, (50, 3), generator=generator).float()
    weight_VD = torch.randint(-1, 2, (4099, 3), generator=generator).float()
    logits_AV = hidden_AD @ weight_VD.T
    first_A = (logits_AV == logits_AV.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    expected = [row.index(max(row)) for row in logits_AV.tolist()]
    assert first_A.tolist() == expected
    _, top1_A = answer_nll_reference(
        hidden_AD, weight_VD, torch.zeros(50, dtype=torch.int64), max_logits_bytes=4 * 50 * width
    )
    assert top1_A.tolist() == expected


def test_small_terms_of_a_large_vocabulary_are_not_lost() -> None:
    """One by one to a sum in fp32 they would be: each is less than its last bit. Together they are 1.8e-5 of it."""
    vocab_size, small = 300_001, 6e-11
    weight_VD = torch.full((vocab_size, 1), math.log(small))
    weight_VD[0] = 0.0
    nll_A, _ = answer_nll_reference(torch.ones(3, 1), weight_VD, torch.zeros(3, dtype=torch.int64))
    truth = math.log1p((vocab_size - 1) * small)
    assert nll_A.tolist() == pytest.approx([truth] * 3, abs=1e-6)


def test_a_constant_changes_nothing_and_uniform_logits_give_log_v() -> None:
    hidden_AD, weight_VD, target_A, _ = inputs((9, 4, 77))
    plain, _ = answer_nll(hidden_AD, weight_VD, target_A)
    moved, _ = answer_nll(hidden_AD, weight_VD, target_A, bias=torch.full((77,), 64.0))
    torch.testing.assert_close(moved, plain, rtol=0, atol=64 * 1.2e-7 * 4)
    uniform, top1_A = answer_nll(torch.zeros(9, 4), weight_VD, target_A)
    torch.testing.assert_close(uniform, torch.full((9,), 77.0).log())
    assert top1_A.tolist() == [0] * 9


@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_extreme_logits(size: float) -> None:
    weight_VD = torch.tensor([[1.0], [0.5], [1.0]])
    nll_A, top1_A = answer_nll(torch.tensor([[size]]), weight_VD, torch.tensor([0]))
    expected = full_logits(torch.tensor([[size]]), weight_VD).log_softmax(dim=1)
    assert nll_A.item() == pytest.approx(-expected[0, 0].item(), rel=1e-6)
    assert top1_A.item() == (0 if size > 0 else 1)


def test_minus_infinity_and_nan() -> None:
    hidden_AD, weight_VD, _, _ = inputs((3, 4, 10))
    bias = torch.zeros(10)
    bias[[2, 7]] = -torch.inf
    nll_A, top1_A = answer_nll(hidden_AD, weight_VD, torch.tensor([2, 3, 9]), bias=bias)
    assert nll_A[0] == torch.inf
    truth = full_logits(hidden_AD, weight_VD, bias).log_softmax(dim=1)
    assert nll_A[1:].tolist() == pytest.approx([-truth[1, 3].item(), -truth[2, 9].item()], abs=1e-5)
    assert not set(top1_A.tolist()) & {2, 7}
    assert answer_nll(hidden_AD, weight_VD, torch.zeros(3).long(), bias=bias - torch.inf)[0].isnan().all()
    hidden_AD[1, 0] = torch.nan
    nll_A, _ = answer_nll(hidden_AD, weight_VD, torch.tensor([1, 1, 1]))
    assert nll_A.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("num_targets", [1, 3, 20])
def test_targets_that_share_a_row(num_targets: int) -> None:
    hidden_AD, weight_VD, _, bias = inputs((7, 12, 90))
    target_AJ = torch.randint(90, (7, num_targets), generator=torch.Generator().manual_seed(4))
    nll_AJ, top1_A = answer_nll(hidden_AD, weight_VD, target_AJ, bias=bias)
    assert nll_AJ.shape == target_AJ.shape
    for j in range(num_targets):
        nll_A, best_A = answer_nll(hidden_AD, weight_VD, target_AJ[:, j].contiguous(), bias=bias)
        assert torch.equal(nll_AJ[:, j], nll_A)
        assert torch.equal(top1_A, best_A)


def test_no_rows() -> None:
    _, weight_VD, _, _ = inputs((3, 4, 10))
    nll_A, top1_A = answer_nll(torch.zeros(0, 4), weight_VD, torch.zeros(0, dtype=torch.int64))
    assert (nll_A.shape, top1_A.shape, nll_A.dtype, top1_A.dtype) == ((0,), (0,), torch.float32, torch.int64)


class LargestTensor(TorchDispatchMode):
    """Notes the size in bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.bytes = max(self.bytes, tensor.numel() * tensor.itemsize)
        return result


def test_memory_stays_within_the_budget() -> None:
    """Neither the logits (8 MB here) nor a low-precision weight in fp32 (8 MB) ever exist whole."""
    hidden_AD, weight_VD, target_A, _ = inputs((500, 512, 4096), torch.bfloat16)
    budget = 256 << 10
    with LargestTensor() as largest:
        answer_nll_partials_reference(hidden_AD, weight_VD, target_A, max_logits_bytes=budget)
    # A tile of the weight is as wide as a tile of logits; the hidden states in fp32 are the largest that is left.
    assert 0 < largest.bytes <= max(budget, hidden_AD.numel() * 4)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "hidden-size": ({"hidden_AD": torch.zeros(2, 5)}, r"\(2, 5\) and \(10, 4\)"),
    "hidden-dimensions": ({"hidden_AD": torch.zeros(2, 1, 4)}, "do not fit"),
    "empty-vocabulary": ({"weight_VD": torch.zeros(0, 4)}, "the vocabulary is empty"),
    "target-count": ({"target_A": torch.zeros(3, dtype=torch.int64)}, r"shape \(2,\) or \(2, J\)"),
    "target-dtype": ({"target_A": torch.zeros(2, dtype=torch.int32)}, "torch.int32"),
    "target-high": ({"target_A": torch.tensor([0, 10])}, r"in \[0, 10\); found 10"),
    "target-low": ({"target_A": torch.tensor([-1, 0])}, r"in \[0, 10\); found -1"),
    "bias": ({"bias": torch.zeros(9)}, r"bias must have shape \(10,\)"),
    "integers": ({"hidden_AD": torch.zeros(2, 4, dtype=torch.int64)}, "floating point"),
    "device": ({"target_A": torch.zeros(2, dtype=torch.int64, device="meta")}, "one device"),
    "softcap": ({"logit_softcap": 0.0}, "logit_softcap must be positive; found 0.0"),
    "softcap-nan": ({"logit_softcap": float("nan")}, "logit_softcap must be positive"),
}


@pytest.mark.parametrize("function", [answer_nll, answer_nll_reference])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, function: Any) -> None:
    change, complaint = BAD[name]
    good = {
        "hidden_AD": torch.zeros(2, 4),
        "weight_VD": torch.zeros(10, 4),
        "target_A": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=complaint):
        function(**{**good, **change})


@pytest.mark.parametrize("name", ["plain", "all"])
def test_operator_holds_torchs_rules(name: str) -> None:
    hidden_AD, weight_VD, target_A, bias = inputs((5, 8, 40))
    options = OPTIONS[name]
    torch.library.opcheck(
        torch.ops.fastscore.answer_nll_partials,
        (
            hidden_AD,
            weight_VD,
            target_A[:, None],
            bias if "bias" in options else None,
            options.get("logit_scale", 1.0),
            options.get("logit_softcap"),
            0,
            True,
        ),
    )


@pytest.mark.parametrize("check_targets", [True, False])
def test_compiles_without_a_break(check_targets: bool) -> None:
    hidden_AD, weight_VD, target_A, bias = inputs((6, 8, 40))

    def score(hidden_AD: torch.Tensor) -> torch.Tensor:
        nll_A, top1_A = answer_nll(2 * hidden_AD, weight_VD, target_A, bias=bias, check_targets=check_targets)
        return torch.where(top1_A == target_A, nll_A, nll_A + 1)

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 3):
        hidden = hidden_AD[:rows]
        target_A = inputs((6, 8, 40))[2][:rows]
        torch.testing.assert_close(compiled(hidden), score(hidden))


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        hidden_AD, weight_VD, target_A, _ = inputs((6, 8, 40), dtype)
        for target in (target_A, target_A[:, None].expand(6, 3).contiguous()):
            real = answer_nll(hidden_AD, weight_VD, target)
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                fake = answer_nll(*(mode.from_tensor(tensor) for tensor in (hidden_AD, weight_VD, target)))
            for one, other in zip(real, fake, strict=True):
                assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def test_path_in_words() -> None:
    assert answer_nll_path(torch.device("cpu")) == "reference (PyTorch)"
    assert answer_nll_path(torch.device("cuda")) == "fused (Triton)"
