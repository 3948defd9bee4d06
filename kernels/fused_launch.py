"""Launches the Triton kernels. Imported only where they run: on a GPU, or in the interpreter's tests.

Shapes: A answer rows, J targets per row, D hidden size, V vocabulary, S splits of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, Concatenate, ParamSpec

import torch
import triton
from fastscore_kernels.answer_nll_triton import _answer_nll_partials_kernel, _combine_splits_kernel
from fastscore_kernels.fold_logits_triton import _fold_logits_kernel
from fastscore_kernels.launch_configs import CONFIGS, LaunchConfig, choose_config, choose_num_splits
from fastscore_kernels.partials import Partials
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

P = ParamSpec("P")

COMBINE_BLOCK_A = 32
COMBINE_BLOCK_S = 32
GEMM_LOGITS_BYTES = 32 << 20
"""Budget of the GEMM path's chunk of fp32 logits: small enough to be read back from the L2 cache."""


def _on_its_device(
    launch: Callable[Concatenate[torch.Tensor, P], Partials],
) -> Callable[Concatenate[torch.Tensor, P], Partials]:
    """Triton launches on the current device, which need not be the operands'."""

    @wraps(launch)
    def launch_there(hidden_AD: torch.Tensor, /, *arguments: P.args, **options: P.kwargs) -> Partials:
        with torch.cuda.device_of(hidden_AD):
            return launch(hidden_AD, *arguments, **options)

    return launch_there


