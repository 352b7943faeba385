"""Partial rows on their way to the rank that owns the token, in packets of 16- or 32-bit numbers: see `fp8_terms` for float8.

Like `wire`, this file holds device functions alone and no kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire


@triton.jit
def load_term(partial_ptr, element, live, PARTIAL: tl.constexpr, WIRE: tl.constexpr, WORDS: tl.constexpr):
    """The packet of the wire that begins at `element` of the partial rows, each value rounded once to WIRE.

    Example:
        float32 values 1, 2, 3, 4 to a bfloat16 wire in packets of two words: 0x40003F80, 0x40804040.
    """
    PARTIAL_BYTES: tl.constexpr = PARTIAL.primitive_bitwidth // 8
    WIRE_BYTES: tl.constexpr = WIRE.primitive_bitwidth // 8
    packet_ptr = partial_ptr + element * PARTIAL_BYTES
    if PARTIAL_BYTES == WIRE_BYTES:
        a, b, c, d = wire.load(packet_ptr, live, WORDS)
        if PARTIAL != WIRE:
            l, h = wire.unpack(a, PARTIAL)
            a = wire.pack(l, h, WIRE)
            l, h = wire.unpack(b, PARTIAL)
            b = wire.pack(l, h, WIRE)
            l, h = wire.unpack(c, PARTIAL)
            c = wire.pack(l, h, WIRE)
            l, h = wire.unpack(d, PARTIAL)
            d = wire.pack(l, h, WIRE)
    elif PARTIAL_BYTES == 4:
        e, f, g, h = wire.load(packet_ptr, live, 4)
        a = wire.pack(e.to(tl.float32, bitcast=True), f.to(tl.float32, bitcast=True), WIRE)
        b = wire.pack(g.to(tl.float32, bitcast=True), h.to(tl.float32, bitcast=True), WIRE)
        c = a
        d = b
        if WORDS == 4:
            e, f, g, h = wire.load(packet_ptr + 16, live, 4)
            c = wire.pack(e.to(tl.float32, bitcast=True), f.to(tl.float32, bitcast=True), WIRE)
            d = wire.pack(g.to(tl.float32, bitcast=True), h.to(tl.float32, bitcast=True), WIRE)
    else:
        e, f, g, h = wire.load(packet_ptr, live, WORDS // 2)
        l, h = wire.unpack(e, PARTIAL)
        a = l.to(tl.uint32, bitcast=True)
        b = h.to(tl.uint32, bitcast=True)
        l, h = wire.unpack(f, PARTIAL)
        c = l.to(tl.uint32, bitcast=True)
        d = h.to(tl.uint32, bitcast=True)
    return wire.escape(a), wire.escape(b), wire.escape(c), wire.escape(d)


@triton.jit
def store_sum(out_ptr, element, live, s0, s1, s2, s3, s4, s5, s6, s7, WIRE: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr):
    """One packet of sums, each rounded once to OUT. For a float32 wire the values are s0, s2, s4, s6."""
    packet_ptr = out_ptr + element * (OUT.primitive_bitwidth // 8)
    if tl.float32 == WIRE:
        if tl.float32 == OUT:
            wire.store(
                packet_ptr,
                wire.pack(s0, s0, OUT),
                wire.pack(s2, s2, OUT),
                wire.pack(s4, s4, OUT),
                wire.pack(s6, s6, OUT),
                live,
                WORDS,
            )
        else:
            a = wire.pack(s0, s2, OUT)
            b = wire.pack(s4, s6, OUT)
            wire.store(packet_ptr, a, b, a, b, live, WORDS // 2)
    elif tl.float32 == OUT:
        wire.store(
            packet_ptr, wire.pack(s0, s0, OUT), wire.pack(s1, s1, OUT), wire.pack(s2, s2, OUT), wire.pack(s3, s3, OUT), live, 4
        )
        if WORDS == 4:
            wire.store(
                packet_ptr + 16,
                wire.pack(s4, s4, OUT),
                wire.pack(s5, s5, OUT),
                wire.pack(s6, s6, OUT),
                wire.pack(s7, s7, OUT),
                live,
                4,
            )
    else:
        wire.store(
            packet_ptr,
            wire.pack(s0, s1, OUT),
            wire.pack(s2, s3, OUT),
            wire.pack(s4, s5, OUT),
            wire.pack(s6, s7, OUT),
            live,
            WORDS,
        )


@triton.jit
def copy_terms(flag, num_flags, terms_ptr, step_counts, rank, size, partial_ptr, H: tl.constexpr, PARTIAL: tl.constexpr,
               WIRE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, FLAG_BLOCK: tl.constexpr,
               SWITCH_SUM: tl.constexpr):  # fmt: skip
    """Copies to the `terms` region what a flag stands for: of each owner's rows the blocks of FLAG_BLOCK packets that the CTA of
    this number fetches there. If the switch sums, this rank's own rows are copied too."""
    PER_PACKET: tl.constexpr = WORDS * 4 // (WIRE.primitive_bitwidth // 8)
    for i in range(1 - SWITCH_SUM, size):
        owner = wire.add_mod(rank + i, size)
        num_packets = tl.load(step_counts + 2 + owner) * (H // PER_PACKET)
        first_element = tl.load(step_counts + 2 + size + owner).to(tl.int64) * H
        target_ptr = terms_ptr + first_element * (WIRE.primitive_bitwidth // 8)
        for b in range(flag, (num_packets + FLAG_BLOCK - 1) // FLAG_BLOCK, num_flags):
            for piece in tl.static_range(FLAG_BLOCK // BLOCK):
                packet = b * FLAG_BLOCK + piece * BLOCK + tl.arange(0, BLOCK)
                live = packet < num_packets
                index = packet.to(tl.int64)
                w0, w1, w2, w3 = load_term(partial_ptr, first_element + index * PER_PACKET, live, PARTIAL, WIRE, WORDS)
                wire.store(target_ptr + index * (WORDS * 4), w0, w1, w2, w3, live, WORDS)
