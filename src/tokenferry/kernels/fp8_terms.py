"""Partial rows on their way as float8: quantized by the sender unless the experts did, each number times its scale in the sum.

Like `wire`, this file holds device functions alone and no kernel. Threads have the columns that `fp8_rows` says, 16 of a row:
eight threads share a scale. It travels as one word, from the first of its threads to the first of the owner's. The four scales
of a warp are neighbours, so that they go as one packet.

No word that is sent is the sentinel: a NaN's value travels as 0x7F and a NaN's scale as 0x7FC00000.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import fp8_rows, waits, wire, wire_clock, wire_float8


@triton.jit
def place(thread, H: tl.constexpr):
    """The row of each thread, and its first column, which lies behind the row where H is no multiple of 512.

    Example:
        H 272: thread 16 has column 256 of row 0, thread 17 none, thread 32 column 0 of row 1.
    """
    THREADS: tl.constexpr = (H + 511) // 512 * 32
    row = thread // THREADS
    return row, (thread - row * THREADS) * 16


@triton.jit
def load_term(thread, partial_ptr, scales_ptr, scale_row, num_rows, H: tl.constexpr, PARTIAL: tl.constexpr):
    """Eight words of a thread's columns: the first 32 bytes of numbers that are yet to be quantized; of quantized ones the 16
    values and their scale, then nothing. Zeros where there is no row, or no column.

    Args:
        scales_ptr, scale_row: of quantized rows: their first scale, and the words from a row's first scale to the next row's.
    """
    row, column = place(thread, H)
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
        v0, v1, v2, v3, scales = fp8_rows.quantize_columns(
            thread, n0, n1, n2, n3, n4, n5, n6, n7, partial_ptr, num_rows, H, PARTIAL, False, BLOCK
        )
        bits = tl.broadcast_to(scales.to(tl.uint32, bitcast=True)[:, :, None], [BLOCK // 32, 4, 8])
        return v0, v1, v2, v3, tl.reshape(bits, [BLOCK])


@triton.jit
def send_terms(begin, blocks, programs, target_ptr, partial_ptr, scales_ptr, scale_row, num_rows, buffer_ptr, H: tl.constexpr,
               PARTIAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sends rows to a slot, where a row is its values and then its scales: of all blocks every one that is this program's."""
    SLOT_ROW: tl.constexpr = H + (H + 511) // 512 * 16
    for b in range(begin, blocks, programs):
        thread = b * BLOCK + tl.arange(0, BLOCK)
        n0, n1, n2, n3, n4, n5, n6, n7 = load_term(thread, partial_ptr, scales_ptr, scale_row, num_rows, H, PARTIAL)
        v0, v1, v2, v3, scale = quantize_term(thread, n0, n1, n2, n3, n4, n5, n6, n7, partial_ptr, num_rows, H, PARTIAL, BLOCK)
        row, column = place(thread, H)
        live = (row < num_rows) & (column < H)
        row_ptr = target_ptr + row.to(tl.int64) * SLOT_ROW
        wire.send(row_ptr + column, v0, v1, v2, v3, live, buffer_ptr, 4)
        wire_float8.send_word(row_ptr + H + column // 128 * 4, scale, live & (column % 128 == 0), buffer_ptr)


@triton.jit
def copy_terms(flag, num_flags, terms_ptr, term_scales_ptr, step_counts, rank, size, partial_ptr, scales_ptr, scale_row,
               H: tl.constexpr, PARTIAL: tl.constexpr, BLOCK: tl.constexpr, FLAG_BLOCK: tl.constexpr):  # fmt: skip
    """Copies to the regions `terms` and `term_scales` what a flag stands for: of each owner's rows the blocks of FLAG_BLOCK
    threads that the CTA of this number fetches there."""
    SCALES: tl.constexpr = (H + 511) // 512 * 16
    PARTIAL_BYTES: tl.constexpr = PARTIAL.primitive_bitwidth // 8
    for i in range(1, size):
        owner = wire.add_mod(rank + i, size)
        num_rows = tl.load(step_counts + 2 + owner)
        num_threads = num_rows * ((H + 511) // 512 * 32)
        first_row = tl.load(step_counts + 2 + size + owner).to(tl.int64)
        rows_ptr = partial_ptr + first_row * (H * PARTIAL_BYTES)
        row_scales_ptr = scales_ptr + first_row * scale_row * 4
        for b in range(flag, (num_threads + FLAG_BLOCK - 1) // FLAG_BLOCK, num_flags):
            for piece in tl.static_range(FLAG_BLOCK // BLOCK):
                thread = b * FLAG_BLOCK + piece * BLOCK + tl.arange(0, BLOCK)
                n0, n1, n2, n3, n4, n5, n6, n7 = load_term(thread, rows_ptr, row_scales_ptr, scale_row, num_rows, H, PARTIAL)
                v0, v1, v2, v3, scale = quantize_term(
                    thread, n0, n1, n2, n3, n4, n5, n6, n7, rows_ptr, num_rows, H, PARTIAL, BLOCK
                )
                row, column = place(thread, H)
                live = (row < num_rows) & (column < H)
                index = first_row + row
                wire.store(terms_ptr + index * H + column, v0, v1, v2, v3, live, 4)
                is_scale = live & (column % 128 == 0)
                wire.store(term_scales_ptr + index * SCALES + column // 128 * 4, scale, scale, scale, scale, is_scale, 1)


@triton.jit
def poll_term(thread, num_rows, slot_ptr, buffer_ptr, blamed, hint_ptr, H: tl.constexpr, BLOCK: tl.constexpr):
    """Values and scale of each thread's columns from a slot. The first thread of a block polls the scale and tells the others."""
    SLOT_ROW: tl.constexpr = H + (H + 511) // 512 * 16
    row, column = place(thread, H)
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
def fetch_term(first_thread, num_rows, first_row, terms_ptr, term_scales_ptr, H: tl.constexpr, BLOCK: tl.constexpr):
    """Values and scale of each thread's columns from a peer's regions. The scales of a program's columns are neighbours: its
    first threads load one each and tell the others. Loaded by each warp for itself, they would be a fifth of all requests."""
    SCALES: tl.constexpr = (H + 511) // 512 * 16
    lanes = tl.arange(0, BLOCK)
    row, column = place(first_thread + lanes, H)
    live = (row < num_rows) & (column < H)
    v0, v1, v2, v3 = wire.load_peer(terms_ptr + (first_row.to(tl.int64) + row) * H + column, live, 4)
    row, column = place(first_thread + lanes * 8 % BLOCK, H)
    is_scale = (lanes < BLOCK // 8) & (row < num_rows) & (column < H)
    word = wire_float8.load_peer_word(term_scales_ptr + (first_row.to(tl.int64) + row) * SCALES + column // 128 * 4, is_scale)
    return v0, v1, v2, v3, tl.gather(word, lanes // 8, 0)


@triton.jit
def add_word(is_first, s0, s1, s2, s3, word, scale):
    """Four sums with a word of values added. The first term is taken as it is: 0 + -0.0 would be 0."""
    x0, x1, x2, x3 = wire_float8.unpack_float8(word)
    x0 = x0 * scale  # rounded before it is added: kernels are compiled without fused products
    x1 = x1 * scale
    x2 = x2 * scale
    x3 = x3 * scale
    s0 = tl.where(is_first, x0, s0 + x0)
    s1 = tl.where(is_first, x1, s1 + x1)
    s2 = tl.where(is_first, x2, s2 + x2)
    s3 = tl.where(is_first, x3, s3 + x3)
    return s0, s1, s2, s3


@triton.jit
def store_eight(address, live, a, b, c, d, e, f, g, h, OUT: tl.constexpr):
    """Eight sums, each rounded once to OUT."""
    if tl.float32 == OUT:
        wire.store(address, wire.pack(a, a, OUT), wire.pack(b, b, OUT), wire.pack(c, c, OUT), wire.pack(d, d, OUT), live, 4)
        wire.store(address + 16, wire.pack(e, e, OUT), wire.pack(f, f, OUT), wire.pack(g, g, OUT), wire.pack(h, h, OUT), live, 4)
    else:
        wire.store(address, wire.pack(a, b, OUT), wire.pack(c, d, OUT), wire.pack(e, f, OUT), wire.pack(g, h, OUT), live, 4)


@triton.jit
def sum_terms(first_thread, o0, o1, o2, o3, own_scale, num_rows, num_out, first_row, rank, size, in_slots, buffer_ptr, peer_table,
              slots_offset, slot_bytes, terms_offset, term_scales_offset, blamed, hints_ptr, out_ptr, H: tl.constexpr,
              OUT: tl.constexpr, BLOCK: tl.constexpr, TELEMETRY: tl.constexpr = 0, board=0, layer=0, step=0):  # fmt: skip
    """Sums the terms of each thread's columns, from rank 0's to the last, and stores the sums.

    Args:
        o0, o1, o2, o3, own_scale: this rank's own term.
        first_thread: the number of this program's first thread.
        num_rows, num_out: of this rank, and of these the first that are wanted.
        TELEMETRY: whether waits are noted on the board of a round in this layer and step: see `waits`.
    """
    thread = first_thread + tl.arange(0, BLOCK)
    s0 = tl.zeros([BLOCK], tl.float32)
    s1 = s0
    s2 = s0
    s3 = s0
    s4 = s0
    s5 = s0
    s6 = s0
    s7 = s0
    s8 = s0
    s9 = s0
    s10 = s0
    s11 = s0
    s12 = s0
    s13 = s0
    s14 = s0
    s15 = s0
    for source in range(size):
        v0 = o0
        v1 = o1
        v2 = o2
        v3 = o3
        bits = own_scale
        if in_slots & (source != rank):
            slot_ptr = buffer_ptr + slots_offset + (source - (source > rank).to(tl.int32)) * slot_bytes
            hint_ptr = hints_ptr + source * wire.COUNT_PACKET_BYTES
            if TELEMETRY:
                since = wire_clock.clock()
            v0, v1, v2, v3, bits = poll_term(
                thread, num_rows, slot_ptr, buffer_ptr, wire.set_blamed_rank(blamed, source), hint_ptr, H, BLOCK
            )
            if TELEMETRY:
                waits.note_source(board, size, layer, step, source, since, first_thread == 0, waits.COMBINE)
        elif source != rank:
            peer_ptr = tl.load(peer_table + source)
            v0, v1, v2, v3, bits = fetch_term(
                first_thread, num_rows, first_row, peer_ptr + terms_offset, peer_ptr + term_scales_offset, H, BLOCK
            )
        scale = bits.to(tl.float32, bitcast=True)
        is_first = source == 0
        s0, s1, s2, s3 = add_word(is_first, s0, s1, s2, s3, v0, scale)
        s4, s5, s6, s7 = add_word(is_first, s4, s5, s6, s7, v1, scale)
        s8, s9, s10, s11 = add_word(is_first, s8, s9, s10, s11, v2, scale)
        s12, s13, s14, s15 = add_word(is_first, s12, s13, s14, s15, v3, scale)
    row, column = place(thread, H)
    kept = (row < num_rows) & (row < num_out) & (column < H)
    OUT_BYTES: tl.constexpr = OUT.primitive_bitwidth // 8
    address = out_ptr + (row.to(tl.int64) * H + column) * OUT_BYTES
    store_eight(address, kept, s0, s1, s2, s3, s4, s5, s6, s7, OUT)
    store_eight(address + 8 * OUT_BYTES, kept, s8, s9, s10, s11, s12, s13, s14, s15, OUT)
