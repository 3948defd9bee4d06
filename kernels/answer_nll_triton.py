"""The fused answer-NLL kernel in Triton: the LM head's product, with the softmax's statistics in its epilogue.

Shapes: A answer rows, J targets per row, D hidden size, V vocabulary, S splits of the vocabulary. A suffix of ``a``,
``v`` or ``d`` marks a tile; ``_tile`` is ``_av`` or ``_va``, see :mod:`fastscore_kernels.tile_triton`.

Method: the online (streaming) softmax of Milakov and Gimelshein, 2018, inside the epilogue of a matrix product, as in
Cut Cross-Entropy (Wijmans et al., 2024) and Liger Kernel (Hsu et al., 2024); forward only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastscore_kernels.tile_triton import NO_TOKEN, _fold_tile, _store_partials, _store_target_logits, _transform


@triton.jit(do_not_specialize=["num_rows", "num_targets", "num_splits"])
def _answer_nll_partials_kernel(
    hidden,  # descriptor of hidden_AD with blocks [BLOCK_A, BLOCK_D], or a pointer
    weight,  # descriptor of weight_VD with blocks [BLOCK_V, BLOCK_D], or a pointer
    bias_ptr,
    target_ptr,
    best_ptr,  # [S, A] fp32: largest logit of the split
    sumexp_ptr,  # [S, A] fp32: sum of exp(logit - largest) over the split
    top1_ptr,  # [S, A] int32: its first token with the largest logit
    target_logit_ptr,  # [A, J] fp32
    num_rows,
    vocab_size,
    num_targets,
    hidden_stride,
    weight_stride,
    logit_scale,
    logit_softcap,
    num_splits,
    HIDDEN_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_TOP1: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    VOCAB_FIRST: tl.constexpr,
    USE_TMA: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One block of rows against one split (a run of neighbouring tiles) of the vocabulary.

    Programs are numbered so that those that run together share ROW_GROUP blocks of hidden rows, which stay in L2 while
    the weight streams by.
    """
    program = tl.program_id(0)
    num_row_blocks = tl.cdiv(num_rows, BLOCK_A)
    group = program // (ROW_GROUP * num_splits)
    group_size = tl.minimum(num_row_blocks - group * ROW_GROUP, ROW_GROUP)
    in_group = program - group * ROW_GROUP * num_splits
    row_block = group * ROW_GROUP + in_group % group_size
    split = in_group // group_size

    num_tiles = tl.cdiv(vocab_size, BLOCK_V)
    # 64 bits: splits times tiles may pass 2^31 for a vocabulary of millions.
    first_tile = (split.to(tl.int64) * num_tiles // num_splits).to(tl.int32)
    last_tile = ((split + 1).to(tl.int64) * num_tiles // num_splits).to(tl.int32)

    VOCAB_AXIS: tl.constexpr = 0 if VOCAB_FIRST else 1
    row_a = row_block * BLOCK_A + tl.arange(0, BLOCK_A)
    best_a = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    sumexp_a = tl.zeros((BLOCK_A,), tl.float32)
    top1_a = tl.full((BLOCK_A,), 0, tl.int32)
    offset_d = tl.arange(0, BLOCK_D)
    TILE_M: tl.constexpr = BLOCK_V if VOCAB_FIRST else BLOCK_A
    TILE_N: tl.constexpr = BLOCK_A if VOCAB_FIRST else BLOCK_V
    logits_tile = tl.zeros((TILE_M, TILE_N), tl.float32)

    # One loop over all steps of all tiles, so that loads for the next tile are under way during a tile's epilogue.
    STEPS: tl.constexpr = (HIDDEN_SIZE + BLOCK_D - 1) // BLOCK_D
    step = -1
    tile = first_tile - 1
    for _ in tl.range(0, (last_tile - first_tile) * STEPS, num_stages=NUM_STAGES):
        step = tl.where(step == STEPS - 1, 0, step + 1)
        tile = tl.where(step == 0, tile + 1, tile)
        first_v = tile * BLOCK_V
        first_d = step * BLOCK_D
        if USE_TMA:
            hidden_ad = hidden.load([row_block * BLOCK_A, first_d])
            weight_vd = weight.load([first_v, first_d])
        else:
            vocab_v = first_v + tl.arange(0, BLOCK_V)
            hidden_place_ad = row_a.to(tl.int64)[:, None] * hidden_stride + (first_d + offset_d)[None, :]
            weight_place_vd = vocab_v.to(tl.int64)[:, None] * weight_stride + (first_d + offset_d)[None, :]
            hidden_mask_ad = (row_a < num_rows)[:, None]
            weight_mask_vd = (vocab_v < vocab_size)[:, None]
            if HIDDEN_SIZE % BLOCK_D != 0:
                hidden_mask_ad = hidden_mask_ad & (first_d + offset_d < HIDDEN_SIZE)[None, :]
                weight_mask_vd = weight_mask_vd & (first_d + offset_d < HIDDEN_SIZE)[None, :]
            hidden_ad = tl.load(hidden + hidden_place_ad, mask=hidden_mask_ad, other=0.0)
            weight_vd = tl.load(weight + weight_place_vd, mask=weight_mask_vd, other=0.0)
        if INTERPRETED:
            # The interpreter's dot multiplies the bit patterns of bf16.
            hidden_ad = hidden_ad.to(tl.float32)
            weight_vd = weight_vd.to(tl.float32)
        if VOCAB_FIRST:
            logits_tile = tl.dot(weight_vd, hidden_ad.T, logits_tile, input_precision=PRECISION)
        else:
            logits_tile = tl.dot(hidden_ad, weight_vd.T, logits_tile, input_precision=PRECISION)

        if step == STEPS - 1:
            finished_v = first_v + tl.arange(0, BLOCK_V)
            vocab_tile = tl.expand_dims(finished_v, 1 - VOCAB_AXIS)
            finished_tile = _transform(
                logits_tile,
                finished_v,
                vocab_size,
                bias_ptr,
                logit_scale,
                logit_softcap,
                HAS_BIAS,
                HAS_SCALE,
                HAS_SOFTCAP,
                1 - VOCAB_AXIS,
            )
            _store_target_logits(
                finished_tile,
                vocab_tile,
                first_v,
                row_a,
                num_rows,
                target_ptr,
                target_logit_ptr,
                num_targets,
                BLOCK_V,
                VOCAB_AXIS,
            )
            best_a, sumexp_a, top1_a = _fold_tile(
                finished_tile, vocab_tile, best_a, sumexp_a, top1_a, VOCAB_AXIS, WITH_TOP1
            )
            logits_tile = tl.zeros_like(logits_tile)

    _store_partials(best_a, sumexp_a, top1_a, best_ptr, sumexp_ptr, top1_ptr, row_a, num_rows, split, WITH_TOP1)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _combine_splits_kernel(
    best_ptr,  # [S, A] fp32
    sumexp_ptr,  # [S, A] fp32
    top1_ptr,  # [S, A] int32
    out_best_ptr,  # [A] fp32
    out_sumexp_ptr,  # [A] fp32
    out_top1_ptr,  # [A] int64
    num_rows,
    num_splits,
    vocab_start,
    WITH_TOP1: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Splits into whole rows, in the order of the vocabulary, whichever program finished first."""
    row_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    best_a = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    sumexp_a = tl.zeros((BLOCK_A,), tl.float32)
    top1_a = tl.zeros((BLOCK_A,), tl.int32)
    for first_s in range(0, num_splits, BLOCK_S):
        split_s = first_s + tl.arange(0, BLOCK_S)
        mask_sa = (split_s < num_splits)[:, None] & (row_a < num_rows)[None, :]
        place_sa = split_s.to(tl.int64)[:, None] * num_rows + row_a[None, :]
        best_sa = tl.load(best_ptr + place_sa, mask=mask_sa, other=float("-inf"))
        sumexp_sa = tl.load(sumexp_ptr + place_sa, mask=mask_sa, other=0.0)
        here_best_a = tl.max(best_sa, axis=0)
        if WITH_TOP1:
            token_sa = tl.load(top1_ptr + place_sa, mask=mask_sa, other=NO_TOKEN)
            here_top1_a = tl.min(tl.where(best_sa == here_best_a[None, :], token_sa, NO_TOKEN), axis=0)
            top1_a = tl.where(here_best_a > best_a, here_top1_a, top1_a)
        new_best_a = tl.maximum(best_a, here_best_a)
        shift_a = tl.where(new_best_a == float("-inf"), 0.0, new_best_a)
        sumexp_a = sumexp_a * tl.exp(best_a - shift_a)
        sumexp_a += tl.sum(sumexp_sa * tl.exp(best_sa - shift_a[None, :]), axis=0)
        best_a = new_best_a
    inside_a = row_a < num_rows
    tl.store(out_best_ptr + row_a, best_a, mask=inside_a)
    tl.store(out_sumexp_ptr + row_a, sumexp_a, mask=inside_a)
    if WITH_TOP1:
        tl.store(out_top1_ptr + row_a, top1_a.to(tl.int64) + vocab_start, mask=inside_a)
