"""Grouped matrix product: each local expert's weights times the rows that chose it. The device's own counts say how many."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import expert_math, expert_scaled, expert_tiles, wire, wire_warp
from tokenferry.kernels.expert_math import SCALE_BLOCK

SIGNATURE = {
    "rows": "*ROWS",
    "row_scales": "*fp32",
    "scale_stride": "i32",
    "weights": "*WEIGHT",
    "scales": "*fp32",
    "bias": "*DTYPE",
    "out": "*OUT",
    "out_scales": "*fp32",
    "counts": "*i32",
    "offsets": "*i32",
    "pairs": "*i32",
    "first_row": "i32",
    "alpha": "fp32",
    "limit": "fp32",
    "L": "constexpr",
    "K": "constexpr",
    "DEPTH": "constexpr",
    "WIDTH": "constexpr",
    "STRIDE_E": "constexpr",
    "STRIDE_N": "constexpr",
    "STRIDE_D": "constexpr",
    "IS_FIRST_PRODUCT": "constexpr",
    "GATED": "constexpr",
    "INTERLEAVED": "constexpr",
    "ACTIVATION": "constexpr",
    "BIAS": "constexpr",
    "SCALED": "constexpr",
    "QUANTIZED": "constexpr",
    "GATHERED": "constexpr",
    "IN_BLOCKS": "constexpr",
    "SWAPPED": "constexpr",
    "TENSOR_MAP": "constexpr",
    "MIN_ROWS": "constexpr",
    "MAX_ROWS": "constexpr",
    "BM_FEW": "constexpr",
    "BM": "constexpr",
    "BN": "constexpr",
    "BD": "constexpr",
    "LANES": "constexpr",
    "UPCAST": "constexpr",
    "OVERLAPS": "constexpr",
    "PDL": "constexpr",
}


@triton.jit
def product_added(x, w, total, IN_REGISTERS: tl.constexpr):
    """total + x @ w. IN_REGISTERS: x was made there, of float8 rows; see `wire_warp.finished`."""
    total = tl.dot(x, w, total, input_precision="ieee")
    if IN_REGISTERS:
        total = wire_warp.finished(total)
    return total


@triton.jit
def columns_of(
    first_column, WIDTH: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMP: tl.constexpr, BN: tl.constexpr
):
    """Columns of the product that BN columns of `out` are made of: with a gate first the gates, then the ups, or both as they lie
    if they are interleaved. With CLAMP, columns beyond the last are replaced by it.

    Example:
        WIDTH 6 from column 4, BN 2: 4, 5; with a gate 4, 5, 10, 11; interleaved 8, 9, 10, 11.
    """
    if GATED and INTERLEAVED:
        column = 2 * first_column + tl.arange(0, 2 * BN)
        if CLAMP:
            column = tl.minimum(column, 2 * WIDTH - 1)
    elif GATED:
        within = tl.arange(0, 2 * BN)
        column = first_column + within % BN
        if CLAMP:
            column = tl.minimum(column, WIDTH - 1)
        column = column + within // BN * WIDTH
    else:
        column = first_column + tl.arange(0, BN)
        if CLAMP:
            column = tl.minimum(column, WIDTH - 1)
    return column


@triton.jit
def product_tile(
    rows,
    row_scales,
    scale_stride,
    weights,
    scales,
    bias,
    out,
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
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_D: tl.constexpr,
    IS_FIRST_PRODUCT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    GATHERED: tl.constexpr,
    TENSOR_MAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Computes BM x BN outputs of one expert: of the pairs at begin .. begin + num - 1 (num > 0), those beyond BM left out."""
    BB: tl.constexpr = 2 * BN if GATED else BN
    NUM_COLUMNS: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    lanes = tl.arange(0, BM)
    position = begin + tl.minimum(lanes, num - 1)  # a missing row is replaced by an existing one; it is never stored
    pair = tl.load(pairs + position)
    if IS_FIRST_PRODUCT:
        source = (pair // K if QUANTIZED and not GATHERED else first_row + pair // K).to(tl.int64)
    else:
        source = position.to(tl.int64)
    # Where columns are what lies side by side, clamping them would part what one access loads.
    MASKED: tl.constexpr = STRIDE_N == 1 and STRIDE_D != 1 and WIDTH % BN != 0
    column = columns_of(first_column, WIDTH, GATED, INTERLEAVED, WIDTH % BN != 0 and not MASKED, BN)
    depth = tl.arange(0, BD)
    a = rows + source[:, None] * DEPTH + depth[None, :]
    DEQUANTIZE: tl.constexpr = QUANTIZED and not SCALED
    DTYPE: tl.constexpr = out.dtype.element_ty
    PAIRED: tl.constexpr = GATED and INTERLEAVED and (STRIDE_D != 1 or not TENSOR_MAP)
    if TENSOR_MAP and PAIRED:
        # Gates and ups lie side by side: one tile, one product, whose columns come in pairs.
        total = tl.zeros([BM, BB], tl.float32)
        for d in range(0, DEPTH, BD):
            x = expert_tiles.rows_tile(a, row_scales, scale_stride, source, d, depth, DEPTH, BD, DEQUANTIZE, DTYPE)
            w = tl.reshape(weights.load([expert, 0, d, 2 * first_column]), [BD, BB])
            if UPCAST:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            total = product_added(x, w, total, DEQUANTIZE)
    elif TENSOR_MAP:
        # One thread requests a whole tile. Gates and ups are two tiles and two products: one product would need a copy of both.
        total = tl.zeros([BM, BN], tl.float32)
        second = tl.zeros([BM, BN], tl.float32)
        for d in range(0, DEPTH, BD):
            x = expert_tiles.rows_tile(a, row_scales, scale_stride, source, d, depth, DEPTH, BD, DEQUANTIZE, DTYPE)
            if UPCAST:
                x = x.to(tl.float32)
            w = expert_tiles.mapped_tile(weights, expert, 0, first_column, d, STRIDE_D, BN, BD, UPCAST)
            total = product_added(x, w, total, DEQUANTIZE)
            if GATED:
                w = expert_tiles.mapped_tile(weights, expert, 1, first_column, d, STRIDE_D, BN, BD, UPCAST)
                second = product_added(x, w, second, DEQUANTIZE)
    elif SCALED:
        total = tl.zeros([BM, BB], tl.float32)
        tl.static_assert(BD == SCALE_BLOCK, "a step along the depth is one block of scales")
        b = weights + expert.to(tl.int64) * STRIDE_E + column[None, :].to(tl.int64) * STRIDE_N
        b += depth[:, None].to(tl.int64) * STRIDE_D
        DEPTH_BLOCKS: tl.constexpr = (DEPTH + SCALE_BLOCK - 1) // SCALE_BLOCK
        COLUMN_BLOCKS: tl.constexpr = (NUM_COLUMNS + SCALE_BLOCK - 1) // SCALE_BLOCK
        column_block = tl.minimum(column, NUM_COLUMNS - 1) // SCALE_BLOCK
        scale_of_column = scales + (expert * COLUMN_BLOCKS + column_block) * DEPTH_BLOCKS
        for d in range(0, DEPTH, BD):
            x = expert_tiles.rows_tile(a, row_scales, scale_stride, source, d, depth, DEPTH, BD, DEQUANTIZE, DTYPE)
            w = expert_tiles.weights_tile(b, column, depth, d, DEPTH, NUM_COLUMNS, STRIDE_D, MASKED, BD)
            if QUANTIZED:
                q = x
                row_scale = tl.load(row_scales + source * scale_stride + d // SCALE_BLOCK)
            else:
                q, row_scale = expert_math.quantize(x.to(tl.float32))
            column_scale = tl.load(scale_of_column + d // SCALE_BLOCK)
            total += tl.dot(q, w, out_dtype=tl.float32) * (row_scale[:, None] * column_scale[None, :])
    else:
        total = tl.zeros([BM, BB], tl.float32)
        b = weights + expert.to(tl.int64) * STRIDE_E + column[None, :].to(tl.int64) * STRIDE_N
        b += depth[:, None].to(tl.int64) * STRIDE_D
        for d in range(0, DEPTH, BD):
            x = expert_tiles.rows_tile(a, row_scales, scale_stride, source, d, depth, DEPTH, BD, DEQUANTIZE, DTYPE)
            w = expert_tiles.weights_tile(b, column, depth, d, DEPTH, NUM_COLUMNS, STRIDE_D, MASKED, BD)
            if UPCAST:  # Triton's interpreter multiplies bfloat16 as if it were integers
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            total = product_added(x, w, total, DEQUANTIZE)
    own_column = first_column + tl.arange(0, BN)
    if GATED:
        if PAIRED:
            gate, up = tl.split(tl.reshape(total, [BM, BN, 2]))
        elif TENSOR_MAP:
            gate = total
            up = second
        else:
            gate, up = tl.split(tl.permute(tl.reshape(total, [BM, 2, BN]), [0, 2, 1]))
        if BIAS:
            first = bias + expert.to(tl.int64) * NUM_COLUMNS + (2 * own_column if INTERLEAVED else own_column)
            gate += tl.load(first, mask=own_column < WIDTH, other=0.0).to(tl.float32)[None, :]
            up += tl.load(first + (1 if INTERLEAVED else WIDTH), mask=own_column < WIDTH, other=0.0).to(tl.float32)[None, :]
        value = expert_math.activate_gated(gate, up, alpha, limit, ACTIVATION)
    else:
        if BIAS:
            here = bias + expert.to(tl.int64) * NUM_COLUMNS + own_column
            total += tl.load(here, mask=own_column < WIDTH, other=0.0).to(tl.float32)[None, :]
        value = expert_math.activate(total, ACTIVATION)
    target = position.to(tl.int64) if IS_FIRST_PRODUCT else pair.to(tl.int64)
    keep = (lanes < num)[:, None] & (own_column < WIDTH)[None, :]
    tl.store(out + target[:, None] * WIDTH + own_column[None, :], value.to(out.dtype.element_ty), mask=keep)


@triton.jit
def expert_gemm_kernel(
    rows,
    row_scales,
    scale_stride,
    weights,
    scales,
    bias,
    out,
    out_scales,
    counts,
    offsets,
    pairs,
    first_row,
    alpha,
    limit,
    L: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_D: tl.constexpr,
    IS_FIRST_PRODUCT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    GATHERED: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
    SWAPPED: tl.constexpr,
    TENSOR_MAP: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BM_FEW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    LANES: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Serves the experts with MIN_ROWS <= rows <= MAX_ROWS; MAX_ROWS 0 means no upper limit. Programs take tiles in turn, the
    tiles that read the same weights one after another. If there is no expert to serve, all programs exit at once.

    Args:
        rows: of the first product the gathered rows [R, DEPTH], read through `pairs`; of the second [pairs, DEPTH], in the order
            of `pairs`. QUANTIZED: `quantize_rows_kernel` has written the rows of this chunk as float8, with `row_scales`; the
            bits of `out` are the same as when a tile quantizes them itself. GATHERED: the gathered rows came as float8. For
            weights that are not SCALED they become numbers of the dtype of `out` as they are read.
        IN_BLOCKS: such rows and weights, by `expert_scaled`; with SWAPPED the weights' columns take the place of rows. The first
            product then writes quantized rows: `out` is float8, `out_scales` [pairs, WIDTH / 128], and `bias` has the dtype
            that activated rows are rounded to before, also where it is not read.
        scale_stride: from a row's scales to the next row's.
        weights: element (expert, column, depth) lies at expert * STRIDE_E + column * STRIDE_N + depth * STRIDE_D; with TENSOR_MAP
            a descriptor of [experts, gate or up, WIDTH, DEPTH] in blocks of [1, 1, BN, BD]; where columns and not depths lie side
            by side, of [experts, gate or up, DEPTH, WIDTH] in blocks of [1, 1, BD, BN], and if gates and ups are interleaved
            there, of [experts, 1, DEPTH, 2 * WIDTH] in blocks of [1, 1, BD, 2 * BN].
        scales: of float8 weights [L, columns / 128, DEPTH / 128], read if SCALED. bias: [L, columns], read if BIAS.
        out: of the first product the activated rows [pairs, WIDTH] in the order of `pairs`; of the second [R * K, WIDTH], where
            the output for the k-th choice of row r is row r * K + k.
        counts, offsets, pairs: written by `expert_table_kernel`.
        WIDTH: columns of `out`; a GATED product has twice as many.
        BM_FEW, BM: rows of a tile: BM_FEW where at most so many rows of an expert are left, else BM.
        OVERLAPS: the launch before this one is of the same product, and serves other experts. That one has waited for all that
            both read, so this one works beside it and waits for its end at its own: who waits for this one waits for both. A few
            large tiles of an expert with many rows would else hold up all experts with few.

    Example:
        Experts [[1, 0], [0, 1]] and [[0, 2], [2, 0]], rows [1, 2] and [3, 4] at K = 1 that chose expert 1 and 0, no activation:
        the first product gives [3, 4], [4, 2] (sorted by expert), the second with such rows gives row 1 and row 0 of `out`.
    """
    TILES_N: tl.constexpr = (WIDTH + BN - 1) // BN
    lanes = tl.arange(0, LANES)
    if IS_FIRST_PRODUCT:
        if not OVERLAPS:
            wire.wait_for_previous_kernel(PDL)
        wire.let_next_kernel_start(PDL)
    # The second product may read the table before it waits: the kernels in between let it start only after the first of them had
    # waited for the table.
    count = tl.load(counts + lanes, mask=lanes < L, other=0)
    offset = tl.load(offsets + lanes, mask=lanes < L, other=0)
    served = count >= MIN_ROWS
    if MAX_ROWS > 0:
        served = served & (count <= MAX_ROWS)
    tiles = tl.where(served, (count + BM - 1) // BM, 0) * TILES_N
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles)
    if not IS_FIRST_PRODUCT:
        if not OVERLAPS:
            wire.wait_for_previous_kernel(PDL)
        wire.let_next_kernel_start(PDL)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert = tl.sum((ends <= tile).to(tl.int32))
        num = tl.sum(tl.where(lanes == expert, count, 0))
        begin = tl.sum(tl.where(lanes == expert, offset, 0))
        within = tile - tl.sum(tl.where(lanes < expert, tiles, 0))
        tiles_m = (num + BM - 1) // BM
        done = (within % tiles_m) * BM
        first_column = (within // tiles_m) * BN
        if IN_BLOCKS:
            if BM == BM_FEW or num - done <= BM_FEW:
                expert_scaled.scaled_tile(
                    rows, row_scales, scale_stride, weights, scales, bias, out, out_scales, pairs, first_row, alpha, limit,
                    expert, begin + done, num - done, first_column, K, DEPTH, WIDTH, STRIDE_D, IS_FIRST_PRODUCT, GATED,
                    ACTIVATION, BIAS, GATHERED, SWAPPED, BM_FEW, BN, BD, UPCAST,
                )  # fmt: skip
            else:
                expert_scaled.scaled_tile(
                    rows, row_scales, scale_stride, weights, scales, bias, out, out_scales, pairs, first_row, alpha, limit,
                    expert, begin + done, num - done, first_column, K, DEPTH, WIDTH, STRIDE_D, IS_FIRST_PRODUCT, GATED,
                    ACTIVATION, BIAS, GATHERED, SWAPPED, BM, BN, BD, UPCAST,
                )  # fmt: skip
        elif BM == BM_FEW or num - done <= BM_FEW:
            product_tile(
                rows, row_scales, scale_stride, weights, scales, bias, out, pairs, first_row, alpha, limit, expert, begin + done,
                num - done, first_column, K, DEPTH, WIDTH, STRIDE_E, STRIDE_N, STRIDE_D, IS_FIRST_PRODUCT, GATED, INTERLEAVED,
                ACTIVATION, BIAS, SCALED, QUANTIZED, GATHERED, TENSOR_MAP, BM_FEW, BN, BD, UPCAST,
            )  # fmt: skip
        else:
            product_tile(
                rows, row_scales, scale_stride, weights, scales, bias, out, pairs, first_row, alpha, limit, expert, begin + done,
                num - done, first_column, K, DEPTH, WIDTH, STRIDE_E, STRIDE_N, STRIDE_D, IS_FIRST_PRODUCT, GATED, INTERLEAVED,
                ACTIVATION, BIAS, SCALED, QUANTIZED, GATHERED, TENSOR_MAP, BM, BN, BD, UPCAST,
            )  # fmt: skip
    if OVERLAPS:
        wire.wait_for_previous_kernel(PDL)
