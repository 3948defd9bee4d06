"""Where the answer NLL is easily wrong: ties, infinities, NaN, large logits, odd strides. Kernels and reference alike.

Shapes: A answer rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from fastscore_kernels.launch_configs import LaunchConfig
from fastscore_kernels.partials import combine_partials, nll_from_partials
from nll_truth import ALL_COMPUTES, COMPUTES, DEVICE, LAYOUTS, Inputs, check, find_truth, fused, make_inputs
from nll_truth import poisoned_memory as poison

# NumPy's, about the infinities and NaNs that are the point here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
COMPUTE = pytest.mark.parametrize("compute", ALL_COMPUTES)
KERNEL = pytest.mark.parametrize("compute", COMPUTES)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    with poison():
        yield


def integers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """From -2 to 2: their products and sums are exact in every dtype."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed))


# Tiles of 128 tokens and splits of one tile (389 tokens in three): the winners lie in one tile, in neighbouring ones,
# in different splits, at the ends, everywhere.
WINNERS = {
    "one-tile": [5, 6, 120],
    "neighbours": [127, 128],
    "splits": [200, 300],
    "ends": [0, 388],
    "last-tile": [384, 388],
    "all": list(range(389)),
}


@DTYPE
@COMPUTE
def test_lowest_token_wins_ties(compute: str, dtype: torch.dtype) -> None:
    """One row for each set of winners; the hidden entry that is its own makes their logits 100, all others are 0."""
    weight_VD = torch.zeros(389, len(WINNERS))
    for row, winners in enumerate(WINNERS.values()):
        weight_VD[winners, row] = 10
    hidden_AD = 10 * torch.eye(len(WINNERS))
    target_AJ = torch.zeros(len(WINNERS), 1, dtype=torch.int64)
    inputs = Inputs(hidden_AD.to(DEVICE, dtype), weight_VD.to(DEVICE, dtype), target_AJ.to(DEVICE))
    partials = ALL_COMPUTES[compute]()(inputs)
    assert partials.top1_A.tolist() == [winners[0] for winners in WINNERS.values()]
    check(partials, inputs)


@COMPUTE
def test_random_ties(compute: str) -> None:
    """Few distinct logits, so that nearly every row's best one is shared."""
    hidden_AD, weight_VD = integers((40, 4), 3), integers((389, 4), 4)
    logits_AV = hidden_AD @ weight_VD.T
    best_AV = logits_AV == logits_AV.amax(dim=1, keepdim=True)
    assert int((best_AV.sum(dim=1) > 1).sum()) > 20
    inputs = Inputs(hidden_AD.float().to(DEVICE), weight_VD.float().to(DEVICE), torch.zeros(40, 1).long().to(DEVICE))
    partials = ALL_COMPUTES[compute]()(inputs)
    assert partials.top1_A.tolist() == [int(row_V.nonzero()[0]) for row_V in best_AV]


@pytest.mark.parametrize("num_splits", [1, 2, 4, 7])
@pytest.mark.parametrize("vocab_first", [False, True])
def test_ties_for_every_number_of_splits(num_splits: int, vocab_first: bool) -> None:
    hidden_AD, weight_VD = integers((17, 6), 5).float(), integers((389, 6), 6).float()
    logits_AV = hidden_AD @ weight_VD.T
    inputs = Inputs(hidden_AD.to(DEVICE), weight_VD.to(DEVICE), torch.zeros(17, 1).long().to(DEVICE))
    config = LaunchConfig(16, 64, 16, vocab_first, 4, 2)
    first_A = [int((row_V == row_V.max()).nonzero()[0]) for row_V in logits_AV]
    assert fused(config, num_splits)(inputs).top1_A.tolist() == first_A


@DTYPE
@COMPUTE
def test_identical_logits_give_log_v(compute: str, dtype: torch.dtype) -> None:
    hidden_AD = torch.zeros(3, 64, device=DEVICE, dtype=dtype)
    hidden_AD[1:] = integers((2, 64), 7).to(DEVICE, dtype)
    weight_VD = torch.full((1021, 64), 3.0, device=DEVICE, dtype=dtype)
    target_AJ = torch.tensor([[0, 1020], [511, 512], [1020, 0]], device=DEVICE)
    partials = ALL_COMPUTES[compute]()(Inputs(hidden_AD, weight_VD, target_AJ))
    error_AJ = nll_from_partials(partials).double() - math.log(1021)
    assert float(error_AJ.abs().max()) <= torch.finfo(torch.float32).eps * math.log(1021)
    assert partials.top1_A.tolist() == [0, 0, 0]


