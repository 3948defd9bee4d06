"""Which kernels are compiled for the compile report, with which argument types and constants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from candidates import CANDIDATES
from compiled_kernel import Compiled, compile_kernel
from fastscore_kernels.answer_nll_triton import _answer_nll_partials_kernel, _combine_splits_kernel
from fastscore_kernels.fold_logits_triton import _fold_logits_kernel
from fastscore_kernels.fused_launch import COMBINE_BLOCK_A, COMBINE_BLOCK_S, dot_precision
from fastscore_kernels.launch_configs import CONFIGS, LaunchConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# 2064: a multiple of 16, as every weight is that goes to the fused kernel, and of no block.
HIDDEN_SIZES = (576, 2064, 4096)
# Bias, scale, soft cap.
OPTIONS = {"plain": (False, False, False), "all": (True, True, True), "softcap": (False, False, True)}
FOLD_BLOCK_V = 2048
DEFAULT_WARPS, DEFAULT_STAGES = 4, 3

INTEGERS = dict.fromkeys(("num_rows", "vocab_size", "num_targets", "num_splits", "first_v", "width"), "i32")
SCALARS = {"logit_scale": "fp32", "logit_softcap": "fp32", "vocab_start": "i32", "logits_stride": "i32"}
POINTERS = {
    "target_ptr": "*i64",
    "best_ptr": "*fp32",
    "sumexp_ptr": "*fp32",
    "top1_ptr": "*i32",
    "target_logit_ptr": "*fp32",
    "out_best_ptr": "*fp32",
    "out_sumexp_ptr": "*fp32",
    "out_top1_ptr": "*i64",
    "logits_ptr": "*fp32",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One compilation. ``config`` is None for the kernels that have no table of block sizes."""

    kernel: str
    arch: str
    dtype: str
    options: str
    hidden_size: int = 0
    use_tma: bool = False
    config: LaunchConfig | None = None


def shipped_jobs(arch: str, dtypes: Sequence[str], hidden_sizes: Sequence[int]) -> Iterator[Job]:
    """Every configuration with the options with which a call can reach it."""
    for case in CONFIGS[arch]:
        for dtype in (name for name in dtypes if DTYPES[name].itemsize == case.itemsize):
            for options in OPTIONS:
                for hidden_size in hidden_sizes:
                    # Never pointers in the copy engine's place: weights that it does not take go to the library's GEMM.
                    yield Job("partials", arch, dtype, options, hidden_size, case.config.use_tma, case.config)
    for options in OPTIONS:
        yield Job("fold_logits", arch, "fp32", options)
    yield Job("combine", arch, "fp32", "plain")


def candidate_jobs(arch: str, dtypes: Sequence[str], hidden_sizes: Sequence[int]) -> Iterator[Job]:
    """``bench/candidates.py``, with the loads that they are meant for."""
    for itemsize, configs in CANDIDATES[arch].items():
        for config in configs:
            for dtype in (name for name in dtypes if DTYPES[name].itemsize == itemsize):
                for hidden_size in hidden_sizes:
                    yield Job("partials", arch, dtype, "plain", hidden_size, config.use_tma, config)


def compile_job(job: Job) -> Compiled:
    """Types, constants and alignment as a launch on that device would have them; raises what the compiler raises."""
    bias, scale, softcap = OPTIONS[job.options]
    types = {**INTEGERS, **SCALARS, **POINTERS, "bias_ptr": f"*{job.dtype}"}
    flags = {"HAS_BIAS": bias, "HAS_SCALE": scale, "HAS_SOFTCAP": softcap, "WITH_TOP1": True}
    aligned = {*POINTERS, "bias_ptr", "logits_stride", "hidden_stride", "weight_stride", "vocab_size"}
    if job.config is None:
        combine = job.kernel == "combine"
        fold_blocks = {"BLOCK_A": 1, "BLOCK_V": FOLD_BLOCK_V}
        combine_blocks = {"WITH_TOP1": True, "BLOCK_A": COMBINE_BLOCK_A, "BLOCK_S": COMBINE_BLOCK_S}
        return compile_kernel(
            _combine_splits_kernel if combine else _fold_logits_kernel,
            job.arch,
            types,
            combine_blocks if combine else {**flags, **fold_blocks},
            aligned,
            num_warps=DEFAULT_WARPS,
            num_stages=DEFAULT_STAGES,
        )
    config = job.config
    types |= {"hidden": f"*{job.dtype}", "weight": f"*{job.dtype}", "hidden_stride": "i32", "weight_stride": "i32"}
    if job.use_tma:
        types["hidden"] = f"tensordesc<{job.dtype}[{config.block_a},{config.block_d}]>"
        types["weight"] = f"tensordesc<{job.dtype}[{config.block_v},{config.block_d}]>"
    else:
        aligned |= {"hidden", "weight"}
    constants = {
        **flags,
        "HIDDEN_SIZE": job.hidden_size,
        "BLOCK_A": config.block_a,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "ROW_GROUP": config.row_group,
        "VOCAB_FIRST": config.vocab_first,
        "USE_TMA": job.use_tma,
        "NUM_STAGES": config.num_stages,
        "PRECISION": dot_precision(DTYPES[job.dtype], job.arch),
        "INTERPRETED": False,
    }
    return compile_kernel(
        _answer_nll_partials_kernel,
        job.arch,
        types,
        constants,
        aligned,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
