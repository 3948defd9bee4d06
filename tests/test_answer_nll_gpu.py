"""What only a GPU can show: shipped block sizes on real shapes, large addresses, no waiting, little memory.

The tests of shapes, options and edges run on a GPU too, where there is one (``nll_truth.DEVICE``).
Shapes: A answer rows, J targets per row, D hidden size, V vocabulary; a suffix of ``v`` marks a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from fastscore_kernels.answer_nll import answer_nll
from fastscore_kernels.answer_nll_reference import answer_nll_reference
from fastscore_kernels.launch_configs import CONFIGS, LaunchConfig
from fastscore_kernels.partials import nll_from_partials
from nll_truth import DEVICE, Inputs, check, fused, gemm, make_inputs
from nll_truth import poisoned_memory as poison

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    with poison():
        yield


def random_head(num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, num_targets: int = 64) -> Inputs:
    """Made on the device; logits have a standard deviation of two."""
    torch.manual_seed(0)
    hidden_AD = torch.randn(num_rows, hidden_size, dtype=dtype, device=DEVICE)
    weight_VD = torch.randn(vocab_size, hidden_size, dtype=dtype, device=DEVICE).mul_(2 / hidden_size**0.5)
    target_AJ = torch.randint(vocab_size, (num_rows, num_targets), device=DEVICE)
    target_AJ[:, 0], target_AJ[:, -1] = 0, vocab_size - 1
    return Inputs(hidden_AD, weight_VD, target_AJ)


def check_in_chunks(nll_AJ: torch.Tensor, top1_A: torch.Tensor, inputs: Inputs) -> None:
    """As ``nll_truth.check``, without fp64 logits or an fp64 weight in memory as a whole."""
    hidden_AD, weight_VD, target_AJ = inputs.hidden_AD.double(), inputs.weight_VD, inputs.target_AJ
    lse_A = torch.full((len(hidden_AD),), -torch.inf, dtype=torch.float64, device=DEVICE)
    best_A = lse_A.clone()
    for weight_vD in weight_VD.split(1 << 14):
        logits_Av = hidden_AD @ weight_vD.double().T
        lse_A = torch.logaddexp(lse_A, logits_Av.logsumexp(dim=1))
        best_A = torch.maximum(best_A, logits_Av.amax(dim=1))

    def logits_of(tokens_AJ: torch.Tensor) -> torch.Tensor:
        columns = [(hidden_AD * weight_VD[tokens_A].double()).sum(dim=1) for tokens_A in tokens_AJ.unbind(dim=1)]
        return torch.stack(columns, dim=1)

    truth_AJ = lse_A[:, None] - logits_of(target_AJ)
    reference_AJ, _ = answer_nll_reference(inputs.hidden_AD, weight_VD, target_AJ)
    eps = torch.finfo(torch.float32).eps
    allowed = (reference_AJ.double() - truth_AJ).abs().max() + eps * truth_AJ.abs().max().clamp_min(1)
    assert bool(((nll_AJ.double() - truth_AJ).abs() <= allowed).all())
    size_A = hidden_AD.norm(dim=1) * weight_VD.norm(dim=1, dtype=torch.float32).max()
    assert bool((best_A - logits_of(top1_A[:, None])[:, 0] <= eps * size_A).all())


@DTYPE
@pytest.mark.parametrize("hidden_size", [576, 2064, 4096])
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 32, 33, 64, 65, 128, 129, 1000])
def test_shipped_configurations(num_rows: int, hidden_size: int, dtype: torch.dtype) -> None:
    """The public call, at and beside every limit of the table."""
    inputs = random_head(num_rows, hidden_size, 5003, dtype)
    check_in_chunks(*answer_nll(inputs.hidden_AD, inputs.weight_VD, inputs.target_AJ), inputs)


@DTYPE
@pytest.mark.parametrize("num_rows", [1, 40, 300])
def test_all_options_with_shipped_configurations(num_rows: int, dtype: torch.dtype) -> None:
    bias = torch.randn(5003, device=DEVICE)
    bias[1:-1:7] = -torch.inf
    inputs = make_inputs(num_rows, 576, 5003, dtype, num_targets=3, bias=bias, logit_scale=0.8, logit_softcap=15.0)
    for compute in (fused(None, None), gemm()):
        check(compute(inputs), inputs)


@pytest.mark.parametrize(
    ("hidden_size", "vocab_size"), [(4096, 128256), (4096, 151936), (3584, 256000), (2048, 49152), (576, 49152)]
)
@pytest.mark.parametrize("num_rows", [1, 64, 257, 2048])
def test_real_heads(num_rows: int, hidden_size: int, vocab_size: int) -> None:
    inputs = random_head(num_rows, hidden_size, vocab_size, torch.bfloat16, num_targets=8)
    for compute in (fused(None, None), gemm()):
        partials = compute(inputs)
        check_in_chunks(nll_from_partials(partials), partials.top1_A, inputs)


@pytest.mark.parametrize("use_tma", [False, True])
def test_a_weight_of_more_than_2_to_the_31_entries(use_tma: bool) -> None:
    """Targets, and the best token, in the last rows: a 32-bit offset would read elsewhere."""
    hidden_size, vocab_size = 4096, (1 << 19) + 4096
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    inputs = random_head(3, hidden_size, vocab_size, torch.bfloat16)
    inputs.target_AJ[:, 1:32] = torch.arange(vocab_size - 31, vocab_size, device=DEVICE)
    inputs.weight_VD[-5:-2] = inputs.hidden_AD
    config = LaunchConfig(16, 128, 64, True, 4, 4, use_tma=use_tma)
    for compute in (fused(config, 132), gemm()):
        partials = compute(inputs)
        assert partials.top1_A.tolist() == [vocab_size - 5, vocab_size - 4, vocab_size - 3]
        check_in_chunks(nll_from_partials(partials), partials.top1_A, inputs)


def test_rows_that_no_vector_load_takes() -> None:
    """An odd hidden size goes to the library's GEMM."""
    for dtype in (torch.bfloat16, torch.float32):
        inputs = random_head(65, 123, 5003, dtype)
        check_in_chunks(*answer_nll(inputs.hidden_AD, inputs.weight_VD, inputs.target_AJ), inputs)