@COMPUTE
@pytest.mark.parametrize("constant", [-4096.0, 64.0, 4096.0])
def test_a_constant_added_to_all_logits_changes_nothing(compute: str, constant: float) -> None:
    """Logits that are multiples of 1/64, so that they hold the constant without rounding."""
    hidden_AD, weight_VD = integers((9, 16), 8).float() / 8, integers((300, 16), 9).float() / 8
    target_AJ = torch.arange(9)[:, None] * 37 % 300
    bias = torch.full((300,), constant, device=DEVICE)
    plain = Inputs(hidden_AD.to(DEVICE), weight_VD.to(DEVICE), target_AJ.to(DEVICE))
    shifted = Inputs(*(plain.hidden_AD, plain.weight_VD, plain.target_AJ), bias=bias)
    before, after = (ALL_COMPUTES[compute]()(inputs) for inputs in (plain, shifted))
    assert torch.equal(nll_from_partials(before), nll_from_partials(after))
    assert torch.equal(before.top1_A, after.top1_A)


@COMPUTE
@pytest.mark.parametrize("logit_std", [1e-4, 1e2, 1e4])
def test_small_and_very_large_logits(compute: str, logit_std: float) -> None:
    inputs = make_inputs(18, 80, 389, num_targets=2, logit_std=logit_std)
    check(ALL_COMPUTES[compute]()(inputs), inputs)


@COMPUTE
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_all_logits_far_from_zero(compute: str, offset: float) -> None:
    inputs = make_inputs(18, 80, 389, bias=torch.full((389,), offset, device=DEVICE))
    check(ALL_COMPUTES[compute]()(inputs), inputs)


@COMPUTE
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_hidden_state_that_is_not_finite_spoils_its_row_alone(compute: str, value: float) -> None:
    """Weights of both signs: the row has logits of +inf, -inf or NaN, and no softmax."""
    inputs = make_inputs(20, 64, 300)
    sound = nll_from_partials(ALL_COMPUTES[compute]()(inputs))
    inputs.hidden_AD[7, 3] = value
    partials = ALL_COMPUTES[compute]()(inputs)
    nll_A = nll_from_partials(partials)[:, 0]
    others_A = torch.arange(20, device=DEVICE) != 7
    assert math.isnan(nll_A[7])
    assert torch.equal(nll_A[others_A], sound[others_A, 0])
    assert 0 <= int(partials.top1_A[7]) < 300


@COMPUTE
def test_nan_is_not_hidden_by_the_soft_cap(compute: str) -> None:
    inputs = make_inputs(4, 64, 300, logit_softcap=5.0)
    inputs.hidden_AD[2, 3] = math.nan
    assert nll_from_partials(ALL_COMPUTES[compute]()(inputs)).isnan()[:, 0].tolist() == [False, False, True, False]


@COMPUTE
def test_nan_in_one_weight_spoils_every_row(compute: str) -> None:
    inputs = make_inputs(4, 64, 300)
    inputs.weight_VD[299, 5] = math.nan
    assert bool(nll_from_partials(ALL_COMPUTES[compute]()(inputs)).isnan().all())


@COMPUTE
def test_rows_of_nothing_but_minus_infinity(compute: str) -> None:
    """No softmax: NaN, as log_softmax gives, and token 0. The other rows do not notice."""
    inputs = make_inputs(5, 64, 300)
    inputs.weight_VD.abs_().add_(0.1)
    inputs.hidden_AD[3] = -math.inf
    partials = ALL_COMPUTES[compute]()(inputs)
    assert math.isnan(nll_from_partials(partials)[3, 0])
    assert float(partials.best_A[3]) == -math.inf
    assert float(partials.sumexp_A[3]) == 0
    assert int(partials.top1_A[3]) == 0
    rest = [0, 1, 2, 4]
    others = Inputs(inputs.hidden_AD[rest], inputs.weight_VD, inputs.target_AJ[rest])
    check(type(partials)(*(part[rest] for part in partials)), others)


@COMPUTE
@pytest.mark.parametrize("first", [0, 100, 128, 256, 388])
def test_minus_infinity_in_the_bias(compute: str, first: int) -> None:
    """Whole tiles and splits of it before or behind what counts; a target on it has an NLL of +inf."""
    for here in (slice(first, None), slice(None, first + 1)):
        bias = torch.full((389,), -math.inf)
        bias[here] = torch.linspace(-1, 1, 389)[here]
        inputs = make_inputs(18, 32, 389, num_targets=2, bias=bias.to(DEVICE))
        inputs.target_AJ[0, 0] = 0
        inputs.target_AJ[0, 1] = 388
        partials = ALL_COMPUTES[compute]()(inputs)
        check(partials, inputs)
        nll_AJ = nll_from_partials(partials)
        assert torch.equal(nll_AJ.isposinf(), inputs.bias[inputs.target_AJ].isneginf())


