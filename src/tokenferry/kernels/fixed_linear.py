"""A dense product cut into the same tiles for any number of rows, so that a row's bits do not depend on the others.

Legend: T rows, D depth, N columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokenferry.kernels import wire
from tokenferry.kernels.launch import POINTER_ALIGNMENT, has_pdl, launch_unbound

SIGNATURE = {
    "rows": "*ROWS",
    "weight": "*WEIGHT",
    "bias": "*BIAS_DTYPE",
    "out": "*OUT",
    "num_rows": "i32",
    "D": "constexpr",
    "N": "constexpr",
    "BIAS": "constexpr",
    "BM": "constexpr",
    "BN": "constexpr",
    "BD": "constexpr",
    "UPCAST": "constexpr",
    "PDL": "constexpr",
}
ROWS_OF_TILE = 64
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows"])  # one form for all numbers of rows: a peer would wait while another is compiled
def fixed_linear_kernel(
    rows,
    weight,
    bias,
    out,
    num_rows,
    D: tl.constexpr,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for each tile of BM rows and BN columns; it goes through the whole depth in steps of BD. Sums are float32.

    Args:
        rows, weight, bias, out: [T, D], [N, D], [N] (read if BIAS) and [T, N].

    Example:
        Rows [1, 2] and [3, 4], weight [[1, 1], [0, 2]], bias [10, 20]: [13, 24] and [17, 28].
    """
    TILES_N: tl.constexpr = (N + BN - 1) // BN
    tile = tl.program_id(0)
    row = tile // TILES_N * BM + tl.arange(0, BM)
    column = tile % TILES_N * BN + tl.arange(0, BN)
    depth = tl.arange(0, BD)
    # A row or column that is not there is replaced by one that is; it is never stored.
    a = rows + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * D + depth[None, :]
    b = weight + tl.minimum(column, N - 1).to(tl.int64)[None, :] * D + depth[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    for d in range(0, D, BD):
        if D % BD == 0:
            x = tl.load(a + d)
            w = tl.load(b + d)
        else:
            x = tl.load(a + d, mask=(d + depth < D)[None, :], other=0.0)
            w = tl.load(b + d, mask=(d + depth < D)[:, None], other=0.0)
        if UPCAST:  # Triton's interpreter multiplies bfloat16 as if it were integers
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    target = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(row < num_rows)[:, None] & (column < N)[None, :])


def columns_of_tile(N: int) -> int:
    """From the shape of the weight alone. A narrow one, as a router's, is cut finely, or few SMs would read it."""
    return 16 if N <= 1024 else 64


def constants_of(D: int, N: int, dtype: torch.dtype, *, has_bias: bool, pdl: bool) -> dict[str, object]:
    """The kernel's constants: nothing in them depends on a number of rows."""
    return {
        "D": D,
        "N": N,
        "BIAS": has_bias,
        "BM": ROWS_OF_TILE,
        "BN": columns_of_tile(N),
        "BD": 32 if dtype == torch.float32 else 128 if D % 128 == 0 else 64,
        "UPCAST": wire.INTERPRETED,
        "PDL": pdl,
    }


def fixed_linear(
    rows_TD: torch.Tensor,
    weight_ND: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """[T, N] of `out_dtype`, on the current stream: sums in float32, the bias added to the sum, rounded once."""
    (T, D), N = rows_TD.shape, weight_ND.shape[0]
    out_TN = torch.empty(T, N, dtype=out_dtype, device=rows_TD.device)
    if T == 0:
        return out_TN
    constants = constants_of(D, N, rows_TD.dtype, has_bias=bias_N is not None, pdl=has_pdl(rows_TD.device))
    tiles = triton.cdiv(T, ROWS_OF_TILE) * triton.cdiv(N, columns_of_tile(N))
    rows_TD, weight_ND = rows_TD.contiguous(), weight_ND.contiguous()
    if rows_TD.data_ptr() % POINTER_ALIGNMENT:  # else another form would be compiled
        rows_TD = rows_TD.clone()
    bias_N = weight_ND if bias_N is None else bias_N.contiguous()  # without one the pointer is not followed
    arguments = (rows_TD, weight_ND, bias_N, out_TN, T)
    launch_unbound(fixed_linear_kernel, tiles, arguments, constants, num_warps=NUM_WARPS, device=rows_TD.device)
    return out_TN
