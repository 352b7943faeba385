"""Grouped matrix product: each local expert's weights times the rows that chose it, gated by the device's counts."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire

SIGNATURE = {
    "rows": "*ROWS",
    "row_scales": "*fp32",
    "weights": "*WEIGHT",
    "scales": "*fp32",
    "bias": "*DTYPE",
    "out": "*DTYPE",
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
    "FIRST": "constexpr",
    "GATED": "constexpr",
    "INTERLEAVED": "constexpr",
    "ACTIVATION": "constexpr",
    "BIAS": "constexpr",
    "SCALED": "constexpr",
    "QUANTIZED": "constexpr",
    "TENSOR_MAP": "constexpr",
    "LOW": "constexpr",
    "HIGH": "constexpr",
    "BM_FEW": "constexpr",
    "BM": "constexpr",
    "BN": "constexpr",
    "BD": "constexpr",
    "LANES": "constexpr",
    "UPCAST": "constexpr",
    "PDL": "constexpr",
}
FP8_MAX: tl.constexpr = tl.constexpr(448.0)
"""Largest finite float8_e4m3fn."""
SCALE_BLOCK: tl.constexpr = tl.constexpr(128)
"""Weights share a scale per 128 x 128, rows per 1 x 128."""


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), float32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def clamp(x, low, high):
    """As torch.clamp, and like it: a NaN stays one. The default of minimum and maximum is the other number, which hides a fault.

    Example:
        -3, 1, 9 and NaN between -2 and 2: -2, 1, 2, NaN.
    """
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activations without a gate, float32.

    Example:
        squared_relu of -1, 0, 3: 0, 0, 9.
    """
    if NAME == "squared_relu":
        x = clamp(x, 0.0, float("inf"))
        return x * x
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * sigmoid(2.0 * inner)  # 0.5 * (1 + tanh(y)) is sigmoid(2 y)
    elif NAME == "relu":
        return clamp(x, 0.0, float("inf"))
    elif NAME == "silu":
        return x * sigmoid(x)
    else:
        tl.static_assert(NAME == "none", "unknown activation")
        return x


@triton.jit
def activate_gated(gate, up, alpha, limit, NAME: tl.constexpr):
    """The activations with a gate, float32.

    Example:
        clamped_swiglu with alpha 0 and limit 2 of gate 9 and up -5: 2 * 0.5 * (-2 + 1) = -1.
    """
    if NAME == "swiglu":
        return gate * sigmoid(gate) * up
    else:
        tl.static_assert(NAME == "clamped_swiglu", "unknown activation")
        gate = clamp(gate, -float("inf"), limit)
        up = clamp(up, -limit, limit)
        return gate * sigmoid(gate * alpha) * (up + 1.0)


@triton.jit
def quantize(x):
    """Rows of 128 float32 as float8_e4m3fn and their scales: the largest number of a row becomes 448.

    Divisions are rounded as on CPUs: `/` may miss by two units, and bfloat16 rows often lie exactly between two float8 numbers.

    Example:
        224, -448, 1 and zeros: scale 1. 112, -224, 0.5: scale 0.5 and the same float8. Zeros: scale 1.
    """
    largest = tl.max(tl.abs(x), 1)
    scale = tl.where(largest > 0, tl.div_rn(largest, tl.full(largest.shape, FP8_MAX, tl.float32)), 1.0)
    return tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)).to(tl.float8e4nv), scale


QUANTIZE_SIGNATURE = {
    "rows": "*DTYPE",
    "counts": "*i32",
    "valid_tokens": "*i32",
    "out": "*fp8e4nv",
    "scales": "*fp32",
    "first_row": "i32",
    "num_rows": "i32",
    "L": "constexpr",
    "X": "constexpr",
    "FIRST": "constexpr",
    "LOW": "constexpr",
    "LANES": "constexpr",
    "PDL": "constexpr",
}


