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
    "reads_num_real": "i32",
    "K": "constexpr",
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
    reads_num_real,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs take blocks of the T * K numbers, one block each.

    Args:
        topk_idx: [T, K] int32 or int64.
        topk_weights: [T, K].
        num_real: [1], how many rows carry tokens, read if `reads_num_real` is 1.
        out_idx: [T, K] out: -1 in the rows after the real ones, and for a number that no int32 holds.
        out_weights: [T, K] out.
        num_rows: T.
        num_real_at_most: as `num_real`, known to the host. The smaller one counts.

    Example:
        Ids [[3, 2**32 + 3], [1, -1], [0, 2]], two real rows: [[3, -1], [1, -1], [-1, -1]].
    """
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    real = tl.minimum(num_real_at_most, tl.load(num_real, mask=reads_num_real == 1, other=num_real_at_most))
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = place < tl.cast(num_rows, tl.int64) * K
    number = tl.load(topk_idx + place, mask=is_there, other=-1).to(tl.int64)
    is_expert = (number == number.to(tl.int32).to(tl.int64)) & (place < tl.cast(real, tl.int64) * K)
    tl.store(out_idx + place, tl.where(is_expert, number, -1).to(out_idx.dtype.element_ty), mask=is_there)
    weight = tl.load(topk_weights + place, mask=is_there, other=0.0)
    tl.store(out_weights + place, weight.to(tl.float32), mask=is_there)