@_on_its_device
def fused_partials(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_AJ: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_start: int = 0,
    top1: bool = True,
    config: LaunchConfig | None = None,
    num_splits: int | None = None,
) -> Partials:
    """One pass over the weight; no logits in memory. Nothing here waits for the device.

    ``config`` and ``num_splits`` override what would be chosen, for tuning and tests.

    Raises:
        ValueError: operands of different dtypes, or of one that the kernel does not take.
    """
    hidden_AD, target_AJ, bias = _operands(hidden_AD, weight_VD, target_AJ, bias, vocab_start)
    (num_rows, hidden_size), vocab_size = hidden_AD.shape, weight_VD.shape[0]
    arch, num_sms = _device(hidden_AD.device)
    if config is None:
        config = choose_config(arch, num_rows, weight_VD.itemsize)
    out = _empty_partials(num_rows, target_AJ.shape[1], hidden_AD.device, top1)
    if num_rows == 0:
        return out

    num_row_blocks = -(-num_rows // config.block_a)
    if num_splits is None:
        at_once = num_sms * config.programs_per_sm
        num_splits = choose_num_splits(num_row_blocks, vocab_size, config.block_v, at_once)
    best_SA = torch.empty(num_splits, num_rows, dtype=torch.float32, device=hidden_AD.device)
    sumexp_SA = torch.empty_like(best_SA)
    top1_SA = torch.empty_like(best_SA, dtype=torch.int32) if top1 else best_SA
    use_tma = config.use_tma and _tma_takes(hidden_AD) and _tma_takes(weight_VD)
    hidden: Any = hidden_AD
    weight: Any = weight_VD
    if use_tma:
        hidden = TensorDescriptor.from_tensor(hidden_AD, [config.block_a, config.block_d])
        weight = TensorDescriptor.from_tensor(weight_VD, [config.block_v, config.block_d])
    _answer_nll_partials_kernel[(num_row_blocks * num_splits,)](
        hidden,
        weight,
        weight_VD if bias is None else bias,
        target_AJ,
        best_SA,
        sumexp_SA,
        top1_SA,
        out.target_logit_AJ,
        num_rows,
        vocab_size,
        target_AJ.shape[1],
        hidden_AD.stride(0),
        weight_VD.stride(0),
        logit_scale,
        logit_softcap or 1.0,
        num_splits,
        HIDDEN_SIZE=hidden_size,
        HAS_BIAS=bias is not None,
        HAS_SCALE=logit_scale != 1.0,
        HAS_SOFTCAP=logit_softcap is not None,
        WITH_TOP1=top1,
        BLOCK_A=config.block_a,
        BLOCK_V=config.block_v,
        BLOCK_D=config.block_d,
        ROW_GROUP=config.row_group,
        VOCAB_FIRST=config.vocab_first,
        USE_TMA=use_tma,
        NUM_STAGES=config.num_stages,
        PRECISION=dot_precision(weight_VD.dtype, arch),
        INTERPRETED=bool(knobs.runtime.interpret),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _combine_splits_kernel[(-(-num_rows // COMBINE_BLOCK_A),)](
        best_SA,
        sumexp_SA,
        top1_SA,
        out.best_A,
        out.sumexp_A,
        out.top1_A,
        num_rows,
        num_splits,
        vocab_start,
        WITH_TOP1=top1,
        BLOCK_A=COMBINE_BLOCK_A,
        BLOCK_S=COMBINE_BLOCK_S,
    )
    return out


@_on_its_device
def gemm_partials(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_AJ: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_start: int = 0,
    top1: bool = True,
    max_logits_bytes: int = GEMM_LOGITS_BYTES,
) -> Partials:
    """The library's GEMM into a bounded chunk of fp32 logits, and one fused pass over each chunk."""
    hidden_AD, target_AJ, bias = _operands(hidden_AD, weight_VD, target_AJ, bias, vocab_start)
    num_rows, vocab_size = hidden_AD.shape[0], weight_VD.shape[0]
    out = _empty_partials(num_rows, target_AJ.shape[1], hidden_AD.device, top1)
    if num_rows == 0:
        return out
    out.best_A.fill_(-torch.inf)
    out.sumexp_A.zero_()
    top1_A = torch.zeros(num_rows, dtype=torch.int32, device=hidden_AD.device)
    # A multiple of 128 keeps the GEMM on its aligned kernels.
    width = min(vocab_size, max(128, max_logits_bytes // (4 * num_rows) // 128 * 128))
    for first_v in range(0, vocab_size, width):
        weight_vD = weight_VD[first_v : first_v + width]
        logits_Av = _logits(hidden_AD, weight_vD)
        _fold_logits_kernel[(num_rows,)](
            logits_Av,
            weight_VD if bias is None else bias,
            target_AJ,
            out.best_A,
            out.sumexp_A,
            top1_A,
            out.target_logit_AJ,
            num_rows,
            vocab_size,
            target_AJ.shape[1],
            first_v,
            weight_vD.shape[0],
            logits_Av.stride(0),
            logit_scale,
            logit_softcap or 1.0,
            HAS_BIAS=bias is not None,
            HAS_SCALE=logit_scale != 1.0,
            HAS_SOFTCAP=logit_softcap is not None,
            WITH_TOP1=top1,
            BLOCK_A=1,
            BLOCK_V=min(2048, triton.next_power_of_2(width)),
            num_warps=4,
        )
    if top1:
        out.top1_A.copy_(top1_A).add_(vocab_start)
    return out


def fused_kernel_fits(weight_VD: torch.Tensor) -> bool:
    """Whether there are launch configurations for the device, and rows of the weight can be loaded in whole vectors.

    The latter is what Triton looks at: whether 16 divides the address, the row's length and its stride.
    """
    arch, _ = _device(weight_VD.device)
    sizes = (weight_VD.data_ptr(), weight_VD.shape[1], weight_VD.stride(0))
    return arch in CONFIGS and all(size % 16 == 0 for size in sizes)


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """fp32 operands: three tf32 products on NVIDIA, whose sum is as good as fp32; true fp32 elsewhere."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"


def _operands(
    hidden_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_AJ: torch.Tensor,
    bias: torch.Tensor | None,
    vocab_start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the kernels' addresses take for granted. Only the weight is too large to be copied."""
    if hidden_AD.dtype != weight_VD.dtype:
        raise ValueError(
            f"on a GPU hidden_AD and weight_VD must have one dtype; found {hidden_AD.dtype} and {weight_VD.dtype}"
        )
    if hidden_AD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the fused kernel takes fp32, bf16 and fp16; found {hidden_AD.dtype}")
    if weight_VD.stride(1) != 1:
        raise ValueError("weight_VD must be contiguous along D; a transposed weight would have to be copied whole")
    if hidden_AD.stride(1) != 1 or not _tma_takes(hidden_AD):
        hidden_AD = hidden_AD.clone(memory_format=torch.contiguous_format)
    target_AJ = (target_AJ - vocab_start if vocab_start else target_AJ).contiguous()
    return hidden_AD, target_AJ, None if bias is None else bias.contiguous()


def _empty_partials(num_rows: int, num_targets: int, device: torch.device, top1: bool) -> Partials:
    best_A = torch.empty(num_rows, dtype=torch.float32, device=device)
    return Partials(
        best_A,
        torch.empty_like(best_A),
        # A target outside the shard is never stored.
        torch.full((num_rows, num_targets), -torch.inf, dtype=torch.float32, device=device),
        torch.empty(num_rows if top1 else 0, dtype=torch.int64, device=device),
    )


def _logits(hidden_AD: torch.Tensor, weight_vD: torch.Tensor) -> torch.Tensor:
    """fp32 logits of a chunk; low-precision operands accumulate and are stored in fp32."""
    if hidden_AD.dtype == torch.float32:
        return hidden_AD @ weight_vD.T
    if hidden_AD.is_cuda:
        return torch.mm(hidden_AD, weight_vD.T, out_dtype=torch.float32)
    return hidden_AD.float() @ weight_vD.float().T


def _tma_takes(operand: torch.Tensor) -> bool:
    """The copy engine wants 16-byte aligned rows, one behind the other."""
    row_bytes = operand.stride(0) * operand.itemsize
    return operand.data_ptr() % 16 == 0 and row_bytes % 16 == 0 and operand.stride(0) >= operand.shape[1]


@lru_cache
def _device(device: torch.device) -> tuple[str, int]:
    """Architecture and number of multiprocessors; of an H100 where the kernel is interpreted on a CPU."""
    if device.type != "cuda":
        return "sm_90", 132
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    # sm_89 and sm_120 have sm_80's matrix instructions and less shared memory than sm_90 or sm_100.
    major = 8 if properties.major == 12 else properties.major
    return f"sm_{major * 10}", properties.multi_processor_count