@COMPUTE
def test_targets_at_both_ends(compute: str) -> None:
    inputs = make_inputs(2, 32, 300)
    inputs.target_AJ[:, 0] = torch.tensor([0, 299])
    logprobs_AV = find_truth(inputs).logits_AV.log_softmax(dim=1)
    nll_A = nll_from_partials(ALL_COMPUTES[compute]()(inputs))[:, 0]
    expected = [-float(logprobs_AV[0, 0]), -float(logprobs_AV[1, 299])]
    assert nll_A.tolist() == pytest.approx(expected, rel=1e-5)


@KERNEL
def test_strides(compute: str) -> None:
    """Hidden states, weight, bias and targets that are views of larger tensors give what their copies give."""
    inputs = make_inputs(9, 64, 300, num_targets=2, bias=torch.linspace(-1, 1, 300, device=DEVICE))
    expected = COMPUTES[compute]()(inputs)
    check(expected, inputs)

    def spread(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The same values, each second along a dimension of a tensor whose others are NaN or a wrong token."""
        other = torch.full_like(tensor, math.nan if tensor.is_floating_point() else 7)
        return torch.stack([tensor, other], dim=dim + 1).flatten(dim, dim + 1).unfold(dim, 1, 2).squeeze(-1)

    hidden_AD, weight_VD, target_AJ, bias = inputs.hidden_AD, inputs.weight_VD, inputs.target_AJ, inputs.bias
    assert bias is not None
    for name, variant in {
        "transposed hidden": Inputs(hidden_AD.T.contiguous().T, weight_VD, target_AJ, bias),
        "spread rows of hidden": Inputs(spread(hidden_AD, 0), weight_VD, target_AJ, bias),
        "spread columns of hidden": Inputs(spread(hidden_AD, 1), weight_VD, target_AJ, bias),
        "weight in a wider one": Inputs(hidden_AD, spread(weight_VD, 0), target_AJ, bias),
        "spread targets": Inputs(hidden_AD, weight_VD, spread(target_AJ, 1), bias),
        "transposed targets": Inputs(hidden_AD, weight_VD, target_AJ.T.contiguous().T, bias),
        "spread bias": Inputs(hidden_AD, weight_VD, target_AJ, spread(bias, 0)),
    }.items():
        found = COMPUTES[compute]()(variant)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs), name


@KERNEL
def test_one_hidden_state_for_all_rows(compute: str) -> None:
    """A row stride of 0, which the copy engine does not take."""
    single = make_inputs(1, 64, 300)
    inputs = Inputs(single.hidden_AD.expand(20, 64), single.weight_VD, torch.arange(20, device=DEVICE)[:, None])
    check(COMPUTES[compute]()(inputs), inputs)


@KERNEL
def test_same_bits_every_time(compute: str) -> None:
    inputs = make_inputs(33, 72, 389, num_targets=2, logit_softcap=20.0)
    first, second = (COMPUTES[compute]()(inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_do_not_depend_on_their_neighbours(layout: str) -> None:
    """The same bits alone as among others, with the same splits."""
    inputs = make_inputs(40, 64, 300)
    if DEVICE.type == "cpu":
        # NumPy's product, which the interpreter calls, may add up a row otherwise where it stands elsewhere in a tile.
        # Sums of small integers are exact in any order.
        exact = ((16 * each).round() / 16 for each in (inputs.hidden_AD, inputs.weight_VD))
        inputs = Inputs(*exact, inputs.target_AJ)
    together = fused(LAYOUTS[layout])(inputs)
    for row in (0, 17, 39):
        here = slice(row, row + 1)
        alone = fused(LAYOUTS[layout])(Inputs(inputs.hidden_AD[here], inputs.weight_VD, inputs.target_AJ[here]))
        assert all(torch.equal(one, many[here]) for one, many in zip(alone, together, strict=True))


@KERNEL
@pytest.mark.parametrize("borders", [[0, 389], [0, 1, 389], [0, 128, 200, 388, 389]])
def test_shards_combine_to_the_whole(compute: str, borders: list[int]) -> None:
    """Parts of the vocabulary, each with the kernel, combined in plain PyTorch."""
    inputs = make_inputs(9, 64, 389, num_targets=2, bias=torch.linspace(-1, 1, 389, device=DEVICE))
    parts = []
    for first, last in pairwise(borders):
        assert inputs.bias is not None
        shard = Inputs(
            inputs.hidden_AD, inputs.weight_VD[first:last], inputs.target_AJ - first, inputs.bias[first:last]
        )
        part = COMPUTES[compute]()(shard)
        parts.append(part._replace(top1_A=part.top1_A + first))
    check(combine_partials(parts), inputs)
