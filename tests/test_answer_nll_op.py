"""``answer_nll`` as it is called: results, partials and their errors, the targets' check, compiled code.

Shapes: A answer rows, J targets per row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastscore_kernels.answer_nll import answer_nll, answer_nll_partials
from fastscore_kernels.answer_nll_reference import answer_nll_partials_reference
from fastscore_kernels.partials import Partials, combine_partials, nll_from_partials
from nll_truth import DEVICE, Inputs, check_top1, find_truth, make_inputs, tolerance

ON_GPU = DEVICE.type == "cuda"
BIAS = torch.linspace(-1, 1, 300, device=DEVICE)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"bias": BIAS, "logit_scale": 0.5, "logit_softcap": 20.0},
}


def call(inputs: Inputs, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return answer_nll(inputs.hidden_AD, inputs.weight_VD, inputs.target_AJ, **inputs.options, **more)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_answer_nll(dtype: torch.dtype, options: str) -> None:
    inputs = make_inputs(20, 64, 300, dtype, num_targets=2, **OPTIONS[options])
    truth = find_truth(inputs)
    nll_AJ, top1_A = call(inputs)
    assert nll_AJ.dtype == torch.float32
    assert float((nll_AJ.double() - truth.nll_AJ).abs().max()) <= tolerance(inputs, truth)
    check_top1(top1_A, inputs, truth)
    # One target a row is a vector of them.
    nll_A, again_A = answer_nll(inputs.hidden_AD, inputs.weight_VD, inputs.target_AJ[:, 1], **inputs.options)
    assert torch.equal(nll_A, nll_AJ[:, 1])
    assert torch.equal(again_A, top1_A)


def test_cross_entropy_says_the_same() -> None:
    """torch's own loss over whole logits, a truth that shares no code with ours."""
    inputs = make_inputs(20, 64, 300)
    logits_AV = torch.nn.functional.linear(inputs.hidden_AD, inputs.weight_VD)
    expected_A = torch.nn.functional.cross_entropy(logits_AV, inputs.target_AJ[:, 0], reduction="none")
    torch.testing.assert_close(call(inputs)[0][:, 0], expected_A, rtol=2e-6, atol=2e-6)


def test_no_rows() -> None:
    for target in (torch.empty(0, dtype=torch.int64), torch.empty(0, 3, dtype=torch.int64)):
        nll, top1_A = answer_nll(torch.empty(0, 64).to(DEVICE), torch.randn(300, 64).to(DEVICE), target.to(DEVICE))
        assert nll.shape == target.shape
        assert nll.dtype == torch.float32
        assert (top1_A.shape, top1_A.dtype) == ((0,), torch.int64)


def test_partials_of_shards_are_those_of_the_whole() -> None:
    inputs = make_inputs(20, 64, 300, num_targets=2, **OPTIONS["all"])
    parts = [
        answer_nll_partials(
            inputs.hidden_AD,
            inputs.weight_VD[first:last],
            inputs.target_AJ,
            bias=BIAS[first:last],
            logit_scale=0.5,
            logit_softcap=20.0,
            vocab_start=first,
        )
        for first, last in ((0, 100), (100, 117), (117, 300))
    ]
    nll_AJ, top1_A = call(inputs)
    combined = combine_partials(parts)
    torch.testing.assert_close(nll_from_partials(combined), nll_AJ, rtol=1e-6, atol=2e-6)
    assert torch.equal(combined.top1_A, top1_A)


def test_combining_in_any_order_gives_the_same_top_token() -> None:
    """The sums run in the order of the parts; a tie goes to the lowest token whichever part comes first."""

    def part(best: float, token: int) -> Partials:
        return Partials(torch.tensor([best]), torch.ones(1), torch.tensor([[-math.inf]]), torch.tensor([token]))

    parts = [part(2.0, 7), part(2.0, 3), part(1.0, 0), part(-math.inf, 1)]
    for order in (parts, parts[::-1]):
        combined = combine_partials(order)
        assert combined.top1_A.tolist() == [3]
        assert float(combined.sumexp_A) == pytest.approx(2 + math.exp(-1))
        assert combined.target_logit_AJ.tolist() == [[-math.inf]]


def test_parts_of_nothing_but_minus_infinity_combine() -> None:
    empty = Partials(torch.full((2,), -math.inf), torch.zeros(2), torch.full((2, 1), -math.inf), torch.tensor([4, 4]))
    other = empty._replace(best_A=torch.tensor([-math.inf, 1.0]), sumexp_A=torch.tensor([0.0, 1.0]))
    combined = combine_partials([empty, other._replace(top1_A=torch.tensor([9, 9]))])
    assert combined.top1_A.tolist() == [4, 9]
    assert combined.sumexp_A.tolist() == [0.0, 1.0]