Call = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(params=["answer_nll", "fused", "gemm"])
def call(request: pytest.FixtureRequest) -> Call:
    if request.param == "answer_nll":
        return lambda inputs: answer_nll(inputs.hidden_AD, inputs.weight_VD, inputs.target_AJ)
    compute = fused(None, None) if request.param == "fused" else gemm()

    def run(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        partials = compute(inputs)
        return nll_from_partials(partials), partials.top1_A

    return run


@pytest.mark.parametrize("num_rows", [1, 300])
def test_nothing_waits_for_the_device(num_rows: int, call: Call) -> None:
    """Not even the targets' check. The first call compiles and may wait."""
    inputs = random_head(num_rows, 576, 49152, torch.bfloat16)
    expected = call(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = call(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("num_rows", [1, 300])
def test_a_graph_replays_it(num_rows: int, call: Call) -> None:
    inputs = random_head(num_rows, 576, 49152, torch.bfloat16)
    call(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(inputs)
    other = random_head(num_rows, 576, 49152, torch.bfloat16)
    inputs.hidden_AD.copy_(other.hidden_AD.roll(1, dims=1))
    graph.replay()
    expected = call(inputs)
    assert all(torch.equal(one, two) for one, two in zip(results, expected, strict=True))


def test_same_bits_every_time(call: Call) -> None:
    inputs = random_head(2048, 2048, 49152, torch.bfloat16, num_targets=2)
    expected = call(inputs)
    for _ in range(10):
        assert all(torch.equal(one, other) for one, other in zip(call(inputs), expected, strict=True))


@pytest.mark.parametrize("num_rows", [4096, 16384])
def test_memory_is_below_a_hundredth_of_the_logits(num_rows: int, call: Call) -> None:
    """Or, where that is less than a library GEMM's bounded chunk and workspace, below those."""
    inputs = random_head(num_rows, 576, 128256, torch.bfloat16, num_targets=1)
    call(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(inputs)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= max(0.01 * 4 * num_rows * 128256, 80 << 20)


def test_the_table_knows_this_device() -> None:
    """Devices without configurations work, but through the library's GEMM: this one should not."""
    from fastscore_kernels.fused_launch import _device

    assert _device(torch.device("cuda", 0))[0] in CONFIGS
