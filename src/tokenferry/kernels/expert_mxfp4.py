"""Grouped matrix product of packed MXFP4 weights: `expert_gemm_kernel`, but that weights become bfloat16 on their way in."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import expert_math, expert_tiles, wire, wire_mxfp4

SIGNATURE = {
    "rows": "*ROWS",
    "row_scales": "*fp32",
    "scale_stride": "i32",
    "weights": "*i32",
    "scales": "*i32",
    "bias": "*DTYPE",
    "out": "*DTYPE",
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
    "IS_FIRST_PRODUCT": "constexpr",
    "GATED": "constexpr",
    "INTERLEAVED": "constexpr",
    "ACTIVATION": "constexpr",
    "BIAS": "constexpr",
    "GATHERED": "constexpr",
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

BLOCK: tl.constexpr = tl.constexpr(64)
"""Columns and depths of weights that are packed together: see `tokenferry.experts.mxfp4.pack`."""
WORDS: tl.constexpr = tl.constexpr(512)
SCALE_WORDS: tl.constexpr = tl.constexpr(32)


@triton.jit
def unpacked_tile(words, scales, d, DEPTH_BLOCKS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr):
    """The weights [N, BD] at depth d, zeros from the last block on. The pointers [N / 64, 1, words of a block] are at depth 0.

    Nothing moves between threads: a block lies as tensor cores take it, and the reshaping only says so.
    """
    N_BLOCKS: tl.constexpr = N // BLOCK
    D_BLOCKS: tl.constexpr = BD // BLOCK
    block = d // BLOCK + tl.arange(0, D_BLOCKS)[None, :, None]
    if DEPTH_BLOCKS % D_BLOCKS == 0:
        word = tl.load(words + block * WORDS)
        scale = tl.load(scales + block * SCALE_WORDS)
    else:
        word = tl.load(words + block * WORDS, mask=block < DEPTH_BLOCKS, other=0)
        scale = tl.load(scales + block * SCALE_WORDS, mask=block < DEPTH_BLOCKS, other=0)
    # Blocks of columns and of depth, then: warp, thread's column, thread's depth, 32 depths, column 8 further on.
    word = tl.reshape(word, [N_BLOCKS, D_BLOCKS, 4, 8, 4, 2, 2])
    word = tl.reshape(tl.permute(word, [0, 2, 6, 3, 1, 5, 4]), [N, D_BLOCKS * 8])
    even = tl.join(scale & 0xFF, (scale >> 16) & 0xFF)
    odd = tl.join((scale >> 8) & 0xFF, (scale >> 24) & 0xFF)
    scale = tl.reshape(tl.join(even, odd), [N_BLOCKS, D_BLOCKS, 4, 8, 2, 2])
    scale = tl.reshape(tl.permute(scale, [0, 2, 5, 3, 1, 4]), [N, D_BLOCKS * 2, 1])
    scale = tl.reshape(tl.broadcast_to(scale, [N, D_BLOCKS * 2, 4]), [N, D_BLOCKS * 8])
    v0, v1, v2, v3, v4, v5, v6, v7 = wire_mxfp4.unpack_mxfp4(word, scale)
    first = tl.join(tl.join(v0, v1), tl.join(v2, v3))
    second = tl.join(tl.join(v4, v5), tl.join(v6, v7))
    # Column, block, 32 depths, thread's depth, then of the word's eight: neighbour, 8 further on, 16 further on.
    values = tl.reshape(tl.join(first, second), [N, D_BLOCKS, 2, 4, 2, 2, 2])
    return tl.reshape(tl.permute(values, [0, 1, 2, 6, 5, 3, 4]), [N, BD])


@triton.jit
def unpacked_product(
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
    IS_FIRST_PRODUCT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    GATHERED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Computes BN x BM outputs of one expert, of the pairs at begin .. begin + num - 1 (num > 0), those beyond BM left out.

    Weights are the first operand, which tensor cores take from registers, where they are unpacked. So sums lie [columns, rows].
    """
    N: tl.constexpr = 2 * BN if GATED else BN
    NUM_COLUMNS: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    DEPTH_BLOCKS: tl.constexpr = (DEPTH + BLOCK - 1) // BLOCK
    WIDTH_OF_BLOCK: tl.constexpr = BLOCK // 2 if GATED else BLOCK
    COLUMN_BLOCKS: tl.constexpr = (WIDTH + WIDTH_OF_BLOCK - 1) // WIDTH_OF_BLOCK
    DTYPE: tl.constexpr = out.dtype.element_ty
    lanes = tl.arange(0, BM)
    position = begin + tl.minimum(lanes, num - 1)  # a missing row is replaced by an existing one; it is never stored
    pair = tl.load(pairs + position)
    if IS_FIRST_PRODUCT:
        source = (first_row + pair // K).to(tl.int64)
    else:
        source = position.to(tl.int64)
    depth = tl.arange(0, BD)
    a = rows + source[:, None] * DEPTH + depth[None, :]
    block = tl.minimum(first_column // WIDTH_OF_BLOCK + tl.arange(0, N // BLOCK), COLUMN_BLOCKS - 1)
    strip = (expert.to(tl.int64) * COLUMN_BLOCKS + block)[:, None, None] * DEPTH_BLOCKS
    words = weights + strip * WORDS + tl.arange(0, WORDS)[None, None, :]
    factors = scales + strip * SCALE_WORDS + tl.arange(0, SCALE_WORDS)[None, None, :]
    total = tl.zeros([N, BM], tl.float32)
    for d in range(0, DEPTH, BD):
        x = expert_tiles.rows_tile(a, row_scales, scale_stride, source, d, depth, DEPTH, BD, GATHERED, DTYPE)
        w = unpacked_tile(words, factors, d, DEPTH_BLOCKS, N, BD)
        if UPCAST:
            x = x.to(tl.float32)
        total = tl.dot(w, tl.trans(x), total, input_precision="ieee")
    own_column = first_column + tl.arange(0, BN)
    if GATED:
        halves = tl.permute(tl.reshape(total, [N // 16, 2, 8, BM]), [0, 2, 3, 1])
        gate, up = tl.split(tl.reshape(halves, [BN, BM, 2]))
        if BIAS:
            first = bias + expert.to(tl.int64) * NUM_COLUMNS + (2 * own_column if INTERLEAVED else own_column)
            gate += tl.load(first, mask=own_column < WIDTH, other=0.0).to(tl.float32)[:, None]
            up += tl.load(first + (1 if INTERLEAVED else WIDTH), mask=own_column < WIDTH, other=0.0).to(tl.float32)[:, None]
        value = expert_math.activate_gated(gate, up, alpha, limit, ACTIVATION)
    else:
        if BIAS:
            here = bias + expert.to(tl.int64) * NUM_COLUMNS + own_column
            total += tl.load(here, mask=own_column < WIDTH, other=0.0).to(tl.float32)[:, None]
        value = expert_math.activate(total, ACTIVATION)
    target = position.to(tl.int64) if IS_FIRST_PRODUCT else pair.to(tl.int64)
    keep = (own_column < WIDTH)[:, None] & (lanes < num)[None, :]
    tl.store(out + target[None, :] * WIDTH + own_column[:, None], value.to(DTYPE), mask=keep)


@triton.jit
def expert_mxfp4_kernel(
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
    IS_FIRST_PRODUCT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    GATHERED: tl.constexpr,
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
    """As `expert_gemm_kernel`, whose words these are, with weights and scales as `tokenferry.experts.mxfp4.pack` makes them.

    Args:
        weights, scales: [L, blocks of columns, blocks of depth, 512] and [.., 32].
        out_scales: not used.
        GATHERED: the gathered rows came as float8 with `row_scales`; they become numbers of the dtype of `out`.

    Example:
        See `expert_gemm_kernel`: the same, if its weights are given packed.
    """
    TILES_N: tl.constexpr = (WIDTH + BN - 1) // BN
    lanes = tl.arange(0, LANES)
    if IS_FIRST_PRODUCT:
        if not OVERLAPS:
            wire.wait_for_previous_kernel(PDL)
        wire.let_next_kernel_start(PDL)
    count = tl.load(counts + lanes, mask=lanes < L, other=0)
    offset = tl.load(offsets + lanes, mask=lanes < L, other=0)
    served = count >= MIN_ROWS
    if MAX_ROWS > 0:
        served = served & (count <= MAX_ROWS)
    tiles = tl.where(served, (count + BM - 1) // BM, 0) * TILES_N
    ends = tl.cumsum(tiles, 0)
    total = wire_mxfp4.same_for_all(tl.sum(tiles))
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
        if BM == BM_FEW or num - done <= BM_FEW:
            unpacked_product(
                rows, row_scales, scale_stride, weights, scales, bias, out, pairs, first_row, alpha, limit, expert, begin + done,
                num - done, first_column, K, DEPTH, WIDTH, IS_FIRST_PRODUCT, GATED, INTERLEAVED, ACTIVATION, BIAS, GATHERED,
                BM_FEW, BN, BD, UPCAST,
            )  # fmt: skip
        else:
            unpacked_product(
                rows, row_scales, scale_stride, weights, scales, bias, out, pairs, first_row, alpha, limit, expert, begin + done,
                num - done, first_column, K, DEPTH, WIDTH, IS_FIRST_PRODUCT, GATED, INTERLEAVED, ACTIVATION, BIAS, GATHERED,
                BM, BN, BD, UPCAST,
            )  # fmt: skip
    if OVERLAPS:
        wire.wait_for_previous_kernel(PDL)