H, W, T = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(3, dtype=torch.int64)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "hidden is a vector": ((H[0], W, T), {}, r"do not fit: \(8,\) and \(5, 8\)"),
    "hidden sizes differ": ((H[:, :7], W, T), {}, r"do not fit: \(3, 7\) and \(5, 8\)"),
    "weight is no matrix": ((H, W[None], T), {}, "do not fit"),
    "empty vocabulary": ((H, W[:0], T), {}, "the vocabulary is empty"),
    "too few targets": ((H, W, T[:2]), {}, r"int64 of shape \(3,\) or \(3, J\); found torch.int64 of shape \(2,\)"),
    "targets are int32": ((H, W, T.int()), {}, "found torch.int32"),
    "targets of three dimensions": ((H, W, T.view(3, 1, 1)), {}, r"of shape \(3, 1, 1\)"),
    "bias of another length": ((H, W, T), {"bias": torch.zeros(4)}, r"bias must have shape \(5,\); found \(4,\)"),
    "bias is a matrix": ((H, W, T), {"bias": torch.zeros(5, 1)}, "bias must have shape"),
    "hidden is integer": ((H.long(), W, T), {}, "must be floating point: torch.int64"),
    "weight is integer": ((H, W.int(), T), {}, "must be floating point: torch.float32 and torch.int32"),
    "two devices": ((H, W.to("meta"), T), {}, "one device; found .*cpu.*meta"),
    "soft cap of zero": ((H, W, T), {"logit_softcap": 0.0}, "logit_softcap must be positive; found 0.0"),
    "negative soft cap": ((H, W, T), {"logit_softcap": -1.0}, "positive"),
    "soft cap is NaN": ((H, W, T), {"logit_softcap": math.nan}, "positive; found nan"),
    "target of V": ((H, W, T + 5), {}, r"target_A must be in \[0, 5\); found 5"),
    "negative target": ((H, W, T - 100), {}, r"target_A must be in \[0, 5\); found -100"),
    "one bad target of many": ((H, W, torch.tensor([[0, 1], [4, 9], [2, 2]])), {}, "found 9"),
}


@pytest.mark.parametrize("function", [answer_nll_partials, answer_nll_partials_reference])
@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments_of_partials(name: str, function: Any) -> None:
    """Targets are tokens of the whole vocabulary: that they lie outside a shard is no error."""
    arguments, options, message = WRONG[name]
    if name in ("target of V", "negative target", "one bad target of many"):
        partials = function(*arguments, **options)
        inside_AJ = (arguments[2] >= 0) & (arguments[2] < 5)
        assert torch.equal(partials.target_logit_AJ.isfinite(), inside_AJ.view(3, -1))
        return
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


@pytest.mark.skipif(ON_GPU, reason="the CPU's form of the check")
def test_the_check_can_be_left_to_the_caller() -> None:
    inputs = make_inputs(3, 64, 300)
    inputs.target_AJ[1, 0] = 300
    inputs.target_AJ[2, 0] = -1
    with pytest.raises(ValueError, match="found 300"):
        call(inputs)
    nll_AJ, _ = call(inputs, check_targets=False)
    assert nll_AJ.isposinf()[:, 0].tolist() == [False, True, True]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("target", [-1, 300])
def test_on_a_gpu_a_bad_target_is_a_device_side_assertion(target: int) -> None:
    """In a process of its own, because the assertion ends the device's context."""
    program = (
        "import torch; from fastscore_kernels.answer_nll import answer_nll; "
        "h, w = torch.zeros(3, 64, device='cuda'), torch.zeros(300, 64, device='cuda'); "
        f"nll, _ = answer_nll(h, w, torch.tensor([0, {target}, 1], device='cuda')); print('launched', flush=True); "
        "torch.cuda.synchronize()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    assert ended.stdout.strip() == "launched"
    assert "assert" in ended.stderr


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_checks_the_targets(dynamic: bool) -> None:
    """In one graph, and again for other numbers of rows, as packs have them."""

    def score(hidden_AD: torch.Tensor, weight_VD: torch.Tensor, target_AJ: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nll_AJ, top1_A = answer_nll(hidden_AD * 2, weight_VD, target_AJ, bias=BIAS)
        return -nll_AJ.mean(dim=1), top1_A

    torch._dynamo.reset()
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for num_rows in (5, 9):
        inputs = make_inputs(num_rows, 64, 300, num_targets=2)
        arguments = (inputs.hidden_AD, inputs.weight_VD, inputs.target_AJ)
        for ours, theirs in zip(compiled(*arguments), score(*arguments), strict=True):
            assert torch.equal(ours, theirs)
        if not ON_GPU:
            with pytest.raises(ValueError, match=r"in \[0, 300\)"):
                compiled(*arguments[:2], arguments[2] + 300)


def test_inference_tensors_and_parameters() -> None:
    """A model's weight requires gradients; scoring runs under no_grad or inference_mode."""
    inputs = make_inputs(5, 64, 300)
    weight_VD = torch.nn.Parameter(inputs.weight_VD)
    expected, _ = call(inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            nll_AJ, _ = answer_nll(inputs.hidden_AD, weight_VD, inputs.target_AJ)
        assert torch.equal(nll_AJ, expected)


@pytest.mark.skipif(ON_GPU, reason="about the CPU's form")
def test_threads_leave_the_precision_of_other_products_as_it_was() -> None:
    """bf16 rows switch the process's matrix unit over and back; two threads at a time must not leave it switched."""
    inputs = make_inputs(64, 64, 3000, torch.bfloat16)
    expected, _ = call(inputs)
    before = torch.backends.mkldnn.matmul.fp32_precision
    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            results = [future.result() for future in [pool.submit(call, inputs) for _ in range(12)]]
        assert torch.backends.mkldnn.matmul.fp32_precision == before
        assert all(torch.equal(nll_AJ, expected) for nll_AJ, _ in results)
