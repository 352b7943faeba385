"""A tile of the product of packed MXFP4 weights, in two forms: device functions, and no kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tokenferry.kernels import expert_tiles, wire, wire_warp
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


class Operands(NamedTuple):
    """What all tiles of a launch read and write, with the names of `expert_mxfp4_kernel`."""

    rows: Any
    row_scales: Any
    scale_stride: Any
    weights: Any
    scales: Any
    bias: Any
    out: Any
    pairs: Any
    first_row: Any
    alpha: Any
    limit: Any


class Kind(NamedTuple):
    """What is known of a product when its kernel is compiled, but for its tiles. Constants of `expert_mxfp4_kernel`."""

    K: Any
    DEPTH: Any
    WIDTH: Any
    IS_FIRST_PRODUCT: Any
    GATED: Any
    INTERLEAVED: Any
    ACTIVATION: Any
    BIAS: Any
    GATHERED: Any
    UPCAST: Any


@triton.jit
def rows_of_tile(given, kind, begin, num, BM: tl.constexpr, BD: tl.constexpr):
    """Of BM pairs from `begin` on: where they are in `pairs`, what stands there, the rows that they are read from, and pointers
    to the first BD numbers of these."""
    position = begin + tl.minimum(tl.arange(0, BM), num - 1)  # a missing row is replaced by an existing one, and never stored
    pair = tl.load(given.pairs + position)
    if kind.IS_FIRST_PRODUCT:
        source = (given.first_row + pair // kind.K).to(tl.int64)
    else:
        source = position.to(tl.int64)
    depth = tl.arange(0, BD)
    return position, pair, source, given.rows + source[:, None] * kind.DEPTH + depth[None, :]


@triton.jit
def store_sums(given, kind, total, position, pair, num, expert, first_column, BM: tl.constexpr, BN: tl.constexpr):
    """Sums [columns, BM] to where the rows of `rows_of_tile` have their outputs, activated."""
    target = position.to(tl.int64) if kind.IS_FIRST_PRODUCT else pair.to(tl.int64)
    store_outputs(
        total, given.bias, given.out, target, num, given.alpha, given.limit, expert, first_column, kind.WIDTH, kind.GATED,
        kind.INTERLEAVED, kind.ACTIVATION, kind.BIAS, BM, BN,
    )  # fmt: skip


@triton.jit
def unpacked_product(given, kind, expert, begin, num, first_column, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Computes BN x BM outputs of one expert, of the pairs at begin .. begin + num - 1 (num > 0), those beyond BM left out.

    Weights are the first operand, which tensor cores take from registers, where they are unpacked. So sums lie [columns, rows].
    """
    DEPTH: tl.constexpr = kind.DEPTH
    N: tl.constexpr = 2 * BN if kind.GATED else BN
    DEPTH_BLOCKS: tl.constexpr = (DEPTH + BLOCK - 1) // BLOCK
    WIDTH_OF_BLOCK: tl.constexpr = BLOCK // 2 if kind.GATED else BLOCK
    COLUMN_BLOCKS: tl.constexpr = (kind.WIDTH + WIDTH_OF_BLOCK - 1) // WIDTH_OF_BLOCK
    DTYPE: tl.constexpr = given.out.dtype.element_ty
    position, pair, source, a = rows_of_tile(given, kind, begin, num, BM, BD)
    block = tl.minimum(first_column // WIDTH_OF_BLOCK + tl.arange(0, N // BLOCK), COLUMN_BLOCKS - 1)
    strip = (expert.to(tl.int64) * COLUMN_BLOCKS + block)[:, None, None] * DEPTH_BLOCKS
    words = given.weights + strip * WORDS + tl.arange(0, WORDS)[None, None, :]
    factors = given.scales + strip * SCALE_WORDS + tl.arange(0, SCALE_WORDS)[None, None, :]
    total = tl.zeros([N, BM], tl.float32)
    for d in range(0, DEPTH, BD):
        x = expert_tiles.rows_tile(
            a, given.row_scales, given.scale_stride, source, d, tl.arange(0, BD), DEPTH, BD, kind.GATHERED, DTYPE
        )
        w = unpacked_tile(words, factors, d, DEPTH_BLOCKS, N, BD)
        if kind.UPCAST:
            x = x.to(tl.float32)
        total = wire_warp.finished(tl.dot(w, tl.trans(x), total, input_precision="ieee"))
    store_sums(given, kind, total, position, pair, num, expert, first_column, BM, BN)


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
def rows_of_steps(given, kind, a, source, block, BD: tl.constexpr, UNROLL: tl.constexpr):
    """The rows at the UNROLL blocks of depth that begin at `block`."""
    DTYPE: tl.constexpr = given.out.dtype.element_ty
    x = ()
    for i in tl.static_range(UNROLL):
        if kind.DEPTH % BD == 0 and not kind.GATHERED:
            x = x + (tl.load(a + block * BD + i * BD),)  # noqa: RUF005
        else:
            d = (block + i) * BD
            tile = expert_tiles.rows_tile(
                a, given.row_scales, given.scale_stride, source, d, tl.arange(0, BD), kind.DEPTH, BD, kind.GATHERED, DTYPE
            )
            x = x + (tile,)  # noqa: RUF005
    return x


@triton.jit
def product_of_few(
    given,
    kind,
    expert,
    begin,
    num,
    first_column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UNROLL: tl.constexpr,
    WAITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `unpacked_product`, for as few rows as reading takes all the time of: a warp has 16 or 32 columns for itself.

    Tensor cores are asked by `mma.sync`, a warp alone (see `unpacked_part`), and weights go from memory to registers, UNROLL
    steps ahead: no barrier of four warps and no waiting for a group of products stands between two steps. BD is 64, and UNROLL
    divides the blocks of depth. With WAITS the launch waits for the one before it here, its first weights being on their way.
    """
    N: tl.constexpr = 2 * BN if kind.GATED else BN
    DEPTH_BLOCKS: tl.constexpr = (kind.DEPTH + BLOCK - 1) // BLOCK
    WIDTH_OF_BLOCK: tl.constexpr = BLOCK // 2 if kind.GATED else BLOCK
    COLUMN_BLOCKS: tl.constexpr = (kind.WIDTH + WIDTH_OF_BLOCK - 1) // WIDTH_OF_BLOCK
    part = tl.minimum(first_column // (WIDTH_OF_BLOCK // 4) + tl.arange(0, N // PART), COLUMN_BLOCKS * 4 - 1)
    strip = (expert.to(tl.int64) * COLUMN_BLOCKS + part // 4)[:, None] * DEPTH_BLOCKS
    words = given.weights + strip * WORDS + (part % 4 * PART_WORDS)[:, None] + tl.arange(0, PART_WORDS)[None, :]
    factors = given.scales + strip * SCALE_WORDS + (part % 4 * PART_SCALE_WORDS)[:, None]
    factors += tl.arange(0, PART_SCALE_WORDS)[None, :]
    word, scale = weights_of_steps(words, factors, 0, UNROLL)
    if WAITS:
        wire.wait_for_previous_kernel(PDL)
        wire.let_next_kernel_start(PDL)
    position, pair, source, a = rows_of_tile(given, kind, begin, num, BM, BD)
    x = rows_of_steps(given, kind, a, source, 0, BD, UNROLL)
    total = tl.zeros([N // PART, PART, BM], tl.float32)  # by warp: four would be asked together for one product
    for step in tl.range(UNROLL, DEPTH_BLOCKS + UNROLL, UNROLL, num_stages=1):  # what is loaded ahead stands in registers
        ahead = tl.minimum(step, DEPTH_BLOCKS - UNROLL)
        next_word, next_scale = weights_of_steps(words, factors, ahead, UNROLL)
        next_x = rows_of_steps(given, kind, a, source, ahead, BD, UNROLL)
        for i in tl.static_range(UNROLL):
            w = unpacked_part(word[i], scale[i], N)
            in_order = in_order_of_part(x[i], BM)
            if kind.UPCAST:
                in_order = in_order.to(tl.float32)
            in_order = tl.broadcast_to(tl.trans(in_order)[None, :, :], [N // PART, BLOCK, BM])
            total = tl.dot(tl.reshape(w, [N // PART, PART, BLOCK]), in_order, total, input_precision="ieee")
        word = next_word
        scale = next_scale
        x = next_x
    store_sums(given, kind, tl.reshape(total, [N, BM]), position, pair, num, expert, first_column, BM, BN)
