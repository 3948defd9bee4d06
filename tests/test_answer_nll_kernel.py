"""The Triton kernels against fp64: shapes, dtypes, layouts, options, splits. In the interpreter, or on a GPU.

Shapes: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fastscore_kernels import fused_launch
from fastscore_kernels.launch_configs import CONFIGS, LaunchConfig
from fastscore_kernels.partials import nll_from_partials
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nll_truth import (
    COMPUTES,
    DEVICE,
    LAYOUTS,
    ROWS_FIRST,
    VOCAB_FIRST,
    Inputs,
    check,
    find_truth,
    fused,
    gemm,
    make_inputs,
)
from nll_truth import poisoned_memory as poison

SHAPES = [
    (0, 64, 128),
    (1, 64, 1000),
    (1, 8, 1),
    (2, 16, 17),
    (3, 7, 2),
    (15, 33, 128),  # V is a tile
    (16, 64, 127),  # V is smaller than a tile
    (17, 65, 129),
    (63, 123, 1021),  # D not a multiple of 16 bytes: pointers
    (64, 128, 1024),
    (65, 120, 1021),  # D a multiple of 16 bytes, not of the block
    (129, 72, 257),
]
IDS = [f"N{n}-D{d}-V{v}" for n, d, v in SHAPES]
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
COMPUTE = pytest.mark.parametrize("compute", COMPUTES)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    with poison():
        yield


def test_uninitialised_memory_is_poisoned() -> None:
    """Otherwise the fixture above would prove nothing."""
    like = torch.zeros(1000)
    for tensor in (torch.empty(1000), torch.empty_like(like), like.new_empty(1000), torch.empty(20, 50).half()):
        assert bool(tensor.isnan().all())
    for dtype in (torch.int32, torch.int64):
        assert bool((torch.empty(1000, dtype=dtype) == torch.iinfo(dtype).max).all())


@LAYOUT
@pytest.mark.parametrize(("n", "d", "v"), SHAPES, ids=IDS)
def test_fused_shapes(n: int, d: int, v: int, layout: str) -> None:
    inputs = make_inputs(n, d, v)
    check(fused(LAYOUTS[layout])(inputs), inputs)


@pytest.mark.parametrize(("n", "d", "v"), SHAPES, ids=IDS)
def test_gemm_shapes(n: int, d: int, v: int) -> None:
    inputs = make_inputs(n, d, v)
    check(gemm(max_logits_bytes=4 * n * 640)(inputs), inputs)


def test_gemm_chunks() -> None:
    """Chunks of 128 tokens, the least that there are; and one of more tokens than the kernel's block."""
    inputs = make_inputs(3, 16, 5000)
    check(gemm(max_logits_bytes=1)(inputs), inputs)
    check(gemm()(inputs), inputs)


@COMPUTE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision(dtype: torch.dtype, compute: str) -> None:
    inputs = make_inputs(33, 120, 521, dtype)
    check(COMPUTES[compute]()(inputs), inputs)


