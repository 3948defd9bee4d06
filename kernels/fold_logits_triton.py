"""One fused pass over a chunk of logits that a library GEMM has written: the second path for many rows.

Shapes: A answer rows, J targets per row, V vocabulary, W width of the chunk; a suffix of ``a`` or ``v`` marks a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastscore_kernels.tile_triton import _fold_tile, _store_target_logits, _transform


@triton.jit(do_not_specialize=["num_rows", "num_targets", "first_v"])
def _fold_logits_kernel(
    logits_ptr,  # [A, W] fp32: the logits of tokens first_v to first_v + W, before bias, scale and soft cap
    bias_ptr,
    target_ptr,
    best_ptr,  # [A] fp32, read and written; as are the next two
    sumexp_ptr,
    top1_ptr,  # [A] int32
    target_logit_ptr,  # [A, J] fp32
    num_rows,
    vocab_size,
    num_targets,
    first_v,
    width,
    logits_stride,
    logit_scale,
    logit_softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_TOP1: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A library GEMM's chunk of logits, read once, into the running statistics of its rows."""
    row_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    inside_a = row_a < num_rows
    best_a = tl.load(best_ptr + row_a, mask=inside_a, other=float("-inf"))
    sumexp_a = tl.load(sumexp_ptr + row_a, mask=inside_a, other=0.0)
    top1_a = tl.load(top1_ptr + row_a, mask=inside_a, other=0)
    for first_w in range(0, width, BLOCK_V):
        column_v = first_w + tl.arange(0, BLOCK_V)
        place_av = row_a.to(tl.int64)[:, None] * logits_stride + column_v[None, :]
        logits_av = tl.load(logits_ptr + place_av, mask=inside_a[:, None] & (column_v < width)[None, :], other=0.0)
        vocab_v = tl.where(column_v < width, first_v + column_v, vocab_size)
        logits_av = _transform(
            logits_av,
            vocab_v,
            vocab_size,
            bias_ptr,
            logit_scale,
            logit_softcap,
            HAS_BIAS,
            HAS_SCALE,
            HAS_SOFTCAP,
            0,
        )
        vocab_1v = vocab_v[None, :]
        _store_target_logits(
            logits_av,
            vocab_1v,
            first_v + first_w,
            row_a,
            num_rows,
            target_ptr,
            target_logit_ptr,
            num_targets,
            tl.minimum(BLOCK_V, width - first_w),
            1,
        )
        best_a, sumexp_a, top1_a = _fold_tile(logits_av, vocab_1v, best_a, sumexp_a, top1_a, 1, WITH_TOP1)
    tl.store(best_ptr + row_a, best_a, mask=inside_a)
    tl.store(sumexp_ptr + row_a, sumexp_a, mask=inside_a)
    tl.store(top1_ptr + row_a, top1_a, mask=inside_a)
