"""Grouped matrix product of packed MXFP4 weights: `expert_gemm_kernel`, but that weights become bfloat16 on their way in."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire, wire_warp
from tokenferry.kernels.expert_mxfp4_products import Kind, Operands, product_of_few, unpacked_product

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
    "LARGE_ROWS": "constexpr",
    "MAX_REST": "constexpr",
    "IS_REST": "constexpr",
    "BM_FEW": "constexpr",
    "BM": "constexpr",
    "BM_WIDE": "constexpr",
    "BN": "constexpr",
    "BD": "constexpr",
    "WARP_PAIRS": "constexpr",
    "WARP_BM": "constexpr",
    "WARP_BN": "constexpr",
    "UNROLL": "constexpr",
    "LANES": "constexpr",
    "UPCAST": "constexpr",
    "OVERLAPS": "constexpr",
    "PDL": "constexpr",
}


@triton.jit
def share_of_tiles(
    given,
    kind,
    offset,
    begin,
    end,
    number,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UNROLL: tl.constexpr,
    WAITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """This program's share of the tiles of BM rows that hold the rows begin .. end - 1 of each expert: tile `number`, and further
    ones in steps of all programs. By `product_of_few` with UNROLL steps, or with 0 by `unpacked_product`.

    Returns:
        The number of this program's next tile among those that are shared out after these.
    """
    TILES_N: tl.constexpr = (kind.WIDTH + BN - 1) // BN
    lanes = tl.arange(0, offset.shape[0])
    tiles = (end - begin + BM - 1) // BM * TILES_N
    ends = tl.cumsum(tiles, 0)
    total = wire_warp.same_for_all(tl.sum(tiles))
    programs = tl.num_programs(0)
    for tile in tl.range(number, total, programs, num_stages=1):  # else rows may be loaded before the launch has waited for them
        expert = tl.sum((ends <= tile).to(tl.int32))
        first = tl.sum(tl.where(lanes == expert, offset + begin, 0))
        num = wire_warp.same_for_all(tl.sum(tl.where(lanes == expert, end - begin, 0)))
        within = tile - tl.sum(tl.where(lanes < expert, tiles, 0))
        tiles_m = (num + BM - 1) // BM
        done = wire_warp.same_for_all((within % tiles_m) * BM)
        first_column = (within // tiles_m) * BN
        if UNROLL > 0:
            product_of_few(given, kind, expert, first + done, num - done, first_column, BM, BN, BD, UNROLL, WAITS, PDL)
        else:
            unpacked_product(given, kind, expert, first + done, num - done, first_column, BM, BN, BD)
    return number + (total - number + programs - 1) // programs * programs - total


@triton.jit
def tiles_of_rows(
    given,
    kind,
    offset,
    begin,
    end,
    BM_FEW: tl.constexpr,
    BM: tl.constexpr,
    BM_WIDE: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    WAITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """This program's share of all tiles by `unpacked_product`, large ones of all experts first, so that none begins when other
    programs end. Each number of rows has a loop of its own: in one loop for all, the compiler keeps what it knows of each for the
    others' time too, and has no registers left to let tensor cores work while the next weights are unpacked."""
    if WAITS:
        wire.wait_for_previous_kernel(PDL)
        wire.let_next_kernel_start(PDL)
    number = tl.program_id(0)
    if BM_WIDE > BM:
        wide = begin + (end - begin) // BM_WIDE * BM_WIDE
        number = share_of_tiles(given, kind, offset, begin, wide, number, BM_WIDE, BN, BD, 0, False, 0)
        begin = wide
    if BM > BM_FEW:
        rest = (end - begin) % BM
        middle = tl.where(rest > BM_FEW, end, end - rest)
        number = share_of_tiles(given, kind, offset, begin, middle, number, BM, BN, BD, 0, False, 0)
        begin = middle
    share_of_tiles(given, kind, offset, begin, end, number, BM_FEW, BN, BD, 0, False, 0)


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
    LARGE_ROWS: tl.constexpr,
    MAX_REST: tl.constexpr,
    IS_REST: tl.constexpr,
    BM_FEW: tl.constexpr,
    BM: tl.constexpr,
    BM_WIDE: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    WARP_PAIRS: tl.constexpr,
    WARP_BM: tl.constexpr,
    WARP_BN: tl.constexpr,
    UNROLL: tl.constexpr,
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
        LARGE_ROWS, MAX_REST, IS_REST: one launch serves an expert in steps of LARGE_ROWS rows as long as more than MAX_REST are
            left; another one, with IS_REST, serves what is left then. LARGE_ROWS 0: this launch serves all rows.
        BM_FEW, BM, BM_WIDE: rows of tiles, equal ones being one kind: of BM_WIDE as long as they are full, then of BM as long as
            more than BM_FEW are left, then of BM_FEW.
        WARP_PAIRS: where all experts together have at most so many rows, `product_of_few` computes all tiles, of WARP_BM rows and
            WARP_BN columns, with UNROLL steps written out in its loop; 0: never.

    Example:
        See `expert_gemm_kernel`: the same, if its weights are given packed.
    """
    WAITS: tl.constexpr = not IS_FIRST_PRODUCT and not OVERLAPS
    given = Operands(rows, row_scales, scale_stride, weights, scales, bias, out, pairs, first_row, alpha, limit)
    kind: tl.constexpr = Kind(K, DEPTH, WIDTH, IS_FIRST_PRODUCT, GATED, INTERLEAVED, ACTIVATION, BIAS, GATHERED, UPCAST)
    lanes = tl.arange(0, LANES)
    if not WAITS:
        if not OVERLAPS:
            wire.wait_for_previous_kernel(PDL)
        wire.let_next_kernel_start(PDL)
    count = tl.load(counts + lanes, mask=lanes < L, other=0)
    offset = tl.load(offsets + lanes, mask=lanes < L, other=0)
    begin, end = tl.zeros_like(count), count
    if LARGE_ROWS > 0:
        rest = count % LARGE_ROWS
        large = tl.where(rest > MAX_REST, count, count - rest)
        if IS_REST:
            begin = large
        else:
            end = large
    if WARP_PAIRS == 0:
        tiles_of_rows(given, kind, offset, begin, end, BM_FEW, BM, BM_WIDE, BN, BD, WAITS, PDL)
    elif wire_warp.same_for_all(tl.sum(count)) <= WARP_PAIRS:
        share_of_tiles(given, kind, offset, begin, end, tl.program_id(0), WARP_BM, WARP_BN, 64, UNROLL, WAITS, PDL)
    else:
        tiles_of_rows(given, kind, offset, begin, end, BM_FEW, BM, BM_WIDE, BN, BD, WAITS, PDL)
    if OVERLAPS or WAITS:  # programs without a tile too: who waits for this launch waits for the one before it
        wire.wait_for_previous_kernel(PDL)
    if WAITS:
        wire.let_next_kernel_start(PDL)
