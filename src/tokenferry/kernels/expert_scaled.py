"""Tiles of the grouped product for float8 weights and rows that are quantized already: device functions, and no kernel.

Columns of a tile come in parts of BN, and BN divides 128: a part shares one scale of the weights, so that a step along the depth
multiplies a part's sums by one number a row. Weights come by tensor maps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import expert_math, expert_tiles
from tokenferry.kernels.expert_math import SCALE_BLOCK


@triton.jit
def scaled_sum(total, x, w, scale, SWAPPED: tl.constexpr):
    """`total` and the product of rows [BM, BD] and weights [BD, BN], of which each row is multiplied by its `scale`.

    SWAPPED: `total` is [BN, BM], and the weights are what the tensor core takes 64 rows of: few rows of tokens then fill no tile
    with copies, and float8 weights are not made 16-bit numbers on their way.

    Example:
        Rows of 1 and 2, weights 3, scales 10 and 100, total 0.5: 30.5 and 600.5.
    """
    if SWAPPED:
        product = tl.dot(tl.trans(w), tl.trans(x), out_dtype=tl.float32)
        spread = tl.broadcast_to(scale[None, :], product.shape)
    else:
        product = tl.dot(x, w, out_dtype=tl.float32)
        spread = tl.broadcast_to(scale[:, None], product.shape)
    return tl.fma(product, spread, total)


@triton.jit
def store_quantized(value, out, out_scales, position, keep, first_column, WIDTH: tl.constexpr):
    """Writes rows [BM, 128] as float8 and their scales: the bits of `expert_quantize` for the same rows.

    Example:
        Rows of 224, -448 and zeros at position 3: the same numbers in float8, scale 1 at row 3, block first_column / 128.
    """
    GROUPS: tl.constexpr = (WIDTH + 127) // 128
    column = first_column + tl.arange(0, value.shape[1])
    inside = column < WIDTH
    q, scale = expert_math.quantize(tl.where(inside[None, :], value, 0.0))
    tl.store(out + position[:, None] * WIDTH + column[None, :], q, mask=keep[:, None] & inside[None, :])
    tl.store(out_scales + position * GROUPS + first_column // SCALE_BLOCK, scale, mask=keep)


@triton.jit
def bias_part(bias, expert, first_column, last, COLUMNS: tl.constexpr, BN: tl.constexpr):
    """The biases of BN columns from `first_column`, zeros from column `last` on, as a row."""
    column = first_column + tl.arange(0, BN)
    return tl.load(bias + expert.to(tl.int64) * COLUMNS + column, mask=column < last, other=0.0).to(tl.float32)[None, :]


@triton.jit
def scaled_tile(
    rows,
    row_scales,
    scale_stride,
    weights,
    scales,
    bias,
    out,
    out_scales,
    pairs,
    first_row,
    alpha,
    limit,
    expert,
    begin,
    num,
    first_column,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE_D: tl.constexpr,
    IS_FIRST_PRODUCT: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    GATHERED: tl.constexpr,
    SWAPPED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`expert_gemm.product_tile` for such operands: BM rows of one expert, and BN columns of `out`. In the first product it
    quantizes what it writes; BN is 128 then. Two parts are summed side by side: gates and ups, or the halves of 256 columns."""
    COLUMNS: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    PART: tl.constexpr = BN if GATED or BN <= 128 else BN // 2
    TWO: tl.constexpr = GATED or BN > 128
    DEPTH_BLOCKS: tl.constexpr = (DEPTH + 127) // 128
    COLUMN_BLOCKS: tl.constexpr = (COLUMNS + 127) // 128
    tl.static_assert(BD == SCALE_BLOCK, "a step along the depth is one block of scales")
    tl.static_assert(128 % PART == 0 and (not GATED or WIDTH % 128 == 0), "a part has one scale")
    lanes = tl.arange(0, BM)
    position = begin + tl.minimum(lanes, num - 1)  # a missing row is replaced by an existing one; it is never stored
    if IS_FIRST_PRODUCT:
        pair = tl.load(pairs + position)
        source = (first_row + pair // K if GATHERED else pair // K).to(tl.int64)
    else:
        source = position.to(tl.int64)
    depth = tl.arange(0, BD)
    a = rows + source[:, None] * DEPTH + depth[None, :]
    half = 1 if GATED else 0
    other_column = first_column if GATED else first_column + PART
    scale_of_row = row_scales + source * scale_stride
    scale_of_first = scales + (expert * COLUMN_BLOCKS + first_column // SCALE_BLOCK) * DEPTH_BLOCKS
    if GATED:
        scale_of_second = scale_of_first + WIDTH // SCALE_BLOCK * DEPTH_BLOCKS
    elif WIDTH % BN == 0:
        scale_of_second = scale_of_first + PART // SCALE_BLOCK * DEPTH_BLOCKS
    else:  # a tile's second part may lie beyond the last column
        other_block = tl.minimum(other_column // SCALE_BLOCK, COLUMN_BLOCKS - 1)
        scale_of_second = scales + (expert * COLUMN_BLOCKS + other_block) * DEPTH_BLOCKS
    first = tl.zeros([PART, BM] if SWAPPED else [BM, PART], tl.float32)
    second = tl.zeros([PART, BM] if SWAPPED else [BM, PART], tl.float32)
    for d in range(0, DEPTH, BD):
        x = expert_tiles.rows_tile(a, row_scales, scale_stride, source, d, depth, DEPTH, BD, False, tl.float32)
        row_scale = tl.load(scale_of_row + d // SCALE_BLOCK)
        w = expert_tiles.mapped_tile(weights, expert, 0, first_column, d, STRIDE_D, PART, BD, UPCAST)
        if UPCAST:
            x = x.to(tl.float32)
        first = scaled_sum(first, x, w, row_scale * tl.load(scale_of_first + d // SCALE_BLOCK), SWAPPED)
        if TWO:
            w = expert_tiles.mapped_tile(weights, expert, half, other_column, d, STRIDE_D, PART, BD, UPCAST)
            second = scaled_sum(second, x, w, row_scale * tl.load(scale_of_second + d // SCALE_BLOCK), SWAPPED)
    if SWAPPED:
        first = tl.trans(first)
        second = tl.trans(second)
    keep = lanes < num
    if BIAS:
        first += bias_part(bias, expert, first_column, WIDTH, COLUMNS, PART)
        if GATED:
            second += bias_part(bias, expert, first_column + WIDTH, COLUMNS, COLUMNS, PART)
        elif TWO:
            second += bias_part(bias, expert, other_column, WIDTH, COLUMNS, PART)
    if IS_FIRST_PRODUCT:
        tl.static_assert(BN == SCALE_BLOCK, "a tile quantizes whole blocks")
        if GATED:
            value = expert_math.activate_gated(first, second, alpha, limit, ACTIVATION)
        else:
            value = expert_math.activate(first, ACTIVATION)
        value = value.to(bias.dtype.element_ty).to(tl.float32)  # rounded as activated rows are that other kernels quantize
        store_quantized(value, out, out_scales, position.to(tl.int64), keep, first_column, WIDTH)
    else:
        pair = tl.load(pairs + position)  # here, or its registers would be missing in the loop
        target = out + pair.to(tl.int64)[:, None] * WIDTH
        column = first_column + tl.arange(0, PART)
        inside = keep[:, None] & (column < WIDTH)[None, :]
        tl.store(target + column[None, :], first.to(out.dtype.element_ty), mask=inside)
        if TWO:
            inside = keep[:, None] & (column + PART < WIDTH)[None, :]
            tl.store(target + (column + PART)[None, :], second.to(out.dtype.element_ty), mask=inside)
