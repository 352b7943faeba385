"""Rows of format fp8_block128 on their way: quantized by the sender, scales behind the values in slots, apart in gathered rows.

Like `wire`, this file holds device functions alone and no kernel. A thread has 16 columns of a row: it sends their values in one
packet. Eight threads share a scale. The scales of all a program's columns are neighbours, and its first threads send them, one
word each, so that they are few requests: sent by each warp for itself, they would be a fifth of all. Rows are dealt out in whole
warps: a row of another size leaves some threads of its last warp idle, and its scales are padded to whole packets with zeros.

No word that is sent is the sentinel: a NaN's value travels as 0x7F and a NaN's scale as 0x7FC00000.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import expert_math, wire, wire_float8

SAME: tl.constexpr = tl.constexpr(0)
"""Formats, as the dispatch kernel knows them: rows as they are."""
QUANTIZE: tl.constexpr = tl.constexpr(1)
"""Rows that are quantized on their way."""
QUANTIZED: tl.constexpr = tl.constexpr(2)
"""Rows that come quantized."""
BYTES: tl.constexpr = tl.constexpr(3)
"""Rows whose bits mean nothing here."""


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
def thread_of_scale(thread, BLOCK: tl.constexpr):
    """Of the first eighth of a program's threads: the thread whose columns begin with the scale that this one sends.

    Example:
        BLOCK 64: thread 64 sends the scale of thread 64, thread 65 that of thread 72, thread 71 that of thread 120.
    """
    lanes = tl.arange(0, BLOCK)
    return thread - lanes + lanes * 8 % BLOCK


@triton.jit
def load_first_words(
    thread,
    hidden_ptr,
    scales_ptr,
    num_supplied,
    H: tl.constexpr,
    FORMAT: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Eight words of what a thread sends: of its columns as they are, the first 32 bytes; of quantized rows the 16 values and the
    scale that it sends, then nothing. Zeros where there is no row, or no column.

    Example:
        bfloat16, thread 1: columns 16 to 31 of row 0. Quantized rows: columns 16 to 31, and the scale 1.
    """
    THREADS: tl.constexpr = (H + 511) // 512 * 32
    row = thread // THREADS
    column = (thread - row * THREADS) * 16
    live = (row < num_supplied) & (column < H)
    place = row.to(tl.int64) * H + column
    if FORMAT == QUANTIZED:
        S: tl.constexpr = (H + 127) // 128
        a0, a1, a2, a3 = wire.load(hidden_ptr + place, live, 4)
        first = thread_of_scale(thread, BLOCK)
        row = first // THREADS
        column = (first - row * THREADS) * 16
        sends = (tl.arange(0, BLOCK) < BLOCK // 8) & (row < num_supplied) & (column < H)
        b0, b1, b2, b3 = wire.load(scales_ptr + (row.to(tl.int64) * S + column // 128) * 4, sends, 1)
    else:
        address = hidden_ptr + place * (HIDDEN.primitive_bitwidth // 8)
        a0, a1, a2, a3 = wire.load(address, live, 4)
        b0, b1, b2, b3 = wire.load(address + 16, live, 4)
    return a0, a1, a2, a3, b0, b1, b2, b3


@triton.jit
def larger(largest, x, y):
    """The largest of `largest` and the magnitudes of two numbers, as bits: see `expert_math.block_scale`."""
    return tl.maximum(largest, tl.maximum(expert_math.magnitude(x), expert_math.magnitude(y)))


@triton.jit
def packed(w0, w1, scale, below, rest, HIDDEN: tl.constexpr):
    """The word with the float8 values of the four numbers in two words of 16-bit numbers. `below` and `rest`: the scale's
    `wire_float8.reciprocal_parts`."""
    x0, x1 = wire.unpack(w0, HIDDEN)
    x2, x3 = wire.unpack(w1, HIDDEN)
    return wire_float8.pack_float8(
        wire_float8.divide_narrow(x0, scale, below, rest),
        wire_float8.divide_narrow(x1, scale, below, rest),
        wire_float8.divide_narrow(x2, scale, below, rest),
        wire_float8.divide_narrow(x3, scale, below, rest),
    )


@triton.jit
def packed_wide(w0, w1, w2, w3, scale, reciprocal):
    """`packed` of four words of float32, whose quotients may lie closer to where rounding goes the other way."""
    return wire_float8.pack_float8(
        wire_float8.divide(w0.to(tl.float32, bitcast=True), scale, reciprocal),
        wire_float8.divide(w1.to(tl.float32, bitcast=True), scale, reciprocal),
        wire_float8.divide(w2.to(tl.float32, bitcast=True), scale, reciprocal),
        wire_float8.divide(w3.to(tl.float32, bitcast=True), scale, reciprocal),
    )


@triton.jit
def largest_of(w0, w1, w2, w3, HIDDEN: tl.constexpr):
    """The largest magnitude among the numbers of four words, as bits."""
    x0, x1 = wire.unpack(w0, HIDDEN)
    x2, x3 = wire.unpack(w1, HIDDEN)
    x4, x5 = wire.unpack(w2, HIDDEN)
    x6, x7 = wire.unpack(w3, HIDDEN)
    return larger(larger(larger(larger(tl.zeros(w0.shape, tl.uint32), x0, x1), x2, x3), x4, x5), x6, x7)


@triton.jit
def shared_by_eight(number, BLOCK: tl.constexpr):
    """For each thread what its eight have in common, from one number for each eight: [BLOCK / 32, 4]."""
    return tl.reshape(tl.broadcast_to(number[:, :, None], [BLOCK // 32, 4, 8]), [BLOCK])


@triton.jit
def quantize_columns(
    thread,
    a0,
    a1,
    a2,
    a3,
    b0,
    b1,
    b2,
    b3,
    hidden_ptr,
    num_supplied,
    H: tl.constexpr,
    HIDDEN: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The packet of values of each thread, and its scale, as bits, from the words that `load_first_words` has loaded. They are
    those of `tokenferry.reference.quantize`; rows that are not supplied are zeros."""
    largest = tl.maximum(largest_of(a0, a1, a2, a3, HIDDEN), largest_of(b0, b1, b2, b3, HIDDEN))
    THREADS: tl.constexpr = (H + 511) // 512 * 32
    row = thread // THREADS
    column = (thread - row * THREADS) * 16
    live = (row < num_supplied) & (column < H)
    if tl.float32 == HIDDEN:  # a thread's 16 numbers are 64 bytes
        address = hidden_ptr + (row.to(tl.int64) * H + column) * 4
        c0, c1, c2, c3 = wire.load(address + 32, live, 4)
        d0, d1, d2, d3 = wire.load(address + 48, live, 4)
        largest = tl.maximum(largest, tl.maximum(largest_of(c0, c1, c2, c3, HIDDEN), largest_of(d0, d1, d2, d3, HIDDEN)))
    of_block = tl.max(tl.reshape(largest, [BLOCK // 32, 4, 8]), 2)
    scales = expert_math.block_scale(of_block, POWER_OF_TWO)
    scale = shared_by_eight(scales, BLOCK)
    if tl.float32 == HIDDEN:
        reciprocal = shared_by_eight(tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales), BLOCK)
        v0 = packed_wide(a0, a1, a2, a3, scale, reciprocal)
        v1 = packed_wide(b0, b1, b2, b3, scale, reciprocal)
        v2 = packed_wide(c0, c1, c2, c3, scale, reciprocal)
        v3 = packed_wide(d0, d1, d2, d3, scale, reciprocal)
    else:
        below_of, rest_of = wire_float8.reciprocal_parts(scales)
        below = shared_by_eight(below_of, BLOCK)
        rest = shared_by_eight(rest_of, BLOCK)
        v0 = packed(a0, a1, scale, below, rest, HIDDEN)
        v1 = packed(a2, a3, scale, below, rest, HIDDEN)
        v2 = packed(b0, b1, scale, below, rest, HIDDEN)
        v3 = packed(b2, b3, scale, below, rest, HIDDEN)
    return v0, v1, v2, v3, scale.to(tl.uint32, bitcast=True)


@triton.jit
def canonical_values(word):
    """Four float8 values with every NaN as 0x7F.

    Example:
        0xFFFEFF7F: 0x7FFE7F7F.
    """
    is_nan = ((word & 0x7F7F7F7F) + 0x01010101) & 0x80808080  # the upper bit of each byte that is 0x7F or 0xFF
    return word & ~is_nan


@triton.jit
def canonical_scale(word):
    """A float32 with every NaN as 0x7FC00000, as bits."""
    return tl.where((word & 0x7FFFFFFF) > 0x7F800000, tl.full(word.shape, 0x7FC00000, tl.uint32), word)


@triton.jit
def words_to_send(
    thread,
    n0,
    n1,
    n2,
    n3,
    n4,
    n5,
    n6,
    n7,
    hidden_ptr,
    num_supplied,
    H: tl.constexpr,
    FORMAT: tl.constexpr,
    HIDDEN: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The packet of values of each thread, and its scale, from what `load_first_words` has loaded. `scales_to_send` follows."""
    if FORMAT == QUANTIZE:
        return quantize_columns(thread, n0, n1, n2, n3, n4, n5, n6, n7, hidden_ptr, num_supplied, H, HIDDEN, POWER_OF_TWO, BLOCK)
    else:
        v0 = canonical_values(n0)
        v1 = canonical_values(n1)
        v2 = canonical_values(n2)
        v3 = canonical_values(n3)
        return v0, v1, v2, v3, n4


@triton.jit
def scales_to_send(thread, scale, num_supplied, H: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """The scale that each thread sends, from what `words_to_send` has returned. It is 0 where no row is supplied, and behind the
    last one of a row. The program waits here for all of its threads, so that values are sent before."""
    if FORMAT == QUANTIZE:
        THREADS: tl.constexpr = (H + 511) // 512 * 32
        row = thread // THREADS
        is_there = (row < num_supplied) & ((thread - row * THREADS) * 16 < H)
        scale = tl.where(is_there, scale, tl.zeros([BLOCK], tl.uint32))
        return tl.gather(scale, tl.arange(0, BLOCK) * 8 % BLOCK, 0)
    else:
        return canonical_scale(scale)


@triton.jit
def escape(word, FORMAT: tl.constexpr):
    """A word of rows that are not quantized, as it travels: bytes never go to slots, and stay as they are."""
    if FORMAT == BYTES:
        return word
    else:
        return wire.escape(word)


@triton.jit
def offset_of_values(thread, ROW: tl.constexpr, H: tl.constexpr):
    """Where a thread's packet of 16 values goes among rows that are ROW bytes long.

    Example:
        H 256, thread 33 (row 1, column 16): at 272 where a row has 256 bytes, at 288 in slots, where it has 272.
    """
    THREADS: tl.constexpr = (H + 511) // 512 * 32
    return (thread // THREADS).to(tl.int64) * ROW + thread % THREADS * 16


@triton.jit
def offset_of_scale(thread, ROW: tl.constexpr, H: tl.constexpr):
    """Where the scale of a thread's columns goes among rows of scales that are ROW bytes apart.

    Example:
        H 256, thread 40 (row 1, column 128): at 20 where a row of scales has 16 bytes, at 276 in slots.
    """
    THREADS: tl.constexpr = (H + 511) // 512 * 32
    return (thread // THREADS).to(tl.int64) * ROW + thread % THREADS // 8 * 4


@triton.jit
def send_words(packet, w0, w1, w2, w3, scale, num_packets, num_supplied, first_row, in_slots, rank, size, buffer_ptr, peer_table,
               nearest_ptr, multicast_ptr, slots_offset, slot_bytes, out_hidden_offset, out_scales_offset, SLOT_ROW: tl.constexpr,
               H: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr, MULTICAST: tl.constexpr):  # fmt: skip
    """Sends what `words_to_send` has returned to every peer, values first, and stores it in this rank's own buffer."""
    SCALES: tl.constexpr = (H + 511) // 512 * 16
    THREADS: tl.constexpr = (H + 511) // 512 * 32
    is_value = (packet < num_packets) & (packet % THREADS * 16 < H)
    values_here = out_hidden_offset + first_row.to(tl.int64) * H + offset_of_values(packet, H, H)
    values_in_slot = slots_offset + offset_of_values(packet, SLOT_ROW, H)
    first = thread_of_scale(packet, BLOCK)
    is_scale = (tl.arange(0, BLOCK) < BLOCK // 8) & (first < num_packets)
    scale_here = out_scales_offset + first_row.to(tl.int64) * SCALES + offset_of_scale(first, SCALES, H)
    scale_in_slot = slots_offset + H + offset_of_scale(first, SLOT_ROW, H)
    if MULTICAST:
        slot_ptr = multicast_ptr + rank * slot_bytes
        wire.multicast(tl.where(in_slots, slot_ptr + values_in_slot, multicast_ptr + values_here), w0, w1, w2, w3, is_value,
                       buffer_ptr, 4)  # fmt: skip
        scale = scales_to_send(packet, scale, num_supplied, H, FORMAT, BLOCK)
        target_ptr = tl.where(in_slots, slot_ptr + scale_in_slot, multicast_ptr + scale_here)
        wire_float8.multicast_word(target_ptr, scale, is_scale, buffer_ptr)
    else:
        peer_ptr = nearest_ptr
        for i in range(1, size):
            peer = wire.add_mod(rank + i, size)
            slot_ptr = peer_ptr + (rank - (rank > peer).to(tl.int32)) * slot_bytes
            wire.send(
                tl.where(in_slots, slot_ptr + values_in_slot, peer_ptr + values_here), w0, w1, w2, w3, is_value, buffer_ptr, 4
            )
            peer_ptr = tl.load(peer_table + wire.add_mod(peer + 1, size))
        scale = scales_to_send(packet, scale, num_supplied, H, FORMAT, BLOCK)
        peer_ptr = nearest_ptr
        for i in range(1, size):
            peer = wire.add_mod(rank + i, size)
            slot_ptr = peer_ptr + (rank - (rank > peer).to(tl.int32)) * slot_bytes
            wire_float8.send_word(
                tl.where(in_slots, slot_ptr + scale_in_slot, peer_ptr + scale_here), scale, is_scale, buffer_ptr
            )
            peer_ptr = tl.load(peer_table + wire.add_mod(peer + 1, size))
        wire.store(buffer_ptr + values_here, w0, w1, w2, w3, is_value, 4)
        wire.store(buffer_ptr + scale_here, scale, scale, scale, scale, is_scale, 1)


@triton.jit
def place_of_received(packet, scales_behind_values, source_row, H: tl.constexpr):
    """Where packets of a source's slot belong, as offsets from the source's first row of gathered values.

    Args:
        packet: their numbers; a slot's row has H / 16 packets of values, then its scales.
        scales_behind_values: bytes from the gathered values to the gathered scales.

    Example:
        H 256: packets 0 to 15 are the values of row 0, packet 16 has its two scales, packet 17 begins row 1.
    """
    PER_ROW: tl.constexpr = H // 16 + (H + 511) // 512
    SCALES: tl.constexpr = (H + 511) // 512 * 16
    row = (packet // PER_ROW).to(tl.int64)
    column = packet % PER_ROW
    first = source_row.to(tl.int64)
    scales = scales_behind_values + first * (SCALES - H) + row * SCALES + (column - H // 16) * 16
    return tl.where(column < H // 16, row * H + column * 16, scales)
