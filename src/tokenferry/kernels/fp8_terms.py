"""Partial rows on their way as float8, in slots, and what the ways in bulk (`fp8_bulk`) and their sum (`fp8_sum`) need too.

They are quantized by the sender unless the experts did. Like `wire`, this file holds device functions alone and no kernel.
Threads have the columns that `fp8_rows` says, 16 of a row: eight threads share a scale. It travels as one word: a program's first
threads send its scales, which are neighbours, in few requests, and the first thread of each eight of the owner's polls it.

No word that is sent is the sentinel: a NaN's value travels as 0x7F and a NaN's scale as 0x7FC00000.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import fp8_rows, fp8_sum, waits, wire, wire_clock, wire_float8


@triton.jit
def load_term(thread, partial_ptr, scales_ptr, scale_row, num_rows, H: tl.constexpr, PARTIAL: tl.constexpr):
    """Eight words of a thread's columns: the first 32 bytes of numbers that are yet to be quantized; of quantized ones the 16
    values and their scale, then nothing. Zeros where there is no row, or no column.

    Args:
        scales_ptr, scale_row: of quantized rows: their first scale, and the words from a row's first scale to the next row's.
    """
    row, column = fp8_rows.place(thread, H)
    live = (row < num_rows) & (column < H)
    index = row.to(tl.int64)
    if tl.float8e4nv == PARTIAL:
        a0, a1, a2, a3 = wire.load(partial_ptr + index * H + column, live, 4)
        b0, b1, b2, b3 = wire.load(scales_ptr + (index * scale_row + column // 128) * 4, live, 1)
    else:
        address = partial_ptr + (index * H + column) * (PARTIAL.primitive_bitwidth // 8)
        a0, a1, a2, a3 = wire.load(address, live, 4)
        b0, b1, b2, b3 = wire.load(address + 16, live, 4)
    return a0, a1, a2, a3, b0, b1, b2, b3


@triton.constexpr_function
def is_loaded_ahead(block: int) -> bool:
    """Whether a program loads its own terms a block ahead. Threads of large programs have too few registers: words that are
    moved to local memory have to be waited for, before anything is sent or asked for."""
    return block < 512


@triton.jit
def no_words(BLOCK: tl.constexpr):
    """What `load_term` returns where there is no row."""
    nothing = tl.zeros([BLOCK], tl.uint32)
    return nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing


@triton.jit
def quantize_term(thread, n0, n1, n2, n3, n4, n5, n6, n7, partial_ptr, num_rows, H: tl.constexpr, PARTIAL: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Four words of values and the scale's bits, as they travel, from what `load_term` has loaded."""
    if tl.float8e4nv == PARTIAL:
        v0 = fp8_rows.canonical_values(n0)
        v1 = fp8_rows.canonical_values(n1)
        v2 = fp8_rows.canonical_values(n2)
        v3 = fp8_rows.canonical_values(n3)
        return v0, v1, v2, v3, fp8_rows.canonical_scale(n4)
    else:
        return fp8_rows.quantize_columns(thread, n0, n1, n2, n3, n4, n5, n6, n7, partial_ptr, num_rows, H, PARTIAL, False, BLOCK)


