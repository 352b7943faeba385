"""Quantizes the rows of a grouped product to float8, each once, for launches whose many tiles would otherwise repeat it."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import expert_math, wire
from tokenferry.kernels.expert_math import SCALE_BLOCK

SIGNATURE = {
    "rows": "*DTYPE",
    "counts": "*i32",
    "valid_tokens": "*i32",
    "out": "*fp8e4nv",
    "scales": "*fp32",
    "first_row": "i32",
    "num_rows": "i32",
    "L": "constexpr",
    "X": "constexpr",
    "IS_FIRST_PRODUCT": "constexpr",
    "MIN_ROWS": "constexpr",
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
    IS_FIRST_PRODUCT: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantizes each row of a product once if some expert has at least MIN_ROWS rows. If none has, nothing is written: then the
    launches that serve experts with few rows quantize while they read.

    Args:
        rows: for the first product [R, X], of which the valid rows of this chunk are read; for the second [pairs, X], of which as
            many are read as `counts` say.
        out, scales: [rows of the chunk, X] and [.., ceil(X / 128)].

    Example:
        A row of 224, -448, 1 and zeros, counts [1] and MIN_ROWS 1: the same numbers in float8, scale 1. With MIN_ROWS 2: nothing.
    """
    GROUPS: tl.constexpr = (X + 127) // 128  # of plain ints, as the interpreter wants them here
    ROWS: tl.constexpr = 16
    lanes = tl.arange(0, LANES)
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    count = tl.load(counts + lanes, mask=lanes < L, other=0)
    if tl.max(count) >= MIN_ROWS:
        if IS_FIRST_PRODUCT:
            num = tl.maximum(tl.minimum(tl.load(valid_tokens) - first_row, num_rows), 0)
        else:
            num = tl.sum(count)
        for task in range(tl.program_id(0), (num + ROWS - 1) // ROWS * GROUPS, tl.num_programs(0)):
            row = (task // GROUPS) * ROWS + tl.arange(0, ROWS)
            column = (task % GROUPS) * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)
            live = (row < num)[:, None] & (column < X)[None, :]
            source = (first_row + row if IS_FIRST_PRODUCT else row).to(tl.int64)
            x = tl.load(rows + source[:, None] * X + column[None, :], mask=live, other=0.0)
            q, scale = expert_math.quantize(x.to(tl.float32))
            tl.store(out + row.to(tl.int64)[:, None] * X + column[None, :], q, mask=live)
            tl.store(scales + row.to(tl.int64) * GROUPS + task % GROUPS, scale, mask=row < num)
