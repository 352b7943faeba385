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
    "pushed": "i64",
    "summed": "i64",
    "slots": "i64",
    "slot_bytes": "i64",
    "slot_rows": "i32",
    "terms": "i64",
    "received": "i64",
    "partial": "i64",
    "is_in_place": "i32",
    "out": "i64",
    "num_out": "i32",
    "layer": "i32",
    "H": "constexpr",
    "PARTIAL": "constexpr",
    "WIRE": "constexpr",
    "OUT": "constexpr",
    "WORDS": "constexpr",
    "BLOCK": "constexpr",
    "UNIT": "constexpr",
    "LAG": "constexpr",
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
def add_term(source, w0, w1, w2, w3, s0, s1, s2, s3, s4, s5, s6, s7, WIRE: tl.constexpr):
    """The sums with one rank's packet added in float32. Rank 0's is taken as it is: 0 + -0.0 would be 0."""
    l0, h0 = wire.unpack(w0, WIRE)
    l1, h1 = wire.unpack(w1, WIRE)
    l2, h2 = wire.unpack(w2, WIRE)
    l3, h3 = wire.unpack(w3, WIRE)
    s0 = tl.where(source == 0, l0, s0 + l0)
    s1 = tl.where(source == 0, h0, s1 + h0)
    s2 = tl.where(source == 0, l1, s2 + l1)
    s3 = tl.where(source == 0, h1, s3 + h1)
    s4 = tl.where(source == 0, l2, s4 + l2)
    s5 = tl.where(source == 0, h2, s5 + h2)
    s6 = tl.where(source == 0, l3, s6 + l3)
    s7 = tl.where(source == 0, h3, s7 + h3)
    return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def push_terms(own, peer_table, words, rank, size, received, terms, partial, first_block, UNIT: tl.constexpr,
               H: tl.constexpr, PARTIAL: tl.constexpr, WIRE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
               SWITCH_SUM: tl.constexpr):  # fmt: skip
    """UNIT blocks of this program, from `first_block` on, to every owner that has so many; for SWITCH_SUM to `terms`, where the
    switch fetches them, this rank's own included."""
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    PER_PACKET: tl.constexpr = WORDS * 4 // (WIRE.primitive_bitwidth // 8)
    PER_ROW: tl.constexpr = H // PER_PACKET
    for i in range(1 - SWITCH_SUM, size):
        owner = wire.wrap(rank + i, size)
        num_packets = tl.load(words + 2 + owner) * PER_ROW
        base = tl.load(words + 2 + size + owner).to(tl.int64) * H
        address = tl.load(peer_table + owner)
        row_of_source = (rank - (rank > owner).to(tl.int32)).to(tl.int64) * num_packets
        goal = address + received + row_of_source * (WORDS * 4)
        if SWITCH_SUM:
            goal = own + terms + base * (WIRE.primitive_bitwidth // 8)
        for u in range(UNIT):
            packet = (first_block + u * programs) * BLOCK + lanes
            live = packet < num_packets
            place = packet.to(tl.int64)
            w0, w1, w2, w3 = load_term(partial, base + place * PER_PACKET, live, PARTIAL, WIRE, WORDS)
            wire.send(goal + place * (WORDS * 4), w0, w1, w2, w3, live, own, WORDS)


@triton.jit
def sum_received(own, cast, rank, size, mine, first, terms, received, partial, out, num_out, block,
                 H: tl.constexpr, PARTIAL: tl.constexpr, WIRE: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr,
                 BLOCK: tl.constexpr, SWITCH_SUM: tl.constexpr):  # fmt: skip
    """One block of this rank's rows, all of whose terms have come. The next rank's packet is asked for while one is added."""
    PER_PACKET: tl.constexpr = WORDS * 4 // (WIRE.primitive_bitwidth // 8)
    PER_ROW: tl.constexpr = H // PER_PACKET
    packet = block * BLOCK + tl.arange(0, BLOCK)
    live = packet < mine * PER_ROW
    place = packet.to(tl.int64)
    own_terms = first.to(tl.int64) * H
    s0 = tl.zeros([BLOCK], tl.float32)
    s1 = s0
    s2 = s0
    s3 = s0
    s4 = s0
    s5 = s0
    s6 = s0
    s7 = s0
    if SWITCH_SUM:
        goal = cast + terms + own_terms * (WIRE.primitive_bitwidth // 8) + place * (WORDS * 4)
        w0, w1, w2, w3 = wire.multicast_sum(goal, live, own, size, 0)
        zero = tl.zeros([], tl.int32)
        s0, s1, s2, s3, s4, s5, s6, s7 = add_term(zero, w0, w1, w2, w3, s0, s1, s2, s3, s4, s5, s6, s7, WIRE)
    else:
        o0, o1, o2, o3 = load_term(partial, own_terms + place * PER_PACKET, live, PARTIAL, WIRE, WORDS)
        stride = (mine * PER_ROW).to(tl.int64) * (WORDS * 4)
        address = own + received + place * (WORDS * 4)
        n0, n1, n2, n3 = wire.load_peer(address, live & (size > 1), WORDS)
        for source in range(size):
            w0 = o0
            w1 = o1
            w2 = o2
            w3 = o3
            if source != rank:
                w0 = n0
                w1 = n1
                w2 = n2
                w3 = n3
                following = source - (source > rank).to(tl.int32) + 1
                n0, n1, n2, n3 = wire.load_peer(address + following * stride, live & (following < size - 1), WORDS)
            s0, s1, s2, s3, s4, s5, s6, s7 = add_term(source, w0, w1, w2, w3, s0, s1, s2, s3, s4, s5, s6, s7, WIRE)
    kept = live & (packet < num_out * PER_ROW)
    store_sum(out, place * PER_PACKET, kept, s0, s1, s2, s3, s4, s5, s6, s7, WIRE, OUT, WORDS)


@triton.jit
def combine_in_bulk(own, peer_table, cast, rank, size, words, ready, pushed, summed, terms, received, partial, is_in_place, out,
                    num_out, epoch, blamed, hints, largest, mine, first,
                    H: tl.constexpr, PARTIAL: tl.constexpr, WIRE: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr,
                    BLOCK: tl.constexpr, UNIT: tl.constexpr, LAG: tl.constexpr, SWITCH_SUM: tl.constexpr,
                    MAX_PROGRAMS: tl.constexpr):  # fmt: skip
    """Pushes terms a unit (UNIT blocks of a program) at a time, and sums, LAG units behind, what the like program of every peer
    has pushed. Every rank has the same number of programs."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    PER_ROW: tl.constexpr = H // (WORDS * 4 // (WIRE.primitive_bitwidth // 8))
    is_peer = (lanes < size) & (lanes != rank)
    buffers = tl.load(peer_table + lanes, mask=is_peer, other=0)
    packets_of = tl.load(words + 2 + lanes, mask=is_peer, other=0) * PER_ROW
    sources = wire.accuse(blamed, lanes)
    hints = hints + lanes * 16
    if not SWITCH_SUM:
        if pid == 0:
            wire.signal(buffers + ready + rank * 8, epoch, 1, is_peer & (mine > 0), own)
        wire.await_signal((own + ready) + lanes * 8, epoch, 1, packets_of > 0, own, sources, hints)
    share = programs * UNIT
    units = (largest * PER_ROW + BLOCK - 1) // BLOCK
    units = (units + share - 1) // share
    own_blocks = (mine * PER_ROW + BLOCK - 1) // BLOCK
    goals = buffers + pushed + (rank * MAX_PROGRAMS + pid) * 8
    flags = (own + pushed) + (lanes * MAX_PROGRAMS + pid) * 8
    for unit in range(units + LAG):
        begin = unit * share + pid
        if unit < units:
            if is_in_place * SWITCH_SUM == 0:
                push_terms(own, peer_table, words, rank, size, received, terms, partial, begin,
                           UNIT, H, PARTIAL, WIRE, WORDS, BLOCK, SWITCH_SUM)  # fmt: skip
            wire.signal(goals, epoch, unit + 1, packets_of > begin * BLOCK, own)
        begin -= LAG * share
        if (begin >= 0) & (begin < own_blocks):
            wire.await_signal(flags, epoch, unit - LAG + 1, is_peer, own, sources, hints)
            for b in range(begin, tl.minimum(begin + share, own_blocks), programs):
                sum_received(own, cast, rank, size, mine, first, terms, received, partial, out, num_out, b,
                             H, PARTIAL, WIRE, OUT, WORDS, BLOCK, SWITCH_SUM)  # fmt: skip
    wire.signal(buffers + summed + (rank * MAX_PROGRAMS + pid) * 8, epoch, 1, is_peer, own)
    # What lies in `hidden` and in `terms` may be overwritten after this kernel: by the peers' next rows, or by this rank's.
    flags = (own + summed) + (lanes * MAX_PROGRAMS + pid) * 8
    wire.await_signal(flags, epoch, 1, packets_of > 0, own, sources, hints)


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
    pushed,
    summed,
    slots,
    slot_bytes,
    slot_rows,
    terms,
    received,
    partial,
    is_in_place,
    out,
    num_out,
    layer,
    H: tl.constexpr,
    PARTIAL: tl.constexpr,
    WIRE: tl.constexpr,
    OUT: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    LAG: tl.constexpr,
    SWITCH_SUM: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sends each owner this rank's terms for its rows, and sums the terms of this rank's own rows, from rank 0's to the last.

    With slots (see `dispatch_kernel`) every rank sends all rows of every owner, rows of zeros too: a row left out would need
    an acknowledgement of its own before its slot may be used again. Without, they go where the owner's gathered rows were, as
    soon as it says that nobody reads those any more; at the end every rank knows that all have summed. With SWITCH_SUM
    (`combine_order="any"`, float32) the switch sums, in its own order, what every rank has left in `terms`.

    Args:
        counts, ready, pushed, summed, slots, terms, received: offsets of regions within a buffer. cast: see `dispatch_kernel`.
        partial: address of [rows, H] PARTIAL, of which V rows are read. is_in_place: whether it is the `terms` region itself.
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
    if in_slots:
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
    # The abort record was asked for first and is looked at here: what goes to a group that has given up does no harm.
    if record != 0:
        wire.report(own, record)
    else:
        if in_slots | (size == 1):
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
                for source in range(size):
                    w0 = o0
                    w1 = o1
                    w2 = o2
                    w3 = o3
                    if source != rank:
                        slot = own + parity_slots + (source - (source > rank).to(tl.int32)) * slot_bytes
                        blamed_source = wire.accuse(blamed, source)
                        hint = hints + source * 16
                        w0, w1, w2, w3 = wire.take(slot + place * (WORDS * 4), live, own, blamed_source, hint, WORDS)
                    s0, s1, s2, s3, s4, s5, s6, s7 = add_term(source, w0, w1, w2, w3, s0, s1, s2, s3, s4, s5, s6, s7, WIRE)
                kept = live & (packet < num_out * PER_ROW)
                store_sum(out, place * PER_PACKET, kept, s0, s1, s2, s3, s4, s5, s6, s7, WIRE, OUT, WORDS)
        else:
            combine_in_bulk(own, peer_table, cast.to(tl.int64), rank, size, words, ready, pushed, summed, terms, received,
                            partial, is_in_place, out, num_out, current + 1, blamed, hints, largest, mine, first,
                            H, PARTIAL, WIRE, OUT, WORDS, BLOCK, UNIT, LAG, SWITCH_SUM, MAX_PROGRAMS)  # fmt: skip
        wire.end_round(own, state, ticket, programs, current, valid)
