"""The exchange of counts: once a step, every rank tells every rank how many rows it brings."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire

COUNTS_OFFSET: tl.constexpr = tl.constexpr(wire.CONTROL_BYTES)
PACKET_BYTES: tl.constexpr = tl.constexpr(16)
"""Count packets lie behind the control block: [2 parities][source rank], each (num_tokens, flags, step, generation)."""

SIGNATURE = {
    "own": "i64",
    "peers": "i64",
    "rank": "i32",
    "size": "i32",
    "state": "i64",
    "block": "i64",
    "public": "i64",
    "public_rank": "i32",
    "public_size": "i32",
    "num_tokens": "i32",
    "flags": "i32",
    "num_real": "i32",
    "generation": "i32",
    "LANES": "constexpr",
    "PDL": "constexpr",
}


@triton.jit
def counts_kernel(
    own,
    peers,
    rank,
    size,
    state,
    block,
    public,
    public_rank,
    public_size,
    num_tokens,
    flags,
    num_real,
    generation,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sends this rank's count to every peer, waits for theirs, and publishes the step. One program.

    The number of the step is counted here and travels in the packet, where it is the epoch: nothing is reset afterwards. Two
    parities, because a peer that has all packets may send the next one before a slower rank has read this one.

    Args:
        own, peers: this rank's buffer; the table of all buffers.
        state: this rank's counters (`wire.STATE_*`).
        block: int32 [V, max T, T_0 .. T_EP-1, offset_0 .. offset_EP-1] for our own kernels.
        public: the int32 words of `StepTensors`: [V, offset, max T, T_0 .. T_EP-1, flags_0 .. flags_EP-1].
        public_rank, public_size: rank and size as users see them; in `solo` the kernel itself runs with rank 0 of 1.

    Example:
        Counts 2, 0 and 3 on three ranks: block is [5, 3, 2, 0, 3, 0, 2, 2] and public, on rank 2, [5, 2, 3, 2, 0, 3, flags].
    """
    own = own.to(tl.int64)
    state = state.to(tl.int64)
    lanes = tl.arange(0, LANES)
    is_peer = (lanes < size) & (lanes != rank)
    buffers = tl.load(peers.to(tl.int64).to(tl.pointer_type(tl.int64)) + lanes, mask=is_peer, other=0)
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    record = wire.read_record(own)
    step_pointer = wire.field(state, wire.STATE_STEP, tl.int32)
    step = tl.load(step_pointer) + 1
    packets = COUNTS_OFFSET + (step & 1) * size * PACKET_BYTES
    wire.send_count(buffers + packets + rank * PACKET_BYTES, num_tokens, flags, step, generation, is_peer, own)
    if record != 0:
        wire.report(own, record)
    else:
        mine = (own + packets) + lanes * PACKET_BYTES
        blamed = wire.accuse(wire.blame(step, tl.full([], -1, tl.int32), rank, wire.NOT_ENTERED), lanes)
        counts, all_flags = wire.await_count(mine, is_peer, step, generation, own, blamed)
        tl.store(step_pointer, step)
        tl.store(wire.field(state, wire.STATE_NUM_REAL, tl.int32), num_real)
        own_count = tl.where(lanes == rank, num_tokens, counts)
        total = tl.sum(own_count)
        largest = tl.max(own_count)
        offsets = tl.cumsum(own_count) - own_count
        words = block.to(tl.int64).to(tl.pointer_type(tl.int32))
        tl.store(words, total)
        tl.store(words + 1, largest)
        tl.store(words + 2 + lanes, own_count, mask=lanes < size)
        tl.store(words + 2 + size + lanes, offsets, mask=lanes < size)
        shown = public.to(tl.int64).to(tl.pointer_type(tl.int32))
        tl.store(shown, total)
        tl.store(shown + 1, tl.sum(tl.where(lanes == rank, offsets, 0)))
        tl.store(shown + 2, largest)
        is_shown = lanes < public_size
        tl.store(shown + 3 + lanes, tl.where(lanes == public_rank, num_tokens, counts), mask=is_shown)
        tl.store(shown + 3 + public_size + lanes, tl.where(lanes == public_rank, flags, all_flags), mask=is_shown)
