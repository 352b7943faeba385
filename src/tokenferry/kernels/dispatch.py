"""Dispatch: every rank's rows, expert numbers and weights to every rank, in one launch."""

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
    "arrived": "i64",
    "slots": "i64",
    "slot_bytes": "i64",
    "slot_rows": "i32",
    "out_hidden": "i64",
    "out_idx": "i64",
    "out_weights": "i64",
    "hidden": "i64",
    "topk_idx": "i64",
    "topk_weights": "i64",
    "num_supplied": "i32",
    "num_real": "i64",
    "layer": "i32",
    "part": "i32",
    "ROW_WORDS": "constexpr",
    "K": "constexpr",
    "IDX": "constexpr",
    "WEIGHTS": "constexpr",
    "OUT_IDX": "constexpr",
    "WORDS": "constexpr",
    "BLOCK": "constexpr",
    "MULTICAST": "constexpr",
    "MAX_PROGRAMS": "constexpr",
    "PDL": "constexpr",
}


@triton.jit
def load_routing(word, topk_idx, topk_weights, num_supplied, K: tl.constexpr, IDX: tl.constexpr, WEIGHTS: tl.constexpr):
    """Words of the routing message, [rows][K numbers, then K float32 weights]. A number that is negative, or needs more than 32
    bits, travels as -1: cut off, 2**32 + 3 would be expert 3.

    Example:
        K = 2, one row with numbers (3, 5) and weights (0.5, 0.25): words 3, 5, 0x3F000000, 0x3E800000.
    """
    row = word // (2 * K)
    column = word - row * (2 * K)
    present = row < num_supplied
    place = row.to(tl.int64) * K + column
    idx = tl.load(topk_idx.to(tl.pointer_type(IDX)) + place, mask=present & (column < K), other=-1)
    idx = tl.where(idx == idx.to(tl.int32), idx, -1).to(tl.int32)
    weight = tl.load(topk_weights.to(tl.pointer_type(WEIGHTS)) + place - K, mask=present & (column >= K), other=0.0)
    bits = weight.to(tl.float32).to(tl.uint32, bitcast=True)
    return tl.where(column < K, tl.maximum(idx, -1).to(tl.uint32, bitcast=True), bits)


@triton.jit
def mask_routing(word, bits, num_words, num_supplied, num_real, K: tl.constexpr):
    """The words as they travel: the number -1 in rows of padding or not supplied, escaped, and 0 behind the message's end."""
    row = word // (2 * K)
    is_idx = word - row * (2 * K) < K
    minus_one = tl.full(bits.shape, 0xFFFFFFFF, tl.uint32)
    bits = tl.where(is_idx & (row >= tl.minimum(num_supplied, num_real)), minus_one, bits)
    return tl.where(word < num_words, wire.escape(bits), 0)


@triton.jit
def next_share(begin, blocks, programs):
    """Where this program begins in the next list of blocks, so that all lists together are dealt out evenly.

    Example:
        Of 4 programs the one that began at 1 in a list of 3 blocks begins at 2 in the next: programs 3, 0 and 1 go first.
    """
    begin -= tl.where(blocks < programs, blocks, blocks % programs)
    return tl.where(begin < 0, begin + programs, begin)


@triton.jit
def store_routing(word, bits, live, idx_base, weights_base, first_row, K: tl.constexpr, OUT_IDX: tl.constexpr):
    """The inverse of `load_routing`, into the gathered tensors from row `first_row` on."""
    row = word // (2 * K)
    column = word - row * (2 * K)
    place = (row + first_row).to(tl.int64) * K + column
    idx = tl.maximum(bits.to(tl.int32, bitcast=True), -1)
    tl.store(idx_base.to(tl.pointer_type(OUT_IDX)) + place, idx.to(OUT_IDX), mask=live & (column < K))
    weight = bits.to(tl.float32, bitcast=True)
    tl.store(weights_base.to(tl.pointer_type(tl.float32)) + place - K, weight, mask=live & (column >= K))


