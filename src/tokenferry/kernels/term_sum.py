"""The sum of all ranks' terms for this rank's rows, in rank order, in float32, rounded once: one launch.

Legend: T rows of this rank, T' <= T of them wanted, H hidden size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire

SIGNATURE = {
    "terms": "*TERM",
    "own": "*TERM",
    "out": "*OUT",
    "rank": "i32",
    "num_rows": "i32",
    "num_wanted": "i32",
    "SIZE": "constexpr",
    "H": "constexpr",
    "BLOCK": "constexpr",
    "PDL": "constexpr",
}


@triton.jit
def term_sum_kernel(
    terms,
    own,
    out,
    rank,
    num_rows,
    num_wanted,
    SIZE: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs take blocks of the T' * H numbers, one block each.

    Args:
        terms: [SIZE, T, H], of each rank but this one, whose place is not read.
        own: [T, H], this rank's, which need not be copied there.
        out: [T', H] out.
        rank: this rank's number.
        num_rows, num_wanted: T and T'.

    Example:
        Terms 2**24 of rank 0, 1 of rank 1 and -2**24 of rank 2: (2**24 + 1) - 2**24 = 0 in float32, on every rank.
    """
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = place < tl.cast(num_wanted, tl.int64) * H
    total = tl.load(tl.where(rank == 0, own, terms) + place, mask=is_there, other=0.0).to(tl.float32)
    for r in tl.static_range(1, SIZE):
        source = tl.where(rank == r, own, terms + tl.cast(num_rows, tl.int64) * (r * H))
        total += tl.load(source + place, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_there)
