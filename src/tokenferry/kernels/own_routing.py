"""What a rank sends of its routing where something must be changed on the way: padding rows, numbers that no int32 holds, dtypes.

Legend: T rows of this rank, K top-k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire

SIGNATURE = {
    "topk_idx": "*IDX",
    "topk_weights": "*WEIGHTS",
    "num_real": "*i32",
    "out_idx": "*OUT_IDX",
    "out_weights": "*fp32",
    "num_rows": "i32",
    "num_real_at_most": "i32",
    "K": "constexpr",
    "READS_NUM_REAL": "constexpr",
    "CASTS_WEIGHTS": "constexpr",
    "BLOCK": "constexpr",
    "PDL": "constexpr",
}


@triton.jit
def own_routing_kernel(
    topk_idx,
    topk_weights,
    num_real,
    out_idx,
    out_weights,
    num_rows,
    num_real_at_most,
    K: tl.constexpr,
    READS_NUM_REAL: tl.constexpr,
    CASTS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs take blocks of the T * K numbers, one block each.

    Args:
        topk_idx: [T, K] int32 or int64.
        topk_weights: [T, K], read if CASTS_WEIGHTS.
        num_real: [1], how many rows carry tokens, read if READS_NUM_REAL.
        out_idx: [T, K] out: -1 in the rows after the real ones, and for a number that no int32 holds.
        out_weights: [T, K] out, written if CASTS_WEIGHTS.
        num_rows: T.
        num_real_at_most: the same as `num_real`, as the host knows it. The smaller of the two counts.

    Example:
        Ids [[3, 2**32 + 3], [1, -1], [0, 2]], two real rows: [[3, -1], [1, -1], [-1, -1]].
    """
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    real = num_real_at_most
    if READS_NUM_REAL:
        real = tl.minimum(real, tl.load(num_real))
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = place < num_rows.to(tl.int64) * K
    number = tl.load(topk_idx + place, mask=is_there, other=-1).to(tl.int64)
    is_expert = (number == number.to(tl.int32).to(tl.int64)) & (place < real.to(tl.int64) * K)
    tl.store(out_idx + place, tl.where(is_expert, number, -1).to(out_idx.dtype.element_ty), mask=is_there)
    if CASTS_WEIGHTS:
        weight = tl.load(topk_weights + place, mask=is_there, other=0.0)
        tl.store(out_weights + place, weight.to(tl.float32), mask=is_there)