@triton.jit
def dispatch_kernel(
    own,
    peers,
    cast,
    rank,
    size,
    state,
    block,
    counts,
    arrived,
    slots,
    slot_bytes,
    slot_rows,
    out_hidden,
    out_idx,
    out_weights,
    hidden,
    topk_idx,
    topk_weights,
    num_supplied,
    num_real,
    layer,
    part,
    ROW_WORDS: tl.constexpr,
    K: tl.constexpr,
    IDX: tl.constexpr,
    WEIGHTS: tl.constexpr,
    OUT_IDX: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTICAST: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sends this rank's T rows to every rank and gathers everybody's, rank after rank; rows from V on get id -1.

    If no rank brings more than `slot_rows` rows, packets go to the receiver's slots [parity of the round][source], where it polls
    each, copies it to its place and puts the sentinel back. Else rows are stored straight to their place, and each
    program tells its like at every peer. All ranks decide alike, since all know the largest count.

    Args:
        own, peers, cast: this rank's buffer, the table of all, and the multicast mapping of all (MULTICAST only).
        counts, arrived, slots, out_hidden, out_idx, out_weights: offsets of regions within a buffer.
        block: see `counts_kernel`. hidden [num_supplied, ROW_WORDS], topk_idx, topk_weights [num_supplied, K]: addresses of
        the caller's tensors; rows from num_supplied to T travel as zeros with id -1. num_real: address of an int32.
        part: wire.SEND, wire.RECEIVE or both. A launch that only receives is given num_supplied 0.
        WORDS: words of a packet, 4, or 2 if rows are not a multiple of 16 bytes.

    Example:
        Two ranks with rows [a, b] and [c], of which b is padding: both end with hidden [a, b, c], ids [ids(a), -1, ids(c)].
    """
    own = own.to(tl.int64)
    peer_table = peers.to(tl.int64).to(tl.pointer_type(tl.int64))
    state = state.to(tl.int64)
    words = block.to(tl.int64).to(tl.pointer_type(tl.int32))
    hidden = hidden.to(tl.int64)
    topk_idx = topk_idx.to(tl.int64)
    topk_weights = topk_weights.to(tl.int64)
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    ROW_BYTES: tl.constexpr = ROW_WORDS * 4
    PER_ROW: tl.constexpr = ROW_WORDS // WORDS
    nearest = tl.load(peer_table + wire.wrap(rank + 1, size))
    supplied = num_supplied * PER_ROW
    # Routing packets go to the programs after those with hidden rows.
    routing_program = pid - ((supplied + BLOCK - 1) // BLOCK) % programs
    routing_program = tl.where(routing_program < 0, routing_program + programs, routing_program)
    word = (routing_program * BLOCK + lanes) * 4
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)

    # All that the first packets need is asked for at once: a trip to memory costs half a microsecond, of less than two.
    record = wire.read_record(own)
    valid = tl.load(words)
    largest = tl.load(words + 1)
    mine = tl.load(words + 2 + rank)
    first = tl.load(words + 2 + size + rank)
    real = tl.load(num_real.to(tl.int64).to(tl.pointer_type(tl.int32)))
    dirty = tl.load(wire.field(own, wire.DIRTY_ROWS, tl.int32))
    current = wire.read_round(state)
    step = tl.load(wire.field(state, wire.STATE_STEP, tl.int32))
    packet = pid * BLOCK + lanes
    n0, n1, n2, n3 = wire.load(hidden + packet.to(tl.int64) * (WORDS * 4), packet < supplied, WORDS)
    m0 = tl.zeros([BLOCK], tl.uint32)
    m1 = m0
    m2 = m0
    m3 = m0
    if routing_program * (BLOCK * 4) < num_supplied * (2 * K):
        m0 = load_routing(word, topk_idx, topk_weights, num_supplied, K, IDX, WEIGHTS)
        m1 = load_routing(word + 1, topk_idx, topk_weights, num_supplied, K, IDX, WEIGHTS)
        m2 = load_routing(word + 2, topk_idx, topk_weights, num_supplied, K, IDX, WEIGHTS)
        m3 = load_routing(word + 3, topk_idx, topk_weights, num_supplied, K, IDX, WEIGHTS)
    in_slots = largest <= slot_rows
    num_slots = size - 1
    if MULTICAST:
        num_slots = size
    parity_slots = slots + (current & 1) * num_slots * slot_bytes
    routing_offset = (slot_rows.to(tl.int64) * ROW_BYTES + 15) // 16 * 16
    hidden_place = out_hidden + first.to(tl.int64) * ROW_BYTES

    # Hidden rows: to every peer, and to this rank's own place. The next packets are loaded while these are sent.
    num_sent = mine * (part & wire.SEND)
    num_packets = num_sent * PER_ROW
    for b in range(pid, (num_packets + BLOCK - 1) // BLOCK, programs):
        packet = b * BLOCK + lanes
        live = packet < num_packets
        place = packet.to(tl.int64) * (WORDS * 4)
        w0 = wire.escape(n0)
        w1 = wire.escape(n1)
        w2 = wire.escape(n2)
        w3 = wire.escape(n3)
        following = packet + programs * BLOCK
        n0, n1, n2, n3 = wire.load(hidden + following.to(tl.int64) * (WORDS * 4), following < supplied, WORDS)
        if MULTICAST:
            goal = tl.where(in_slots, parity_slots + rank * slot_bytes, hidden_place)
            wire.multicast(cast + goal + place, w0, w1, w2, w3, live, own, WORDS)
        else:
            address = nearest
            for i in range(1, size):
                peer = wire.wrap(rank + i, size)
                slot = parity_slots + (rank - (rank > peer).to(tl.int32)) * slot_bytes
                goal = address + tl.where(in_slots, slot, hidden_place)
                address = tl.load(peer_table + wire.wrap(peer + 1, size))
                wire.send(goal + place, w0, w1, w2, w3, live, own, WORDS)
            wire.store(own + hidden_place + place, w0, w1, w2, w3, live, WORDS)

    # Expert numbers and weights, four words a packet.
    num_words = num_sent * (2 * K)
    num_packets = (num_words + 3) // 4
    for b in range(routing_program, (num_packets + BLOCK - 1) // BLOCK, programs):
        packet = b * BLOCK + lanes
        word = packet * 4
        r0 = mask_routing(word, m0, num_words, num_supplied, real, K)
        r1 = mask_routing(word + 1, m1, num_words, num_supplied, real, K)
        r2 = mask_routing(word + 2, m2, num_words, num_supplied, real, K)
        r3 = mask_routing(word + 3, m3, num_words, num_supplied, real, K)
        following = word + programs * (BLOCK * 4)
        m0 = load_routing(following, topk_idx, topk_weights, num_supplied, K, IDX, WEIGHTS)
        m1 = load_routing(following + 1, topk_idx, topk_weights, num_supplied, K, IDX, WEIGHTS)
        m2 = load_routing(following + 2, topk_idx, topk_weights, num_supplied, K, IDX, WEIGHTS)
        m3 = load_routing(following + 3, topk_idx, topk_weights, num_supplied, K, IDX, WEIGHTS)
        address = nearest
        for i in range(1, size + 1):
            peer = wire.wrap(rank + i, size)
            goal = address
            address = tl.load(peer_table + wire.wrap(peer + 1, size))
            if in_slots and i < size:
                slot = parity_slots + (rank - (rank > peer).to(tl.int32)) * slot_bytes
                if MULTICAST:
                    slot = parity_slots + rank * slot_bytes
                place = slot + routing_offset + packet.to(tl.int64) * 16
                wire.send(goal + place, r0, r1, r2, r3, packet < num_packets, own, 4)
            else:
                store_routing(word, r0, word < num_words, goal + out_idx, goal + out_weights, first, K, OUT_IDX)
                store_routing(word + 1, r1, word + 1 < num_words, goal + out_idx, goal + out_weights, first, K, OUT_IDX)
                store_routing(word + 2, r2, word + 2 < num_words, goal + out_idx, goal + out_weights, first, K, OUT_IDX)
                store_routing(word + 3, r3, word + 3 < num_words, goal + out_idx, goal + out_weights, first, K, OUT_IDX)

    # Rows that an earlier, larger step has left behind.
    idx_pointer = (own + out_idx).to(tl.pointer_type(OUT_IDX))
    left_behind = (dirty - valid) * (part & wire.SEND) * K
    for b in range(pid, (left_behind + BLOCK - 1) // BLOCK, programs):
        entry = b * BLOCK + lanes
        minus_one = tl.full([BLOCK], -1, OUT_IDX)
        tl.store(idx_pointer + valid.to(tl.int64) * K + entry, minus_one, mask=entry < left_behind)

    # The abort record was asked for first and is looked at here: what goes to a group that has given up does no harm.
    if record != 0:
        wire.report(own, record)
    else:
        blamed = wire.blame(step, layer, rank, wire.DATA_MISSING)
        hints = own + counts + ((step + 1) & 1) * size * 16 + 8
        if in_slots & (part >= wire.RECEIVE):
            begin = pid
            for i in range(1 - MULTICAST, size):  # the multicast writes this rank's own slot too
                source = wire.wrap(rank + i, size)
                count = tl.load(words + 2 + source)
                start = tl.load(words + 2 + size + source)
                slot = own + parity_slots + (source - (source > rank).to(tl.int32)) * slot_bytes
                if MULTICAST:
                    slot = own + parity_slots + source * slot_bytes
                blamed_source = wire.accuse(blamed, source)
                hint = hints + source * 16
                num_packets = count * PER_ROW
                goal = own + out_hidden + start.to(tl.int64) * ROW_BYTES
                blocks = (num_packets + BLOCK - 1) // BLOCK
                for b in range(begin, blocks, programs):
                    packet = b * BLOCK + lanes
                    live = packet < num_packets
                    place = packet.to(tl.int64) * (WORDS * 4)
                    w0, w1, w2, w3 = wire.take(slot + place, live, own, blamed_source, hint, WORDS)
                    wire.store(goal + place, w0, w1, w2, w3, live, WORDS)
                begin = next_share(begin, blocks, programs)
                num_words = count * (2 * K)
                if MULTICAST:
                    num_words = tl.where(i == 0, 0, num_words)
                num_packets = (num_words + 3) // 4
                blocks = (num_packets + BLOCK - 1) // BLOCK
                for b in range(begin, blocks, programs):
                    packet = b * BLOCK + lanes
                    word = packet * 4
                    place = slot + routing_offset + packet.to(tl.int64) * 16
                    r0, r1, r2, r3 = wire.take(place, packet < num_packets, own, blamed_source, hint, 4)
                    store_routing(word, r0, word < num_words, own + out_idx, own + out_weights, start, K, OUT_IDX)
                    store_routing(word + 1, r1, word + 1 < num_words, own + out_idx, own + out_weights, start, K, OUT_IDX)
                    store_routing(word + 2, r2, word + 2 < num_words, own + out_idx, own + out_weights, start, K, OUT_IDX)
                    store_routing(word + 3, r3, word + 3 < num_words, own + out_idx, own + out_weights, start, K, OUT_IDX)
                begin = next_share(begin, blocks, programs)
        elif largest > slot_rows:
            is_peer = (lanes < size) & (lanes != rank)
            if (part & wire.SEND) != 0:
                buffers = tl.load(peer_table + lanes, mask=is_peer, other=0)
                wire.signal(buffers + arrived + (rank * MAX_PROGRAMS + pid) * 8, current + 1, 1, is_peer, own)
            if part >= wire.RECEIVE:
                brings = is_peer & (tl.load(words + 2 + lanes, mask=is_peer, other=0) > 0)
                flag = (own + arrived) + (lanes * MAX_PROGRAMS + pid) * 8
                wire.await_signal(flag, current + 1, 1, brings, own, wire.accuse(blamed, lanes), hints + lanes * 16)
