"""Giving up: a rank's host tells all ranks, whose kernels may be waiting for it."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire

SIGNATURE = {"peer_table_ptr": "i64", "size": "i32", "record": "i64", "PDL": "constexpr"}


@triton.jit
def abort_kernel(peer_table_ptr, size, record, PDL: tl.constexpr):
    """Writes `record` into every rank's control block that holds none: the first writer wins. One program.

    Example:
        Two ranks, rank 1 holding a record already: rank 0 gets `record`, rank 1 keeps its own.
    """
    table = peer_table_ptr.to(tl.int64).to(tl.pointer_type(tl.int64))
    for rank in range(size):
        wire.claim_record(tl.load(table + rank), record)
