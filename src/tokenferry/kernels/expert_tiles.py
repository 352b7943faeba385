"""What the grouped product loads and stores, a tile at a time: device functions, and no kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import expert_math
from tokenferry.kernels.expert_math import SCALE_BLOCK

APART: tl.constexpr = tl.constexpr(0)
PAIRED: tl.constexpr = tl.constexpr(1)
TWO: tl.constexpr = tl.constexpr(2)
"""How the sums of gates and ups are held: in one tile, gates before ups or in pairs, or in two tiles."""


@triton.jit
def weights_tile(
    pointers,
    column,
    depth,
    d,
    DEPTH: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    STRIDE_D: tl.constexpr,
    MASKED: tl.constexpr,
    BD: tl.constexpr,
):
    """The weights [BD, columns] at depth d, zeros beyond the last depth. `pointers` point at depth 0. MASKED: some columns may be
    beyond the last.

    Example:
        DEPTH 6, BD 4, d 4: two rows of weights and two of zeros.
    """
    # Stacks that lie [depth, expert, column] may be longer than an int32 counts, along the depth alone.
    step = tl.cast(d, tl.int64) * STRIDE_D if DEPTH * STRIDE_D >= 2**31 else d * STRIDE_D
    if DEPTH % BD == 0 and not MASKED:
        return tl.load(pointers + step)
    elif not MASKED:
        return tl.load(pointers + step, mask=(d + depth < DEPTH)[:, None], other=0.0)
    elif DEPTH % BD == 0:
        return tl.load(pointers + step, mask=(column < NUM_COLUMNS)[None, :], other=0.0)
    else:
        return tl.load(pointers + step, mask=(d + depth < DEPTH)[:, None] & (column < NUM_COLUMNS)[None, :], other=0.0)


@triton.jit
def mapped_tile(
    weights,
    expert,
    half,
    first_column,
    d,
    STRIDE_D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The weights [BD, BN] of gates (half 0) or ups (half 1), by a descriptor whose last dimension is the one that lies side by
    side: the depth, or else the columns.

    Example:
        A descriptor of blocks [1, 1, BD, BN], with STRIDE_D 96: the block at [expert, half, d, first_column].
    """
    if STRIDE_D == 1:
        w = tl.trans(tl.reshape(weights.load([expert, half, first_column, d]), [BN, BD]))
    else:
        w = tl.reshape(weights.load([expert, half, d, first_column]), [BD, BN])
    return w.to(tl.float32) if UPCAST else w


@triton.jit
def rows_tile(
    rows,
    row_scales,
    scale_stride,
    source,
    d,
    depth,
    DEPTH: tl.constexpr,
    BD: tl.constexpr,
    DEQUANTIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The rows [rows, BD] at depth d, zeros beyond the last depth. `rows` point at depth 0 of each. With DEQUANTIZE they are
    float8, and become numbers of DTYPE by their scales, each rounded once; BD divides 128 then."""
    if DEPTH % BD == 0:
        x = tl.load(rows + d)
    else:
        x = tl.load(rows + d, mask=(d + depth < DEPTH)[None, :], other=0.0)
    if DEQUANTIZE:
        scale = tl.load(row_scales + source * scale_stride + d // SCALE_BLOCK)
        x = (x.to(tl.float32) * scale[:, None]).to(DTYPE)
    return x


@triton.jit
def rows_of(
    pairs, first_row, begin, num, K: tl.constexpr, IS_FIRST_PRODUCT: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr
):
    """Of ROWS pairs from `begin` on, of which `num` > 0 exist: their positions, their numbers, and the rows of the operand. A
    missing one is replaced by an existing one; it is never stored. CHUNK: the operand's rows are this chunk's alone.

    Example:
        Pairs 4, 7 of K = 2 and ROWS 4 from chunk row 10 on: positions 0, 1, 1, 1, rows 12, 13, 13, 13 of the first product.
    """
    position = begin + tl.minimum(tl.arange(0, ROWS), num - 1)
    pair = tl.load(pairs + position)
    if IS_FIRST_PRODUCT:
        source = (pair // K if CHUNK else first_row + pair // K).to(tl.int64)
    else:
        source = position.to(tl.int64)
    return position, pair, source


@triton.jit
def store_tile(
    total,
    second,
    bias,
    out,
    position,
    pair,
    num,
    alpha,
    limit,
    expert,
    first_column,
    WIDTH: tl.constexpr,
    IS_FIRST_PRODUCT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    FORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Bias and activation of the sums of `num` rows, and then to `out`. With a gate, `total` has gates and ups: in pairs (FORM
    PAIRED), gates before ups (APART), or the gates alone, and `second` the ups (TWO)."""
    NUM_COLUMNS: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    own_column = first_column + tl.arange(0, BN)
    if GATED:
        if FORM == PAIRED:
            gate, up = tl.split(tl.reshape(total, [BM, BN, 2]))
        elif FORM == TWO:
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
    keep = (tl.arange(0, BM) < num)[:, None] & (own_column < WIDTH)[None, :]
    tl.store(out + target[:, None] * WIDTH + own_column[None, :], value.to(out.dtype.element_ty), mask=keep)
