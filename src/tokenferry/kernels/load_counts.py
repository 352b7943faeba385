"""How many rows came for each expert, counted from the gathered expert numbers."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire

SIGNATURE = {
    "topk_idx": "*i32",
    "valid_tokens": "*i32",
    "loads": "*i64",
    "num_experts": "i32",
    "num_rows": "i32",
    "layer": "i32",
    "K": "constexpr",
    "BLOCK": "constexpr",
    "PDL": "constexpr",
}
BLOCK = 128
NUM_WARPS = 4
MAX_PROGRAMS = 64
"""A number for each thread: 8 programs that had 1024 numbers each took 5 microseconds for 8192, in the threads' turns at adding
(64 experts, 2 x H100, 2026-11-26)."""


@triton.jit
def load_counts_kernel(
    topk_idx,
    valid_tokens,
    loads,
    num_experts,
    num_rows,
    layer,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Adds one to `loads[1 + layer * num_experts + id]` for each id of the first V rows; -1, and numbers beyond the experts, are
    nobody's.

    Args:
        topk_idx: [num_rows, K] expert numbers.
        valid_tokens: [1] V.
        loads: [1 + layers * num_experts]. The first is 0 while nothing shall be counted.

    Example:
        Ids [[0, 2], [2, -1]] add [1, 0, 2] to the layer's words.
    """
    lanes = tl.arange(0, BLOCK)
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    place = tl.program_id(0) * BLOCK + lanes
    expert = tl.load(topk_idx + place, mask=place < num_rows * K, other=-1)  # asked for before V is known: rows behind it have -1
    total = tl.where(tl.load(loads) != 0, tl.minimum(tl.load(valid_tokens), num_rows) * K, 0)
    row = loads + 1 + tl.cast(layer, tl.int64) * num_experts
    for begin in range(tl.program_id(0) * BLOCK, total, tl.num_programs(0) * BLOCK):
        is_one = (begin + lanes < total) & (expert >= 0) & (expert < num_experts)
        tl.atomic_add(row + expert, tl.full([BLOCK], 1, tl.int64), mask=is_one, sem="relaxed")
        place = begin + tl.num_programs(0) * BLOCK + lanes
        expert = tl.load(topk_idx + place, mask=place < total, other=-1)
