"""The exchange of counts: once a step, every rank tells every rank how many rows it brings."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import waits, wire, wire_clock

SIGNATURE = {
    "buffer_ptr": "i64",
    "peer_table_ptr": "i64",
    "rank": "i32",
    "size": "i32",
    "counters_ptr": "i64",
    "step_counts_ptr": "i64",
    "step_tensors_ptr": "i64",
    "public_rank": "i32",
    "public_size": "i32",
    "num_tokens": "i32",
    "flags": "i32",
    "num_real": "i32",
    "generation": "i32",
    "LANES": "constexpr",
    "TELEMETRY": "constexpr",
    "PDL": "constexpr",
}


@triton.jit
def counts_kernel(
    buffer_ptr,
    peer_table_ptr,
    rank,
    size,
    counters_ptr,
    step_counts_ptr,
    step_tensors_ptr,
    public_rank,
    public_size,
    num_tokens,
    flags,
    num_real,
    generation,
    LANES: tl.constexpr,
    TELEMETRY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sends this rank's count to every peer, waits for theirs, and publishes the step. One program.

    The number of the step is counted here and travels in the packet, where it is the epoch: nothing is reset afterwards. Count
    packets lie behind the control block, [2 parities][source rank]. There are two parities because a peer that has all packets
    may send the next one before a slower rank has read this one.

    Args:
        buffer_ptr, peer_table_ptr: this rank's buffer; the table of all ranks' buffers.
        rank, size: of this rank in that table; in `solo` the kernel runs as rank 0 of 1.
        counters_ptr: this rank's counters (see `control_block`).
        step_counts_ptr: int32 [V, max T, T_0 .. T_EP-1, offset_0 .. offset_EP-1], which our own kernels read.
        step_tensors_ptr: int32 [V, offset, max T, T_0 .. T_EP-1, flags_0 .. flags_EP-1], the memory of `StepTensors`.
        public_rank, public_size: rank and size as users see them, also in `solo`.
        TELEMETRY: whether waits are noted on the board of the counters: see `waits`.

    Example:
        Counts 2, 0 and 3 on three ranks: the step counts are [5, 3, 2, 0, 3, 0, 2, 2], and the step tensors of rank 2
        [5, 2, 3, 2, 0, 3, flags].
    """
    buffer_ptr = buffer_ptr.to(tl.int64)
    counters_ptr = counters_ptr.to(tl.int64)
    lanes = tl.arange(0, LANES)
    is_peer = (lanes < size) & (lanes != rank)
    buffers = tl.load(peer_table_ptr.to(tl.int64).to(tl.pointer_type(tl.int64)) + lanes, mask=is_peer, other=0)
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    record = wire.read_record(buffer_ptr)
    step_pointer = wire.field(counters_ptr, wire.STEP_OFFSET, tl.int32)
    step = tl.load(step_pointer) + 1
    packets = wire.COUNT_PACKETS_OFFSET + (step & 1) * size * wire.COUNT_PACKET_BYTES
    wire.send_count(buffers + packets + rank * wire.COUNT_PACKET_BYTES, num_tokens, flags, step, generation, is_peer, buffer_ptr)
    if record != 0:
        wire.report(buffer_ptr, record)
    else:
        arriving = (buffer_ptr + packets) + lanes * wire.COUNT_PACKET_BYTES
        blamed = wire.set_blamed_rank(wire.blame(step, tl.full([], -1, tl.int32), rank, wire.NOT_ENTERED), lanes)
        if TELEMETRY:
            began_ns = wire_clock.global_clock()
            since = wire_clock.clock()
            counts, all_flags, clocks = wire_clock.await_count(arriving, is_peer, step, generation, buffer_ptr, blamed)
            waits.note_step(waits.find_board(counters_ptr), size, step, lanes, is_peer, since, began_ns, clocks)
        else:
            counts, all_flags = wire.await_count(arriving, is_peer, step, generation, buffer_ptr, blamed)
        tl.store(step_pointer, step)
        tl.store(wire.field(counters_ptr, wire.NUM_REAL_OFFSET, tl.int32), num_real)
        all_counts = tl.where(lanes == rank, num_tokens, counts)
        total = tl.sum(all_counts)
        largest = tl.max(all_counts)
        offsets = tl.cumsum(all_counts) - all_counts
        words = step_counts_ptr.to(tl.int64).to(tl.pointer_type(tl.int32))
        tl.store(words, total)
        tl.store(words + 1, largest)
        tl.store(words + 2 + lanes, all_counts, mask=lanes < size)
        tl.store(words + 2 + size + lanes, offsets, mask=lanes < size)
        shown = step_tensors_ptr.to(tl.int64).to(tl.pointer_type(tl.int32))
        tl.store(shown, total)
        tl.store(shown + 1, tl.sum(tl.where(lanes == rank, offsets, 0)))
        tl.store(shown + 2, largest)
        is_shown = lanes < public_size
        tl.store(shown + 3 + lanes, tl.where(lanes == public_rank, num_tokens, counts), mask=is_shown)
        tl.store(shown + 3 + public_size + lanes, tl.where(lanes == public_rank, flags, all_flags), mask=is_shown)
