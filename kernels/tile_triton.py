"""What the Triton kernels do with one tile of logits in registers.

Shapes: A answer rows, J targets per row, V vocabulary. A suffix of ``a`` or ``v`` marks a tile. Tiles are ``_av`` or,
where the vocabulary lies on the wide axis of the matrix unit, ``_va``; ``_tile`` stands for whichever it is.

Method: the online (streaming) softmax of Milakov and Gimelshein, 2018.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Larger than any token id: the neutral element of a minimum over token ids.
NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _tanh(x):
    """tanh to a few units in the last place, from operations that every backend and the interpreter have.

    Few values are alive at a time, since it runs over a whole tile in registers.
    """
    square = x * x
    # Near zero 1 - exp(-2x) cancels; there the series is exact to fp32 (its next term is 62/2835 x^8).
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    # tanh(-10) is -1 in fp32, and exp(20) is finite. A comparison, because maximum() would make -10 of NaN.
    decay = tl.exp(-2.0 * tl.where(x < -10.0, -10.0, x))
    return tl.where(square < 0.04, series, (1.0 - decay) / (1.0 + decay))


@triton.jit
def _transform(
    logits_tile,
    vocab_v,
    vocab_size,
    bias_ptr,
    logit_scale,
    logit_softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROW_AXIS: tl.constexpr,
):
    """Bias, scale and soft cap; -inf beyond the vocabulary."""
    inside_v = vocab_v < vocab_size
    if HAS_BIAS:
        # Loaded as one dimension: as two, the compiler turns the whole tile into the layout of this load.
        bias_v = tl.load(bias_ptr + vocab_v, mask=inside_v, other=0.0).to(tl.float32)
        logits_tile += tl.expand_dims(bias_v, ROW_AXIS)
    if HAS_SCALE:
        logits_tile *= logit_scale
    if HAS_SOFTCAP:
        # One division for the tile: one for each logit would cost registers that a large tile does not have.
        logits_tile = logit_softcap * _tanh(logits_tile * (1.0 / logit_softcap))
    return tl.where(tl.expand_dims(inside_v, ROW_AXIS), logits_tile, float("-inf"))


@triton.jit
def _fold_tile(
    logits_tile,
    vocab_tile,
    best_a,
    sumexp_a,
    top1_a,
    VOCAB_AXIS: tl.constexpr,
    WITH_TOP1: tl.constexpr,
):
    """One tile of finished logits into the running maximum, sum of exp(logit - maximum) and top token of its rows."""
    tile_best_a = tl.max(logits_tile, axis=VOCAB_AXIS)
    if WITH_TOP1:
        at_best_tile = logits_tile == tl.expand_dims(tile_best_a, VOCAB_AXIS)
        tile_top1_a = tl.min(tl.where(at_best_tile, vocab_tile, NO_TOKEN), axis=VOCAB_AXIS)
        # Tiles come in the order of the vocabulary: only a strictly better one replaces the token.
        top1_a = tl.where(tile_best_a > best_a, tile_top1_a, top1_a)
    new_best_a = tl.maximum(best_a, tile_best_a)
    # Where all logits so far are -inf there is nothing to subtract: -inf - -inf would be NaN.
    shift_a = tl.where(new_best_a == float("-inf"), 0.0, new_best_a)
    # Last, because it consumes the tile: nothing else needs the registers of the logits any more.
    exp_tile = tl.exp(logits_tile - tl.expand_dims(shift_a, VOCAB_AXIS))
    sumexp_a = sumexp_a * tl.exp(best_a - shift_a) + tl.sum(exp_tile, axis=VOCAB_AXIS)
    return new_best_a, sumexp_a, top1_a


@triton.jit
def _store_target_logits(
    logits_tile,
    vocab_tile,
    first_v,
    row_a,
    num_rows,
    target_ptr,
    target_logit_ptr,
    num_targets,
    width,
    VOCAB_AXIS: tl.constexpr,
):
    """The logits of those targets that lie in this tile; every target lies in exactly one."""
    for j in range(num_targets):
        place_a = row_a.to(tl.int64) * num_targets + j
        target_a = tl.load(target_ptr + place_a, mask=row_a < num_rows, other=-1)
        here_a = (target_a >= first_v) & (target_a < first_v + width)
        # Few tiles hold a target of these rows; the others skip a pass over the tile.
        if tl.max(here_a.to(tl.int32), axis=0) > 0:
            hit_tile = vocab_tile == tl.expand_dims(target_a.to(tl.int32), VOCAB_AXIS)
            logit_a = tl.sum(tl.where(hit_tile, logits_tile, 0.0), axis=VOCAB_AXIS)
            tl.store(target_logit_ptr + place_a, logit_a, mask=here_a)


@triton.jit
def _store_partials(
    best_a, sumexp_a, top1_a, best_ptr, sumexp_ptr, top1_ptr, row_a, num_rows, split, WITH_TOP1: tl.constexpr
):
    place_a = split.to(tl.int64) * num_rows + row_a
    tl.store(best_ptr + place_a, best_a, mask=row_a < num_rows)
    tl.store(sumexp_ptr + place_a, sumexp_a, mask=row_a < num_rows)
    if WITH_TOP1:
        tl.store(top1_ptr + place_a, top1_a, mask=row_a < num_rows)
