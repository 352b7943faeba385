"""Packed MXFP4 weights as a tile of numbers, and what becomes of a tile's sums: device functions, and no kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import expert_math, wire_mxfp4

BLOCK: tl.constexpr = tl.constexpr(64)
"""Columns and depths of weights that are packed together: see `tokenferry.experts.mxfp4.pack`."""
WORDS: tl.constexpr = tl.constexpr(512)
SCALE_WORDS: tl.constexpr = tl.constexpr(32)
PART: tl.constexpr = tl.constexpr(16)
"""Columns of a block that one warp multiplies."""
PART_WORDS: tl.constexpr = tl.constexpr(128)
PART_SCALE_WORDS: tl.constexpr = tl.constexpr(8)


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
    scale = tl.reshape(scale_bytes(scale), [N_BLOCKS, D_BLOCKS, 4, 8, 2, 2])
    values = numbers(word, tl.permute(scale, [0, 2, 5, 3, 1, 4]), N, D_BLOCKS)
    return tl.reshape(tl.permute(values, [0, 1, 2, 6, 5, 3, 4]), [N, BD])


@triton.jit
def unpacked_part(word, scale, N: tl.constexpr):
    """The weights [N, 64] of a block of depth, from words [N / 16, 128] and scales [N / 16, 8], in an order of depths of its own.

    Tensor cores that a warp asks alone (`mma.sync`) multiply 16 depths at a time, of which a thread has 2·t, 2·t + 1 and the
    same 8 further on. Where numbers were joined of parts, Triton gives a thread four that lie side by side and four 16 further
    on, and lets the first two of both be multiplied first. So those that belong together are put there, here and in
    `in_order_of_part`: nothing moves between threads then, and the tensor core sums the same depths in the same order as in
    the other products.
    """
    word = tl.reshape(word, [N // PART, 8, 4, 2, 2])
    word = tl.reshape(tl.permute(word, [0, 4, 1, 3, 2]), [N, 8])
    scale = tl.reshape(scale_bytes(scale), [N // PART, 1, 8, 2, 2])
    values = numbers(word, tl.permute(scale, [0, 4, 2, 1, 3]), N, 1)
    return tl.reshape(tl.permute(values, [0, 1, 2, 5, 3, 6, 4]), [N, BLOCK])


@triton.jit
def in_order_of_part(x, ROWS: tl.constexpr):
    """Rows [ROWS, 64] with their depths in the order of `unpacked_part`.

    Example:
        Depths 0 to 31 become 0 1 16 17 2 3 18 19 4 5 20 21 6 7 22 23, then the same 8 further on.
    """
    x = tl.reshape(x, [ROWS, BLOCK // 32, 2, 2, 4, 2])  # 32 depths, 16 further on, 8 further on, thread's depth, neighbour
    return tl.reshape(tl.permute(x, [0, 1, 3, 4, 2, 5]), [ROWS, BLOCK])


@triton.jit
def scale_bytes(scale):
    """The four bytes of each word, as two more dimensions: 32 depths, column 8 further on."""
    even = tl.join(scale & 0xFF, (scale >> 16) & 0xFF)
    odd = tl.join((scale >> 8) & 0xFF, (scale >> 24) & 0xFF)
    return tl.join(even, odd)


@triton.jit
def numbers(word, scale, N: tl.constexpr, D_BLOCKS: tl.constexpr):
    """What words [N, blocks of depth, 32 depths, thread's depth] stand for, with one scale for each word's group.

    Returns:
        [N, D_BLOCKS, 2, 4, 2, 2, 2]: column, block, 32 depths, thread's depth, then of the word's eight: neighbour, 8 further on,
        16 further on.
    """
    scale = tl.reshape(scale, [N, D_BLOCKS * 2, 1])
    scale = tl.reshape(tl.broadcast_to(scale, [N, D_BLOCKS * 2, 4]), [N, D_BLOCKS * 8])
    v0, v1, v2, v3, v4, v5, v6, v7 = wire_mxfp4.unpack_mxfp4(word, scale)
    first = tl.join(tl.join(v0, v1), tl.join(v2, v3))
    second = tl.join(tl.join(v4, v5), tl.join(v6, v7))
    return tl.reshape(tl.join(first, second), [N, D_BLOCKS, 2, 4, 2, 2, 2])


@triton.jit
def store_outputs(
    total,
    bias,
    out,
    target,
    num,
    alpha,
    limit,
    expert,
    first_column,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds the bias to sums [columns, BM], activates, and stores the first `num` rows to the rows `target` of `out`. Of a gated
    product a gate and its up are 8 columns apart."""
    NUM_COLUMNS: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    own_column = first_column + tl.arange(0, BN)
    if GATED:
        halves = tl.permute(tl.reshape(total, [BN // 8, 2, 8, BM]), [0, 2, 3, 1])
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
    keep = (own_column < WIDTH)[:, None] & (tl.arange(0, BM) < num)[None, :]
    tl.store(out + target[None, :] * WIDTH + own_column[:, None], value.to(out.dtype.element_ty), mask=keep)
