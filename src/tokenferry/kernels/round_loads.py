"""How many rows came for each expert, counted within a combine with telemetry: device functions, and no kernel.

The gathered numbers of a dispatch may be read until a peer dispatches again, which may store its rows' numbers there as soon as
its combine has ended. In slots this rank's own next dispatch stores them, so that any program may read any of them. In a bulk
round each program reads numbers of a peer's rows before it sets a flag that this peer waits for.
"""

from __future__ import annotations

import triton
import triton.language as tl

_CHUNK: tl.constexpr = tl.constexpr(32)
"""Numbers that neighbours in a warp count, so that programs share out few of them without a division."""


@triton.jit
def places(lanes, program, programs):
    """Which numbers this program's threads count, of the first block of each of `programs` programs: warp after warp a chunk.

    Example:
        Of 3 programs the last one's first 64 threads count the numbers 64 to 95 and 160 to 191.
    """
    return (lanes // _CHUNK * programs + program) * _CHUNK + lanes % _CHUNK


@triton.jit
def load_ids(ids_ptr, place, total, IDS: tl.constexpr):
    """Of the numbers at `ids_ptr` those at `place`, -1 from `total` on."""
    return tl.load(ids_ptr.to(tl.pointer_type(IDS)) + place, mask=place < total, other=-1)


@triton.jit
def add_ids(loads_ptr, ids, num_experts):
    """Adds one to the word of each number's expert; -1, and numbers beyond the experts, are nobody's. Nobody waits for it."""
    words = loads_ptr.to(tl.pointer_type(tl.int64))
    tl.atomic_add(words + ids, tl.full(ids.shape, 1, tl.int64), mask=(ids >= 0) & (ids < num_experts), sem="relaxed")


@triton.jit
def add_share(ids_ptr, loads_ptr, num_experts, first, program, programs, total, IDS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts what this program has of `total` numbers, from block number `first` of each program on.

    Example:
        Numbers [0, 2, 2, -1] of one program add [1, 0, 2] to the words.
    """
    for begin in range(first * programs * BLOCK, total, programs * BLOCK):
        ids = load_ids(ids_ptr, begin + places(tl.arange(0, BLOCK), program, programs), total, IDS)
        add_ids(loads_ptr, ids, num_experts)


@triton.jit
def add_before_flags(
    ids_ptr, loads_ptr, num_experts, step_counts, rank, size, pid, programs, TOPK: tl.constexpr, IDS: tl.constexpr,
    PER_ROW: tl.constexpr, BLOCK: tl.constexpr, FLAG_BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts what this program has of the numbers of all ranks' rows, in a bulk round, before it sets its flags.

    A rank waits for the flags of the blocks that its rows have. Of its numbers those programs alone may count, whose first flag
    is among them; of this rank's own any.

    Args:
        PER_ROW, FLAG_BLOCK: threads that a row takes, and that a flag stands for.
    """
    for source in range(size):
        num_rows = tl.load(step_counts + 2 + source)
        first_row = tl.load(step_counts + 2 + size + source).to(tl.int64)
        blocks = (num_rows * PER_ROW + FLAG_BLOCK - 1) // FLAG_BLOCK
        counting = tl.where(source == rank, programs, tl.minimum(blocks, programs))
        if pid < counting:
            source_ptr = ids_ptr + first_row * (TOPK * (IDS.primitive_bitwidth // 8))
            add_share(source_ptr, loads_ptr, num_experts, 0, pid, counting, num_rows * TOPK, IDS, BLOCK)
