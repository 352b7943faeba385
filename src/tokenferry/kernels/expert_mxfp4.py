"""Grouped matrix product of packed MXFP4 weights: `expert_gemm_kernel`, but that weights become bfloat16 on their way in."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire, wire_warp
from tokenferry.kernels.expert_mxfp4_products import Kind, Operands, product

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
    "MIN_PAIRS": "constexpr",
    "MAX_PAIRS": "constexpr",
    "BM_FEW": "constexpr",
    "BM": "constexpr",
    "BN": "constexpr",
    "BD": "constexpr",
    "UNROLL": "constexpr",
    "LANES": "constexpr",
    "UPCAST": "constexpr",
    "OVERLAPS": "constexpr",
    "PDL": "constexpr",
}


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
    MIN_PAIRS: tl.constexpr,
    MAX_PAIRS: tl.constexpr,
    BM_FEW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
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
        MIN_PAIRS, MAX_PAIRS: it serves no expert where all of them together have fewer or more rows; MAX_PAIRS 0: no upper limit.
        UNROLL: 0, or as many steps are written out in the loop of `product_of_few`, which then computes all tiles.

    Example:
        See `expert_gemm_kernel`: the same, if its weights are given packed.
    """
    TILES_N: tl.constexpr = (WIDTH + BN - 1) // BN
    WAITS_IN_TILE: tl.constexpr = UNROLL > 0 and not IS_FIRST_PRODUCT and not OVERLAPS
    given = Operands(rows, row_scales, scale_stride, weights, scales, bias, out, pairs, first_row, alpha, limit)
    kind: tl.constexpr = Kind(K, DEPTH, WIDTH, IS_FIRST_PRODUCT, GATED, INTERLEAVED, ACTIVATION, BIAS, GATHERED, UPCAST)
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
    num_pairs = tl.sum(count)
    served = served & (num_pairs >= MIN_PAIRS)
    if MAX_PAIRS > 0:
        served = served & (num_pairs <= MAX_PAIRS)
    tiles = tl.where(served, (count + BM - 1) // BM, 0) * TILES_N
    ends = tl.cumsum(tiles, 0)
    total = wire_warp.same_for_all(tl.sum(tiles))
    if not IS_FIRST_PRODUCT and not WAITS_IN_TILE:
        if not OVERLAPS:
            wire.wait_for_previous_kernel(PDL)
        wire.let_next_kernel_start(PDL)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert = tl.sum((ends <= tile).to(tl.int32))
        num = wire_warp.same_for_all(tl.sum(tl.where(lanes == expert, count, 0)))
        begin = tl.sum(tl.where(lanes == expert, offset, 0))
        within = tile - tl.sum(tl.where(lanes < expert, tiles, 0))
        tiles_m = (num + BM - 1) // BM
        done = wire_warp.same_for_all((within % tiles_m) * BM)
        first_column = (within // tiles_m) * BN
        if BM == BM_FEW or num - done <= BM_FEW:
            product(given, kind, expert, begin + done, num - done, first_column, BM_FEW, BN, BD, UNROLL, WAITS_IN_TILE, PDL)
        else:
            product(given, kind, expert, begin + done, num - done, first_column, BM, BN, BD, UNROLL, WAITS_IN_TILE, PDL)
    if OVERLAPS or WAITS_IN_TILE:  # programs without a tile too: who waits for this launch waits for the one before it
        wire.wait_for_previous_kernel(PDL)
    if WAITS_IN_TILE:
        wire.let_next_kernel_start(PDL)