@triton.jit
def send_terms(begin, blocks, programs, target_ptr, partial_ptr, scales_ptr, scale_row, num_rows, buffer_ptr, H: tl.constexpr,
               PARTIAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sends rows to a slot, where a row is its values and then its scales: of all blocks every one that is this program's."""
    SLOT_ROW: tl.constexpr = H + (H + 511) // 512 * 16
    for b in range(begin, blocks, programs):
        thread = b * BLOCK + tl.arange(0, BLOCK)
        n0, n1, n2, n3, n4, n5, n6, n7 = load_term(thread, partial_ptr, scales_ptr, scale_row, num_rows, H, PARTIAL)
        v0, v1, v2, v3, scale = quantize_term(thread, n0, n1, n2, n3, n4, n5, n6, n7, partial_ptr, num_rows, H, PARTIAL, BLOCK)
        row, column = fp8_rows.place(thread, H)
        live = (row < num_rows) & (column < H)
        row_ptr = target_ptr + row.to(tl.int64) * SLOT_ROW
        wire.send(row_ptr + column, v0, v1, v2, v3, live, buffer_ptr, 4)
        row, column = fp8_rows.place(fp8_rows.thread_of_scale(thread, BLOCK), H)
        is_scale = (tl.arange(0, BLOCK) < BLOCK // 8) & (row < num_rows) & (column < H)
        scale = tl.gather(scale, tl.arange(0, BLOCK) * 8 % BLOCK, 0)
        target = target_ptr + row.to(tl.int64) * SLOT_ROW + H + column // 128 * 4
        wire_float8.send_word(target, scale, is_scale, buffer_ptr)


@triton.jit
def poll_term(thread, num_rows, slot_ptr, buffer_ptr, blamed, hint_ptr, H: tl.constexpr, BLOCK: tl.constexpr):
    """Values and scale of each thread's columns from a slot. The first thread of a block polls the scale and tells the others."""
    SLOT_ROW: tl.constexpr = H + (H + 511) // 512 * 16
    row, column = fp8_rows.place(thread, H)
    live = (row < num_rows) & (column < H)
    is_scale = live & (column % 128 == 0)
    row_ptr = slot_ptr + row.to(tl.int64) * SLOT_ROW
    v0, v1, v2, v3, word = wire_float8.poll_and_clear_both(
        row_ptr + column, live, row_ptr + H + column // 128 * 4, is_scale, buffer_ptr, blamed, hint_ptr
    )
    scale = tl.max(tl.reshape(word, [BLOCK // 32, 4, 8]), 2)
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [BLOCK // 32, 4, 8]), [BLOCK])
    return v0, v1, v2, v3, scale


@triton.jit
def sum_terms(pid, programs, n0, n1, n2, n3, n4, n5, n6, n7, own_ptr, own_scales_ptr, scale_row, num_rows, num_out, rank, size,
              buffer_ptr, slots_offset, slot_bytes, blamed, hints_ptr, out_ptr, H: tl.constexpr, PARTIAL: tl.constexpr,
              OUT: tl.constexpr, BLOCK: tl.constexpr, TELEMETRY: tl.constexpr, board, layer, step):  # fmt: skip
    """Sums the terms of this rank's rows, its own ones and those in its slots, from rank 0's to the last.

    Args:
        n0 to n7: what `load_term` has loaded of this program's first block of own rows, if `is_loaded_ahead`.
        num_rows, num_out: of this rank, and of these the first that are wanted.
        TELEMETRY: whether waits are noted on the board of a round in this layer and step: see `waits`.
    """
    for b in range(pid, (num_rows * ((H + 511) // 512 * 32) + BLOCK - 1) // BLOCK, programs):
        thread = b * BLOCK + tl.arange(0, BLOCK)
        if not is_loaded_ahead(BLOCK):
            n0, n1, n2, n3, n4, n5, n6, n7 = load_term(thread, own_ptr, own_scales_ptr, scale_row, num_rows, H, PARTIAL)
        o0, o1, o2, o3, own_scale = quantize_term(thread, n0, n1, n2, n3, n4, n5, n6, n7, own_ptr, num_rows, H, PARTIAL, BLOCK)
        if is_loaded_ahead(BLOCK):
            following = thread + programs * BLOCK
            n0, n1, n2, n3, n4, n5, n6, n7 = load_term(following, own_ptr, own_scales_ptr, scale_row, num_rows, H, PARTIAL)
        s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15 = fp8_sum.zeros(BLOCK)
        for source in range(size):
            v0 = o0
            v1 = o1
            v2 = o2
            v3 = o3
            bits = own_scale
            if source != rank:
                slot_ptr = buffer_ptr + slots_offset + (source - (source > rank).to(tl.int32)) * slot_bytes
                hint_ptr = hints_ptr + source * wire.COUNT_PACKET_BYTES
                if TELEMETRY:
                    since = wire_clock.clock()
                v0, v1, v2, v3, bits = poll_term(
                    thread, num_rows, slot_ptr, buffer_ptr, wire.set_blamed_rank(blamed, source), hint_ptr, H, BLOCK
                )
                if TELEMETRY:
                    waits.note_source(board, size, layer, step, source, since, b == 0, waits.COMBINE)
            s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15 = fp8_sum.add_term(
                source == 0, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, v0, v1, v2, v3, bits
            )
        fp8_sum.store_sums(thread, tl.minimum(num_rows, num_out), out_ptr, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12,
                           s13, s14, s15, H, OUT)  # fmt: skip