@triton.jit
def quantize_rows_kernel(
    rows,
    counts,
    valid_tokens,
    out,
    scales,
    first_row,
    num_rows,
    L: tl.constexpr,
    X: tl.constexpr,
    FIRST: tl.constexpr,
    LOW: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantizes each row of a product once, where an expert has more than LOW rows: with fewer, the products do it as they read.

    Args:
        rows: FIRST: [R, X], of which the round's valid rows are read; else [pairs, X], as many as `counts` say.
        out, scales: [rows of the round, X] and [.., ceil(X / 128)].

    Example:
        A row of 224, -448, 1 and zeros, and counts [1] with LOW 0: the same numbers in float8, scale 1. With LOW 1: nothing.
    """
    GROUPS: tl.constexpr = (X + 127) // 128  # of plain ints, as the interpreter wants them here
    ROWS: tl.constexpr = 16
    lanes = tl.arange(0, LANES)
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    count = tl.load(counts + lanes, mask=lanes < L, other=0)
    if tl.max(count) > LOW:
        if FIRST:
            num = tl.maximum(tl.minimum(tl.load(valid_tokens) - first_row, num_rows), 0)
        else:
            num = tl.sum(count)
        for task in range(tl.program_id(0), (num + ROWS - 1) // ROWS * GROUPS, tl.num_programs(0)):
            row = (task // GROUPS) * ROWS + tl.arange(0, ROWS)
            column = (task % GROUPS) * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)
            live = (row < num)[:, None] & (column < X)[None, :]
            source = (first_row + row if FIRST else row).to(tl.int64)
            x = tl.load(rows + source[:, None] * X + column[None, :], mask=live, other=0.0)
            q, scale = quantize(x.to(tl.float32))
            tl.store(out + row.to(tl.int64)[:, None] * X + column[None, :], q, mask=live)
            tl.store(scales + row.to(tl.int64) * GROUPS + task % GROUPS, scale, mask=row < num)


@triton.jit
def columns_of(first_column, WIDTH: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BN: tl.constexpr):
    """Columns of the product behind BN columns of `out`: gates, then ups, where there is a gate. Those beyond WIDTH stand for the
    last one.

    Example:
        WIDTH 6 from column 4, BN 2: 4, 5; with a gate 4, 5, 10, 11; interleaved 8, 10, 9, 11.
    """
    if GATED:
        within = tl.arange(0, 2 * BN)
        column = first_column + within % BN
        if WIDTH % BN != 0:
            column = tl.minimum(column, WIDTH - 1)
        half = within // BN
        column = 2 * column + half if INTERLEAVED else column + half * WIDTH
    else:
        column = first_column + tl.arange(0, BN)
        if WIDTH % BN != 0:
            column = tl.minimum(column, WIDTH - 1)
    return column


@triton.jit
def product_tile(
    rows,
    row_scales,
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
    FIRST: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    TENSOR_MAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """BM x BN outputs of one expert: the pairs at begin .. begin + num - 1 (num > 0; those beyond BM are left out)."""
    BB: tl.constexpr = 2 * BN if GATED else BN
    NUM_COLUMNS: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    lanes = tl.arange(0, BM)
    position = begin + tl.minimum(lanes, num - 1)  # a row that is there instead of one that is not: never stored
    pair = tl.load(pairs + position)
    if FIRST:
        source = (pair // K if QUANTIZED else first_row + pair // K).to(tl.int64)
    else:
        source = position.to(tl.int64)
    column = columns_of(first_column, WIDTH, GATED, INTERLEAVED, BN)
    depth = tl.arange(0, BD)
    a = rows + source[:, None] * DEPTH + depth[None, :]
    if TENSOR_MAP:
        # One thread asks for a whole tile. Gates and ups are two tiles and two products: as one they would be copied together.
        total = tl.zeros([BM, BN], tl.float32)
        second = tl.zeros([BM, BN], tl.float32)
        for d in range(0, DEPTH, BD):
            if DEPTH % BD == 0:
                x = tl.load(a + d)
            else:
                x = tl.load(a + d, mask=(d + depth < DEPTH)[None, :], other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
            w = tl.reshape(weights.load([expert, 0, first_column, d]), [BN, BD])
            w = w.to(tl.float32) if UPCAST else w
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
            if GATED:
                w = tl.reshape(weights.load([expert, 1, first_column, d]), [BN, BD])
                w = w.to(tl.float32) if UPCAST else w
                second = tl.dot(x, tl.trans(w), second, input_precision="ieee")
    elif SCALED:
        total = tl.zeros([BM, BB], tl.float32)
        tl.static_assert(BD == SCALE_BLOCK, "a step along the depth is one block of scales")
        b = weights + expert.to(tl.int64) * STRIDE_E + column[None, :].to(tl.int64) * STRIDE_N + depth[:, None] * STRIDE_D
        DEPTH_BLOCKS: tl.constexpr = (DEPTH + SCALE_BLOCK - 1) // SCALE_BLOCK
        COLUMN_BLOCKS: tl.constexpr = (NUM_COLUMNS + SCALE_BLOCK - 1) // SCALE_BLOCK
        scale_of_column = scales + (expert * COLUMN_BLOCKS + column // SCALE_BLOCK) * DEPTH_BLOCKS
        for d in range(0, DEPTH, BD):
            if DEPTH % BD == 0:
                x = tl.load(a + d)
                w = tl.load(b + d * STRIDE_D)
            else:
                x = tl.load(a + d, mask=(d + depth < DEPTH)[None, :], other=0.0)
                w = tl.load(b + d * STRIDE_D, mask=(d + depth < DEPTH)[:, None], other=0.0)
            if QUANTIZED:
                q = x
                row_scale = tl.load(row_scales + source * DEPTH_BLOCKS + d // SCALE_BLOCK)
            else:
                q, row_scale = quantize(x.to(tl.float32))
            column_scale = tl.load(scale_of_column + d // SCALE_BLOCK)
            total += tl.dot(q, w, out_dtype=tl.float32) * (row_scale[:, None] * column_scale[None, :])
    else:
        total = tl.zeros([BM, BB], tl.float32)
        b = weights + expert.to(tl.int64) * STRIDE_E + column[None, :].to(tl.int64) * STRIDE_N + depth[:, None] * STRIDE_D
        for d in range(0, DEPTH, BD):
            if DEPTH % BD == 0:
                x = tl.load(a + d)
                w = tl.load(b + d * STRIDE_D)
            else:
                x = tl.load(a + d, mask=(d + depth < DEPTH)[None, :], other=0.0)
                w = tl.load(b + d * STRIDE_D, mask=(d + depth < DEPTH)[:, None], other=0.0)
            if UPCAST:  # Triton's interpreter multiplies bfloat16 as if it were integers
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            total = tl.dot(x, w, total, input_precision="ieee")
    own_column = first_column + tl.arange(0, BN)
    if GATED:
        if TENSOR_MAP:
            gate = total
            up = second
        else:
            gate, up = tl.split(tl.permute(tl.reshape(total, [BM, 2, BN]), [0, 2, 1]))
        if BIAS:
            first = bias + expert.to(tl.int64) * NUM_COLUMNS + (2 * own_column if INTERLEAVED else own_column)
            gate += tl.load(first, mask=own_column < WIDTH, other=0.0).to(tl.float32)[None, :]
            up += tl.load(first + (1 if INTERLEAVED else WIDTH), mask=own_column < WIDTH, other=0.0).to(tl.float32)[None, :]
        value = activate_gated(gate, up, alpha, limit, ACTIVATION)
    else:
        if BIAS:
            here = bias + expert.to(tl.int64) * NUM_COLUMNS + own_column
            total += tl.load(here, mask=own_column < WIDTH, other=0.0).to(tl.float32)[None, :]
        value = activate(total, ACTIVATION)
    target = position.to(tl.int64) if FIRST else pair.to(tl.int64)
    keep = (lanes < num)[:, None] & (own_column < WIDTH)[None, :]
    tl.store(out + target[:, None] * WIDTH + own_column[None, :], value.to(out.dtype.element_ty), mask=keep)


@triton.jit
def expert_gemm_kernel(
    rows,
    row_scales,
    weights,
    scales,
    bias,
    out,
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
    FIRST: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    TENSOR_MAP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BM_FEW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    LANES: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Serves the experts with LOW < rows <= HIGH (HIGH 0: no upper limit). Tiles go round the programs, those of one weight tile
    together; with none to serve all programs exit at once.

    Args:
        rows: first product: [R, DEPTH] gathered rows, read through `pairs`. Second: [pairs, DEPTH], in the order of `pairs`.
            QUANTIZED: float8, of this round alone, by `quantize_rows_kernel`, and `row_scales` with them; the same bits.
        weights: element (expert, column, depth) lies at expert * STRIDE_E + column * STRIDE_N + depth * STRIDE_D; with TENSOR_MAP
            a descriptor of [experts, gate or up, WIDTH, DEPTH] in blocks of [1, 1, BN, BD].
        scales: of float8 weights (SCALED): [L, columns / 128, DEPTH / 128]. bias: [L, columns], with BIAS. Else unused.
        out: first product: activated [pairs, WIDTH] in the order of `pairs`. Second: row `pair` (r * K + slot), WIDTH columns.
        counts, offsets, pairs: of `expert_table_kernel`.
        WIDTH: columns of `out`; a GATED product has twice as many.
        BM_FEW: where at most so many rows of an expert are left, the tile has so many, else BM. Equal: one cut for all.

    Example:
        Experts [[1, 0], [0, 1]] and [[0, 2], [2, 0]], rows [1, 2] and [3, 4] at K = 1 that chose expert 1 and 0, no activation:
        the first product gives [3, 4], [4, 2] (sorted by expert), the second with such rows gives row 1 and row 0 of `out`.
    """
    TILES_N: tl.constexpr = (WIDTH + BN - 1) // BN
    lanes = tl.arange(0, LANES)
    if FIRST:
        wire.wait_for_previous_kernel(PDL)
        wire.let_next_kernel_start(PDL)
    # The second product's kernels may look at the table sooner: every kernel before them let them start after its own wait.
    count = tl.load(counts + lanes, mask=lanes < L, other=0)
    offset = tl.load(offsets + lanes, mask=lanes < L, other=0)
    served = count > LOW
    if HIGH > 0:
        served = served & (count <= HIGH)
    tiles = tl.where(served, (count + BM - 1) // BM, 0) * TILES_N
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles)
    if not FIRST:
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
        if BM == BM_FEW or num - done <= BM_FEW:
            product_tile(
                rows, row_scales, weights, scales, bias, out, pairs, first_row, alpha, limit, expert, begin + done, num - done,
                first_column, K, DEPTH, WIDTH, STRIDE_E, STRIDE_N, STRIDE_D, FIRST, GATED, INTERLEAVED, ACTIVATION, BIAS, SCALED,
                QUANTIZED, TENSOR_MAP, BM_FEW, BN, BD, UPCAST,
            )  # fmt: skip
        else:
            product_tile(
                rows, row_scales, weights, scales, bias, out, pairs, first_row, alpha, limit, expert, begin + done, num - done,
                first_column, K, DEPTH, WIDTH, STRIDE_E, STRIDE_N, STRIDE_D, FIRST, GATED, INTERLEAVED, ACTIVATION, BIAS, SCALED,
                QUANTIZED, TENSOR_MAP, BM, BN, BD, UPCAST,
            )  # fmt: skip