def bias(vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Every third entry is -inf; not those that the inputs' first and last target have."""
    values = torch.linspace(-3, 3, vocab_size).to(dtype)
    values[1:-1:3] = -torch.inf
    return values.to(DEVICE)


OPTIONS = {
    "bias": {"bias": bias(389, torch.float32)},
    "bias-bf16": {"bias": bias(389, torch.bfloat16)},
    "bias-fp64": {"bias": bias(389, torch.float64)},
    "scale": {"logit_scale": 0.0625},
    "negative-scale": {"logit_scale": -3.0},
    "softcap": {"logit_softcap": 2.5},
    "softcap-far": {"logit_softcap": 1e4},
    "all": {"bias": bias(389, torch.float16), "logit_scale": 1.75, "logit_softcap": 30.0},
}


@COMPUTE
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, compute: str) -> None:
    inputs = make_inputs(18, 80, 389, num_targets=2, **OPTIONS[options])
    check(COMPUTES[compute]()(inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@COMPUTE
def test_all_options_in_every_dtype(dtype: torch.dtype, compute: str) -> None:
    inputs = make_inputs(18, 80, 389, dtype, num_targets=3, **OPTIONS["all"])
    check(COMPUTES[compute]()(inputs), inputs)


def test_soft_cap_is_tanh_to_a_few_units_in_the_last_place() -> None:
    """One token of weight 1 and a cap of 1: the capped logits are tanh of the hidden entries."""
    grid_A = torch.cat([torch.logspace(-30, 1.5, 300), torch.linspace(0.15, 0.25, 100), torch.linspace(0, 12, 100)])
    grid_A = torch.cat([-grid_A, grid_A, torch.tensor([0.0, 1e15, -1e15, torch.inf, -torch.inf])]).to(DEVICE)
    target_AJ = torch.zeros(len(grid_A), 1, dtype=torch.int64, device=DEVICE)
    inputs = Inputs(grid_A[:, None], torch.ones(1, 1, device=DEVICE), target_AJ, logit_softcap=1.0)
    found_A = fused(LaunchConfig(256, 16, 16, False, 4, 2), 1)(inputs).target_logit_AJ[:, 0].double()
    expected_A = torch.tanh(grid_A.double())
    assert bool(((found_A - expected_A).abs() <= 4 * torch.finfo(torch.float32).eps * expected_A.abs()).all())


@pytest.mark.parametrize("num_splits", [1, 2, 3, 8, 9, 40, None], ids=lambda splits: f"S{splits}")
@pytest.mark.parametrize("config", [ROWS_FIRST, VOCAB_FIRST], ids=["rows", "vocab"])
def test_splits(num_splits: int | None, config: LaunchConfig) -> None:
    """8 tiles of 128: one split, uneven ones, one each, more splits than tiles or than the combination's block."""
    inputs = make_inputs(17, 32, 1021)
    check(fused(config, num_splits)(inputs), inputs)


SHIPPED = [(arch, case.config, case.itemsize) for arch, cases in CONFIGS.items() for case in cases]


@pytest.mark.parametrize(
    ("arch", "config", "itemsize"), SHIPPED, ids=[f"{arch}-A{config.block_a}-{size}" for arch, config, size in SHIPPED]
)
def test_shipped_configurations(arch: str, config: LaunchConfig, itemsize: int) -> None:
    """A block of rows and a bit, and as many splits as there would be."""
    inputs = make_inputs(config.block_a + 1, 80, 389, torch.float16 if itemsize == 2 else torch.float32, num_targets=2)
    check(fused(config, None)(inputs), inputs)


@pytest.mark.parametrize("row_group", [1, 2, 3, 16])
def test_every_program_does_its_own_part(row_group: int) -> None:
    """Five blocks of rows, in groups that do not divide them, by three splits."""
    config = LaunchConfig(16, 64, 32, False, 4, 2, row_group=row_group)
    inputs = make_inputs(70, 32, 389)
    check(fused(config, 3)(inputs), inputs)


@COMPUTE
def test_without_top1(compute: str) -> None:
    inputs = make_inputs(20, 64, 300)
    computes = {"gemm": gemm(max_logits_bytes=1, top1=False)}
    computes |= {name: fused(config, top1=False) for name, config in LAYOUTS.items()}
    partials = computes[compute](inputs)
    assert partials.top1_A.shape == (0,)
    check(partials, inputs, top1=False)
    with_top1 = COMPUTES[compute]()(inputs)
    assert torch.equal(nll_from_partials(partials), nll_from_partials(with_top1))


@COMPUTE
def test_several_targets_of_a_row_are_each_as_alone(compute: str) -> None:
    inputs = make_inputs(9, 64, 300, num_targets=5)
    inputs.target_AJ[3] = torch.tensor([0, 299, 0, 299, 128], device=inputs.target_AJ.device)  # repeated
    together = COMPUTES[compute]()(inputs)
    check(together, inputs)
    for j in range(5):
        alone = Inputs(inputs.hidden_AD, inputs.weight_VD, inputs.target_AJ[:, j : j + 1])
        nll_A1 = nll_from_partials(COMPUTES[compute]()(alone))
        assert torch.equal(nll_A1, nll_from_partials(together)[:, j : j + 1])


@COMPUTE
def test_no_targets(compute: str) -> None:
    inputs = make_inputs(9, 64, 300, num_targets=0)
    partials = COMPUTES[compute]()(inputs)
    lse_A = find_truth(inputs).lse_A
    assert partials.target_logit_AJ.shape == (9, 0)
    torch.testing.assert_close(partials.best_A + partials.sumexp_A.log(), lse_A.float(), rtol=1e-6, atol=0)


@COMPUTE
def test_a_shard_counts_tokens_over_the_whole_vocabulary(compute: str) -> None:
    """Targets on both sides of the shard have no logit in it, also within the overhang of its last tile."""
    inputs = make_inputs(6, 64, 300)
    inputs.target_AJ[:, 0] = torch.tensor([0, 999, 1000, 1299, 1300, 1 << 40], device=inputs.target_AJ.device)
    shard = {"vocab_start": 1000}
    computes = {"gemm": gemm(max_logits_bytes=1, **shard), **{k: fused(c, **shard) for k, c in LAYOUTS.items()}}
    partials = computes[compute](inputs)
    logits_AV = find_truth(make_inputs(6, 64, 300)).logits_AV
    assert partials.target_logit_AJ[:, 0].isneginf().tolist() == [True, True, False, False, True, True]
    found = partials.target_logit_AJ[2:4, 0].double()
    torch.testing.assert_close(found, logits_AV[[2, 3], [0, 299]], rtol=1e-5, atol=1e-6)
    assert torch.equal(partials.top1_A, logits_AV.argmax(dim=1) + 1000)


def test_tma_is_taken_where_the_strides_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not elsewhere: the copy engine would refuse."""
    made: list[list[int]] = []
    real = fused_launch.TensorDescriptor.from_tensor
    monkeypatch.setattr(
        fused_launch.TensorDescriptor,
        "from_tensor",
        lambda tensor, block: made.append(block) or real(tensor, block),
    )
    tma = LAYOUTS["rows-tma"]
    shapes = [(64, torch.float32, 2), (8, torch.bfloat16, 2), (12, torch.bfloat16, 0), (7, torch.float32, 0)]
    for d, dtype, expected in shapes:
        made.clear()
        inputs = make_inputs(5, d, 100, dtype)
        check(fused(tma)(inputs), inputs)
        assert len(made) == expected, (d, dtype)
    made.clear()
    whole = make_inputs(5, 64, 101)
    shifted_VD = whole.weight_VD.flatten()[1:6401].view(100, 64)
    inputs = Inputs(whole.hidden_AD, shifted_VD, whole.target_AJ % 100)
    check(fused(tma)(inputs), inputs)
    assert made == []


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    # Shrinking would take the interpreter minutes.
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(
    n=st.integers(0, 40),
    d=st.integers(1, 70),
    v=st.integers(1, 300),
    num_targets=st.integers(0, 3),
    num_splits=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    vocab_first=st.booleans(),
    use_tma=st.booleans(),
    logit_scale=st.sampled_from([1.0, 0.3]),
    logit_softcap=st.sampled_from([None, 5.0]),
    with_bias=st.booleans(),
)
def test_any_combination(
    n: int,
    d: int,
    v: int,
    num_targets: int,
    num_splits: int,
    dtype: torch.dtype,
    vocab_first: bool,
    use_tma: bool,
    logit_scale: float,
    logit_softcap: float | None,
    with_bias: bool,
) -> None:
    config = LaunchConfig(16, 64, 32, vocab_first, 4, 2, use_tma=use_tma)
    options = {"logit_scale": logit_scale, "logit_softcap": logit_softcap}
    values = bias(v, dtype) if with_bias else None
    inputs = make_inputs(n, d, v, dtype, num_targets=num_targets, bias=values, **options)
    check(fused(config, num_splits)(inputs), inputs)
    check(gemm(max_logits_bytes=1)(inputs), inputs)
