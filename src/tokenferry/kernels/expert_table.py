"""Which rows each local expert works on: counts, offsets, and the pairs (row, choice) sorted by expert, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire

SIGNATURE = {
    "topk_idx": "*IDX",
    "valid_tokens": "*i32",
    "counts": "*i32",
    "offsets": "*i32",
    "pairs": "*i32",
    "first_row": "i32",
    "num_rows": "i32",
    "first_expert": "i32",
    "loads": "constexpr",
    "first_load": "constexpr",
    "K": "constexpr",
    "FEW": "constexpr",
    "MIDDLE": "constexpr",
    "MANY": "constexpr",
    "TELEMETRY": "constexpr",
    "PDL": "constexpr",
}
COUNTING_SIGNATURE = {**SIGNATURE, "loads": "*i64", "first_load": "i32"}
"""With telemetry. Without, `NO_LOADS` are among the constants."""
NO_LOADS = {"loads": 0, "first_load": 0, "TELEMETRY": 0}


@triton.jit
def fill_table(ids, counts, offsets, pairs, total, expert, first_expert, BLOCK: tl.constexpr):
    """Writes one expert's part of the table. The `total` expert numbers at `ids` are read twice, BLOCK at a time.

    Numbers are compared in their own width: cut to 32 bits, 2**32 + 3 would be taken for expert 3. Returns how many pairs the
    expert has.
    """
    lanes = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    matches = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, total, BLOCK):
        here = begin + lanes < total
        local = tl.load(ids + begin + lanes, mask=here, other=-1) - first_expert
        before += (here & (local >= 0) & (local < expert)).to(tl.int32)
        matches += (here & (local == expert)).to(tl.int32)
    position = tl.sum(before)
    count = tl.sum(matches)
    tl.store(counts + expert, count)
    tl.store(offsets + expert, position)
    if count > 0:
        for begin in range(0, total, BLOCK):
            at = begin + lanes
            local = tl.load(ids + at, mask=at < total, other=-1) - first_expert
            here = ((at < total) & (local == expert)).to(tl.int32)
            rank = tl.cumsum(here, 0) - here
            tl.store(pairs + position + rank, at, mask=here > 0)
            position += tl.sum(here)
    return count


@triton.jit
def fill_long_table(ids, counts, offsets, pairs, total, expert, first_expert, BLOCK: tl.constexpr):
    """The same for many ids. A block is lines of 32, summed along each line and over the lines, which is less work than one sum
    along all of it, and the next block is asked for before this one is looked at. 65536 ids take 32 instead of 41 microseconds,
    2048 in a block of their size 2.9 instead of 5.6 (H100 80GB HBM3, 2026-11-26, 1xH100-2026-11-26-expert-cuts.jsonl)."""
    LINE: tl.constexpr = 32 if BLOCK >= 32 else BLOCK
    place = tl.arange(0, BLOCK // LINE)[:, None] * LINE + tl.arange(0, LINE)[None, :]
    following = tl.load(ids + place, mask=place < total, other=-1) - first_expert
    before = tl.zeros([BLOCK // LINE, LINE], tl.int32)
    matches = before
    for begin in range(0, total, BLOCK):
        here = begin + place < total
        local = following
        at = begin + BLOCK + place
        following = tl.load(ids + at, mask=at < total, other=-1) - first_expert
        before += (here & (local >= 0) & (local < expert)).to(tl.int32)
        matches += (here & (local == expert)).to(tl.int32)
    position = tl.sum(tl.sum(before, 1), 0)
    count = tl.sum(tl.sum(matches, 1), 0)
    tl.store(counts + expert, count)
    tl.store(offsets + expert, position)
    if count > 0:
        following = tl.load(ids + place, mask=place < total, other=-1) - first_expert
        for begin in range(0, total, BLOCK):
            at = begin + place
            here = ((at < total) & (following == expert)).to(tl.int32)
            following = tl.load(ids + at + BLOCK, mask=at + BLOCK < total, other=-1) - first_expert
            in_line = tl.sum(here, 1)
            first = position + tl.cumsum(in_line, 0) - in_line
            tl.store(pairs + first[:, None] + tl.cumsum(here, 1) - here, at, mask=here > 0)
            position += tl.sum(in_line, 0)
    return count


@triton.jit
def expert_table_kernel(
    topk_idx,
    valid_tokens,
    counts,
    offsets,
    pairs,
    first_row,
    num_rows,
    first_expert,
    loads,
    first_load,
    K: tl.constexpr,
    FEW: tl.constexpr,
    MIDDLE: tl.constexpr,
    MANY: tl.constexpr,
    TELEMETRY: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for each expert. It reads all ids of the chunk, so that no program waits for another and no atomic operation
    decides an order.

    Args:
        topk_idx: [R, K] global expert numbers; rows >= V are not read.
        valid_tokens: [1] V.
        counts, offsets: [L] out: pairs of each expert, and where they begin in `pairs`.
        pairs: out: row * K + choice of each pair, rows counted from first_row; sorted by expert, then by row and choice.
        first_row, num_rows: the rows of this chunk.
        first_expert: global number of expert 0 here. The grid is L.
        loads, first_load: with TELEMETRY, each expert's pairs are added to its word: the one at `first_load` is expert 0's here.
            Word 0 of `loads` is 0 while nothing shall be counted.

    Example:
        Experts 2 and 3 are here, K = 2, rows [3, 0], [2, 3], [-1, 2]: counts [2, 2], offsets [0, 2], pairs [2, 5, 0, 3].
    """
    expert = tl.program_id(0)
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    valid = tl.load(valid_tokens)
    total = tl.maximum(tl.minimum(valid - first_row, num_rows), 0) * K
    ids_of_chunk = topk_idx + first_row.to(tl.int64) * K
    if TELEMETRY:
        is_on = tl.load(loads) != 0
    if total <= FEW:
        count = fill_table(ids_of_chunk, counts, offsets, pairs, total, expert, first_expert, FEW)
    elif total <= MIDDLE:
        count = fill_long_table(ids_of_chunk, counts, offsets, pairs, total, expert, first_expert, MIDDLE)
    else:  # larger blocks: the loop pays the global-memory latency once a block
        count = fill_long_table(ids_of_chunk, counts, offsets, pairs, total, expert, first_expert, MANY)
    if TELEMETRY:
        tl.atomic_add(loads + first_load + expert, count.to(tl.int64), mask=is_on & (count > 0), sem="relaxed")
