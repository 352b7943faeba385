"""A tile of the product of packed MXFP4 weights, in two forms: device functions, and no kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import expert_tiles, wire
from tokenferry.kernels.expert_mxfp4_tiles import (
    BLOCK,
    PART,
    PART_SCALE_WORDS,
    PART_WORDS,
    SCALE_WORDS,
    WORDS,
    in_order_of_part,
    store_outputs,
    unpacked_part,
    unpacked_tile,
)


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
    DEPTH_BLOCKS: tl.constexpr = (DEPTH + BLOCK - 1) // BLOCK
    WIDTH_OF_BLOCK: tl.constexpr = BLOCK // 2 if GATED else BLOCK
    COLUMN_BLOCKS: tl.constexpr = (WIDTH + WIDTH_OF_BLOCK - 1) // WIDTH_OF_BLOCK
    DTYPE: tl.constexpr = out.dtype.element_ty
    position = begin + tl.minimum(tl.arange(0, BM), num - 1)  # a missing row is replaced by an existing one, and never stored
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
    target = position.to(tl.int64) if IS_FIRST_PRODUCT else pair.to(tl.int64)
    store_outputs(
        total, bias, out, target, num, alpha, limit, expert, first_column, WIDTH, GATED, INTERLEAVED, ACTIVATION, BIAS, BM, BN
    )


@triton.jit
def weights_of_steps(words, factors, block, UNROLL: tl.constexpr):
    """Words and scales of the UNROLL blocks of depth that begin at `block`."""
    words += block * WORDS
    factors += block * SCALE_WORDS
    word = (tl.load(words),)
    scale = (tl.load(factors),)
    for i in tl.static_range(1, UNROLL):
        word = word + (tl.load(words + i * WORDS),)  # noqa: RUF005 - Triton does not unpack tuples
        scale = scale + (tl.load(factors + i * SCALE_WORDS),)  # noqa: RUF005
    return word, scale


@triton.jit
def rows_of_steps(
    a,
    row_scales,
    scale_stride,
    source,
    block,
    depth,
    DEPTH: tl.constexpr,
    BD: tl.constexpr,
    GATHERED: tl.constexpr,
    DTYPE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The rows at the UNROLL blocks of depth that begin at `block`."""
    x = ()
    for i in tl.static_range(UNROLL):
        if DEPTH % BD == 0 and not GATHERED:
            x = x + (tl.load(a + block * BD + i * BD),)  # noqa: RUF005
        else:
            d = (block + i) * BD
            tile = expert_tiles.rows_tile(a, row_scales, scale_stride, source, d, depth, DEPTH, BD, GATHERED, DTYPE)
            x = x + (tile,)  # noqa: RUF005
    return x


@triton.jit
def product_of_few(
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
    UNROLL: tl.constexpr,
    WAITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `unpacked_product`, for as few rows as reading takes all the time of: a warp has 16 or 32 columns for itself.

    Tensor cores are asked by `mma.sync`, a warp alone (see `unpacked_part`), and weights go from memory to registers, UNROLL
    steps ahead: no barrier of four warps and no waiting for a group of products stands between two steps. BD is 64, and UNROLL
    divides the blocks of depth. With WAITS the launch waits for the one before it here, its first weights being on their way.
    """
    N: tl.constexpr = 2 * BN if GATED else BN
    DEPTH_BLOCKS: tl.constexpr = (DEPTH + BLOCK - 1) // BLOCK
    WIDTH_OF_BLOCK: tl.constexpr = BLOCK // 2 if GATED else BLOCK
    COLUMN_BLOCKS: tl.constexpr = (WIDTH + WIDTH_OF_BLOCK - 1) // WIDTH_OF_BLOCK
    DTYPE: tl.constexpr = out.dtype.element_ty
    part = tl.minimum(first_column // (WIDTH_OF_BLOCK // 4) + tl.arange(0, N // PART), COLUMN_BLOCKS * 4 - 1)
    strip = (expert.to(tl.int64) * COLUMN_BLOCKS + part // 4)[:, None] * DEPTH_BLOCKS
    words = weights + strip * WORDS + (part % 4 * PART_WORDS)[:, None] + tl.arange(0, PART_WORDS)[None, :]
    factors = scales + strip * SCALE_WORDS + (part % 4 * PART_SCALE_WORDS)[:, None] + tl.arange(0, PART_SCALE_WORDS)[None, :]
    word, scale = weights_of_steps(words, factors, 0, UNROLL)
    if WAITS:
        wire.wait_for_previous_kernel(PDL)
        wire.let_next_kernel_start(PDL)
    position = begin + tl.minimum(tl.arange(0, BM), num - 1)  # a missing row is replaced by an existing one, and never stored
    pair = tl.load(pairs + position)
    if IS_FIRST_PRODUCT:
        source = (first_row + pair // K).to(tl.int64)
    else:
        source = position.to(tl.int64)
    depth = tl.arange(0, BD)
    a = rows + source[:, None] * DEPTH + depth[None, :]
    x = rows_of_steps(a, row_scales, scale_stride, source, 0, depth, DEPTH, BD, GATHERED, DTYPE, UNROLL)
    total = tl.zeros([N, BM], tl.float32)
    for step in range(UNROLL, DEPTH_BLOCKS + UNROLL, UNROLL):
        ahead = tl.minimum(step, DEPTH_BLOCKS - UNROLL)
        next_word, next_scale = weights_of_steps(words, factors, ahead, UNROLL)
        next_x = rows_of_steps(a, row_scales, scale_stride, source, ahead, depth, DEPTH, BD, GATHERED, DTYPE, UNROLL)
        for i in tl.static_range(UNROLL):
            w = unpacked_part(word[i], scale[i], N)
            in_order = in_order_of_part(x[i], BM)
            if UPCAST:
                in_order = in_order.to(tl.float32)
            total = tl.dot(w, tl.trans(in_order), total, input_precision="ieee")
        word = next_word
        scale = next_scale
        x = next_x
    target = position.to(tl.int64) if IS_FIRST_PRODUCT else pair.to(tl.int64)
    store_outputs(
        total, bias, out, target, num, alpha, limit, expert, first_column, WIDTH, GATED, INTERLEAVED, ACTIVATION, BIAS, BM, BN
    )


@triton.jit
def product(
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
    UNROLL: tl.constexpr,
    WAITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The tile by the one or the other of the two above."""
    if UNROLL > 0:
        product_of_few(
            rows, row_scales, scale_stride, weights, scales, bias, out, pairs, first_row, alpha, limit, expert, begin, num,
            first_column, K, DEPTH, WIDTH, IS_FIRST_PRODUCT, GATED, INTERLEAVED, ACTIVATION, BIAS, GATHERED, BM, BN, BD, UPCAST,
            UNROLL, WAITS, PDL,
        )  # fmt: skip
    else:
        unpacked_product(
            rows, row_scales, scale_stride, weights, scales, bias, out, pairs, first_row, alpha, limit, expert, begin, num,
            first_column, K, DEPTH, WIDTH, IS_FIRST_PRODUCT, GATED, INTERLEAVED, ACTIVATION, BIAS, GATHERED, BM, BN, BD, UPCAST,
        )  # fmt: skip
