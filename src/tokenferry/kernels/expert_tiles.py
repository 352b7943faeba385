"""What the grouped product loads, a tile at a time: device functions, and no kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels.expert_math import SCALE_BLOCK


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
