"""Combine: every rank's partial rows back to the rank that owns the token, summed there in rank order, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire

SIGNATURE = {
    "own": "i64",
    "peers": "i64",
    "cast": "i64",
    "rank": "i32",
    "size": "i32",
    "state": "i64",
    "block": "i64",
    "counts": "i64",
    "ready": "i64",
    "slots": "i64",
    "slot_bytes": "i64",
    "slot_rows": "i32",
    "terms": "i64",
    "partial": "i64",
    "is_in_place": "i32",
    "out": "i64",
    "num_out": "i32",
    "layer": "i32",
    "part": "i32",
    "H": "constexpr",
    "PARTIAL": "constexpr",
    "WIRE": "constexpr",
    "OUT": "constexpr",
    "WORDS": "constexpr",
    "BLOCK": "constexpr",
    "SWITCH_SUM": "constexpr",
    "MAX_PROGRAMS": "constexpr",
    "PDL": "constexpr",
}


@triton.jit
def load_term(base, element, live, PARTIAL: tl.constexpr, WIRE: tl.constexpr, WORDS: tl.constexpr):
    """The packet of the wire that begins at `element` of the partial rows, each value rounded once to WIRE.

    Example:
        float32 values 1, 2, 3, 4 to a bfloat16 wire in packets of two words: 0x40003F80, 0x40804040.
    """
    PARTIAL_BYTES: tl.constexpr = PARTIAL.primitive_bitwidth // 8
    WIRE_BYTES: tl.constexpr = WIRE.primitive_bitwidth // 8
    address = base + element * PARTIAL_BYTES
    if PARTIAL_BYTES == WIRE_BYTES:
        a, b, c, d = wire.load(address, live, WORDS)
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
        e, f, g, h = wire.load(address, live, 4)
        a = wire.pack(e.to(tl.float32, bitcast=True), f.to(tl.float32, bitcast=True), WIRE)
        b = wire.pack(g.to(tl.float32, bitcast=True), h.to(tl.float32, bitcast=True), WIRE)
        c = a
        d = b
        if WORDS == 4:
            e, f, g, h = wire.load(address + 16, live, 4)
            c = wire.pack(e.to(tl.float32, bitcast=True), f.to(tl.float32, bitcast=True), WIRE)
            d = wire.pack(g.to(tl.float32, bitcast=True), h.to(tl.float32, bitcast=True), WIRE)
    else:
        e, f, g, h = wire.load(address, live, WORDS // 2)
        l, h = wire.unpack(e, PARTIAL)
        a = l.to(tl.uint32, bitcast=True)
        b = h.to(tl.uint32, bitcast=True)
        l, h = wire.unpack(f, PARTIAL)
        c = l.to(tl.uint32, bitcast=True)
        d = h.to(tl.uint32, bitcast=True)
    return wire.escape(a), wire.escape(b), wire.escape(c), wire.escape(d)


@triton.jit
def store_sum(base, element, live, s0, s1, s2, s3, s4, s5, s6, s7, WIRE: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr):
    """One packet of sums, each rounded once to OUT. For a float32 wire the values are s0, s2, s4, s6."""
    address = base + element * (OUT.primitive_bitwidth // 8)
    if tl.float32 == WIRE:
        if tl.float32 == OUT:
            wire.store(
                address,
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
            wire.store(address, a, b, a, b, live, WORDS // 2)
    elif tl.float32 == OUT:
        wire.store(
            address, wire.pack(s0, s0, OUT), wire.pack(s1, s1, OUT), wire.pack(s2, s2, OUT), wire.pack(s3, s3, OUT), live, 4
        )
        if WORDS == 4:
            wire.store(
                address + 16,
                wire.pack(s4, s4, OUT),
                wire.pack(s5, s5, OUT),
                wire.pack(s6, s6, OUT),
                wire.pack(s7, s7, OUT),
                live,
                4,
            )
    else:
        wire.store(
            address, wire.pack(s0, s1, OUT), wire.pack(s2, s3, OUT), wire.pack(s4, s5, OUT), wire.pack(s6, s7, OUT), live, WORDS
        )


@triton.jit
def copy_terms(terms, words, rank, size, partial, H: tl.constexpr, PARTIAL: tl.constexpr, WIRE: tl.constexpr,
               WORDS: tl.constexpr, BLOCK: tl.constexpr, SWITCH_SUM: tl.constexpr):  # fmt: skip
    """What the like programs of the peers will fetch from this one: of each owner's rows the same blocks as there. This rank's
    own rows too if the switch sums them."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    PER_PACKET: tl.constexpr = WORDS * 4 // (WIRE.primitive_bitwidth // 8)
    for i in range(1 - SWITCH_SUM, size):
        owner = wire.wrap(rank + i, size)
        num_packets = tl.load(words + 2 + owner) * (H // PER_PACKET)
        base = tl.load(words + 2 + size + owner).to(tl.int64) * H
        goal = terms + base * (WIRE.primitive_bitwidth // 8)
        for b in range(pid, (num_packets + BLOCK - 1) // BLOCK, programs):
            packet = b * BLOCK + tl.arange(0, BLOCK)
            live = packet < num_packets
            place = packet.to(tl.int64)
            w0, w1, w2, w3 = load_term(partial, base + place * PER_PACKET, live, PARTIAL, WIRE, WORDS)
            wire.store(goal + place * (WORDS * 4), w0, w1, w2, w3, live, WORDS)


@triton.jit
def combine_kernel(
    own,
    peers,
    cast,
    rank,
    size,
    state,
    block,
    counts,
    ready,
    slots,
    slot_bytes,
    slot_rows,
    terms,
    partial,
    is_in_place,
    out,
    num_out,
    layer,
    part,
    H: tl.constexpr,
    PARTIAL: tl.constexpr,
    WIRE: tl.constexpr,
    OUT: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    SWITCH_SUM: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sends each owner this rank's terms for its rows, and sums the terms of this rank's own rows, from rank 0's to the last.

    With slots (see `dispatch_kernel`) every rank sends all rows of every owner, rows of zeros too: a row left out would need
    an acknowledgement of its own before its slot may be used again. Without, terms are copied to `terms` (unless the experts
    wrote them there), a flag for each program of each peer says so, and owners fetch their rows. With SWITCH_SUM
    (`combine_order="any"`, float32) the switch sums what lies in all ranks' `terms`, in its own order.

    Args:
        counts, ready, slots, terms: offsets of regions within a buffer. cast: see `dispatch_kernel`.
        partial: address of [rows, H] PARTIAL, of which V rows are read. is_in_place: whether it is the `terms` region itself.
        part: wire.SEND, wire.RECEIVE or both; a launch that only sends is given no `out`.
        out: address of [num_out, H] OUT; num_out <= T: terms of rows beyond it are received and dropped.

    Example:
        Two ranks with one row each, bfloat16: partials [[1], [2]] on rank 0 and [[10], [20]] on rank 1 give [[11]] and [[22]].
    """
    own = own.to(tl.int64)
    peer_table = peers.to(tl.int64).to(tl.pointer_type(tl.int64))
    state = state.to(tl.int64)
    words = block.to(tl.int64).to(tl.pointer_type(tl.int32))
    partial = partial.to(tl.int64)
    out = out.to(tl.int64)
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    WIRE_BYTES: tl.constexpr = WIRE.primitive_bitwidth // 8
    PER_PACKET: tl.constexpr = WORDS * 4 // WIRE_BYTES
    PER_ROW: tl.constexpr = H // PER_PACKET
    ROW_BYTES: tl.constexpr = H * WIRE_BYTES
    # Before the previous kernel has ended: the step's counts and the round are as they were when it began, since a dispatch
    # always lies between this kernel and whatever last wrote them.
    nearest = tl.load(peer_table + wire.wrap(rank + 1, size))
    valid = tl.load(words)
    largest = tl.load(words + 1)
    mine = tl.load(words + 2 + rank)
    first = tl.load(words + 2 + size + rank)
    current = wire.read_round(state)
    step = tl.load(wire.field(state, wire.STATE_STEP, tl.int32))
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    record = wire.read_record(own)
    ticket = tl.zeros([], tl.int64)
    if part >= wire.RECEIVE:
        ticket = wire.take_ticket(state)
    in_slots = largest <= slot_rows
    parity_slots = slots + (current & 1) * (size - 1) * slot_bytes
    blamed = wire.blame(step, layer, rank, wire.DATA_MISSING)
    hints = own + counts + ((step + 1) & 1) * size * 16 + 8
    own_packets = mine * PER_ROW
    own_terms = first.to(tl.int64) * H
    packet = pid * BLOCK + lanes
    at = own_terms + packet.to(tl.int64) * PER_PACKET
    n0, n1, n2, n3 = load_term(partial, at, packet < own_packets, PARTIAL, WIRE, WORDS)
    if in_slots & (part != wire.RECEIVE):
        begin = pid
        address = nearest
        for i in range(1, size):
            owner = wire.wrap(rank + i, size)
            num_packets = tl.load(words + 2 + owner) * PER_ROW
            base = tl.load(words + 2 + size + owner).to(tl.int64) * H
            goal = address + parity_slots + (rank - (rank > owner).to(tl.int32)) * slot_bytes
            address = tl.load(peer_table + wire.wrap(owner + 1, size))
            blocks = (num_packets + BLOCK - 1) // BLOCK
            for b in range(begin, blocks, programs):
                packet = b * BLOCK + lanes
                live = packet < num_packets
                place = packet.to(tl.int64)
                w0, w1, w2, w3 = load_term(partial, base + place * PER_PACKET, live, PARTIAL, WIRE, WORDS)
                wire.send(goal + place * (WORDS * 4), w0, w1, w2, w3, live, own, WORDS)
            begin -= tl.where(blocks < programs, blocks, blocks % programs)
            begin = tl.where(begin < 0, begin + programs, begin)
    elif (largest > slot_rows) & (size > 1):
        epoch = current + 1
        if part == wire.RECEIVE:
            pass
        elif is_in_place == 0:
            copy_terms(own + terms, words, rank, size, partial, H, PARTIAL, WIRE, WORDS, BLOCK, SWITCH_SUM)
            tell = (lanes < size) & (lanes != rank)
            buffers = tl.load(peer_table + lanes, mask=tell, other=0)
            wire.signal(buffers + ready + (rank * MAX_PROGRAMS + pid) * 8, epoch, 1, tell, own)
        else:  # nothing to copy: one program tells all programs of a peer at once
            for peer in range(pid, size, programs):
                if peer != rank:
                    flags = tl.load(peer_table + peer) + ready + (rank * MAX_PROGRAMS) * 8
                    for b in range(0, programs, BLOCK):
                        wire.signal(flags + (b + lanes) * 8, epoch, 1, b + lanes < programs, own)
        if part >= wire.RECEIVE:
            flag = (own + ready) + (lanes * MAX_PROGRAMS + pid) * 8
            wanted = (lanes < size) & (lanes != rank) & (mine > 0)
            wire.await_signal(flag, epoch, 1, wanted, own, wire.accuse(blamed, lanes), hints + lanes * 16)

    # The abort record was asked for first and is looked at here: what goes to a group that has given up does no harm.
    if record != 0:
        wire.report(own, record)
    elif part >= wire.RECEIVE:
        for b in range(pid, (own_packets + BLOCK - 1) // BLOCK, programs):
            packet = b * BLOCK + lanes
            live = packet < own_packets
            place = packet.to(tl.int64)
            o0 = n0
            o1 = n1
            o2 = n2
            o3 = n3
            following = packet + programs * BLOCK
            at = own_terms + following.to(tl.int64) * PER_PACKET
            n0, n1, n2, n3 = load_term(partial, at, following < own_packets, PARTIAL, WIRE, WORDS)
            s0 = tl.zeros([BLOCK], tl.float32)
            s1 = s0
            s2 = s0
            s3 = s0
            s4 = s0
            s5 = s0
            s6 = s0
            s7 = s0
            sources = size
            if SWITCH_SUM:
                sources = tl.where(in_slots, size, 1)
            for source in range(sources):
                w0 = o0
                w1 = o1
                w2 = o2
                w3 = o3
                if in_slots & (source != rank):
                    slot = own + parity_slots + (source - (source > rank).to(tl.int32)) * slot_bytes
                    blamed_source = wire.accuse(blamed, source)
                    w0, w1, w2, w3 = wire.take(slot + place * (WORDS * 4), live, own, blamed_source, hints + source * 16, WORDS)
                elif SWITCH_SUM:
                    if (largest > slot_rows) & (size > 1):
                        goal = cast.to(tl.int64) + terms + first.to(tl.int64) * ROW_BYTES + place * (WORDS * 4)
                        w0, w1, w2, w3 = wire.multicast_sum(goal, live, own)
                elif source != rank:
                    fetched = tl.load(peer_table + source) + terms + first.to(tl.int64) * ROW_BYTES
                    w0, w1, w2, w3 = wire.load_peer(fetched + place * (WORDS * 4), live, WORDS)
                l0, h0 = wire.unpack(w0, WIRE)
                l1, h1 = wire.unpack(w1, WIRE)
                l2, h2 = wire.unpack(w2, WIRE)
                l3, h3 = wire.unpack(w3, WIRE)
                # Rank 0's term is taken as it is: 0 + -0.0 would be 0.
                s0 = tl.where(source == 0, l0, s0 + l0)
                s1 = tl.where(source == 0, h0, s1 + h0)
                s2 = tl.where(source == 0, l1, s2 + l1)
                s3 = tl.where(source == 0, h1, s3 + h1)
                s4 = tl.where(source == 0, l2, s4 + l2)
                s5 = tl.where(source == 0, h2, s5 + h2)
                s6 = tl.where(source == 0, l3, s6 + l3)
                s7 = tl.where(source == 0, h3, s7 + h3)
            kept = live & (packet < num_out * PER_ROW)
            store_sum(out, place * PER_PACKET, kept, s0, s1, s2, s3, s4, s5, s6, s7, WIRE, OUT, WORDS)
        wire.end_round(own, state, ticket, programs, current, valid)
