"""Changing words of control blocks from the host, beside whatever the kernels of a step do."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire

SIGNATURE = {"table_ptr": "i64", "size": "i32", "skipped": "i32", "offset": "i32", "amount": "i64", "PDL": "constexpr"}


@triton.jit
def add_kernel(table_ptr, size, skipped, offset, amount, PDL: tl.constexpr):
    """Adds `amount` to the int64 at `offset` in each buffer of a table of `size`, but for the one numbered `skipped`. One
    program. A busy rank counts up its peers' signs of life so. A word is set by adding what it lacks.

    Example:
        Three ranks, rank 1 is busy: skipped 1, amount 1. The words of ranks 0 and 2 are one more.
    """
    table = table_ptr.to(tl.int64).to(tl.pointer_type(tl.int64))
    for place in range(size):
        if place != skipped:
            wire.add_to_word(tl.load(table + place) + offset, amount)
