"""Dispatch: every rank's rows, expert numbers and weights to every rank, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import fp8_rows, routing_packets, shares, waits, wire, wire_clock

SIGNATURE = {
    "buffer_ptr": "i64",
    "peer_table_ptr": "i64",
    "multicast_ptr": "i64",
    "rank": "i32",
    "size": "i32",
    "counters_ptr": "i64",
    "step_counts_ptr": "i64",
    "counts_offset": "i64",
    "arrived_offset": "i64",
    "slots_offset": "i64",
    "slot_bytes": "i64",
    "slot_rows": "i32",
    "num_flags": "i32",
    "out_hidden_offset": "i64",
    "out_scales_offset": "i64",
    "out_idx_offset": "i64",
    "out_weights_offset": "i64",
    "hidden_ptr": "i64",
    "scales_ptr": "i64",
    "topk_idx_ptr": "i64",
    "topk_weights_ptr": "i64",
    "num_supplied": "i32",
    "num_real_ptr": "i64",
    "layer": "i32",
    "mode": "i32",
    "FORMAT": "constexpr",
    "H": "constexpr",
    "HIDDEN": "constexpr",
    "POWER_OF_TWO": "constexpr",
    "ROW_WORDS": "constexpr",
    "K": "constexpr",
    "IDX": "constexpr",
    "WEIGHTS": "constexpr",
    "OUT_IDX": "constexpr",
    "WORDS": "constexpr",
    "BLOCK": "constexpr",
    "MULTICAST": "constexpr",
    "MAX_PROGRAMS": "constexpr",
    "FLAG_BLOCK": "constexpr",
    "SPLIT": "constexpr",
    "TELEMETRY": "constexpr",
    "PDL": "constexpr",
}


@triton.jit
def dispatch_kernel(
    buffer_ptr,
    peer_table_ptr,
    multicast_ptr,
    rank,
    size,
    counters_ptr,
    step_counts_ptr,
    counts_offset,
    arrived_offset,
    slots_offset,
    slot_bytes,
    slot_rows,
    num_flags,
    out_hidden_offset,
    out_scales_offset,
    out_idx_offset,
    out_weights_offset,
    hidden_ptr,
    scales_ptr,
    topk_idx_ptr,
    topk_weights_ptr,
    num_supplied,
    num_real_ptr,
    layer,
    mode,
    FORMAT: tl.constexpr,
    H: tl.constexpr,
    HIDDEN: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    K: tl.constexpr,
    IDX: tl.constexpr,
    WEIGHTS: tl.constexpr,
    OUT_IDX: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTICAST: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    FLAG_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    TELEMETRY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sends this rank's T rows to every rank and gathers everybody's, rank after rank. Rows from V on get id -1.

    If no rank brings more than `slot_rows` rows, packets go to the receiver's slots [source]. The receiver polls each packet,
    copies it to its place and puts the sentinel back. It sends its terms in a later launch, and its peers send nothing into its
    slots before they have received these. Otherwise rows are stored straight to their place, and each CTA tells the CTA with the
    same index at every peer. All ranks decide alike, since all know the largest count.

    Args:
        buffer_ptr, peer_table_ptr: this rank's buffer; the table of all ranks' buffers.
        multicast_ptr: the multicast mapping of all buffers (MULTICAST only).
        counters_ptr, step_counts_ptr: see `counts_kernel`.
        counts_offset, arrived_offset, slots_offset, out_hidden_offset, out_idx_offset, out_weights_offset: of regions within a
            buffer.
        hidden_ptr, topk_idx_ptr, topk_weights_ptr: the caller's tensors [num_supplied, ROW_WORDS words], [num_supplied, K] twice.
            Rows from num_supplied to T travel as zeros with id -1. Where `fp8_rows` has the format, [num_supplied, H] of HIDDEN,
            or of float8 with their scales at `scales_ptr`.
        num_real_ptr: an int32; rows from it on are padding and travel with id -1.
        mode: MODE_SEND, MODE_RECEIVE or both. A launch that only receives is given num_supplied 0.
        num_flags: how many flags each rank sets at each peer in a bulk round, as agreed between the ranks.
        FLAG_BLOCK: 0 if each CTA has the flag of its index, and there are as many. Else the launch has fewer CTAs than there are
            flags, and they share them out.
        SPLIT: if not 0, large rounds in slots are shared out by `shares.senders_and_receivers`.
        FORMAT, H, POWER_OF_TWO: of the rows: see `fp8_rows`. Rows of bytes are sent as they are, never to slots.
        ROW_WORDS: of a row in a slot.
        WORDS: words of a packet: 4, or 2 if rows are not a multiple of 16 bytes.

    Example:
        Two ranks with rows [a, b] and [c], of which b is padding: both end with hidden [a, b, c], ids [ids(a), -1, ids(c)].
    """
    buffer_ptr = buffer_ptr.to(tl.int64)
    peer_table = peer_table_ptr.to(tl.int64).to(tl.pointer_type(tl.int64))
    counters_ptr = counters_ptr.to(tl.int64)
    step_counts = step_counts_ptr.to(tl.int64).to(tl.pointer_type(tl.int32))
    hidden_ptr = hidden_ptr.to(tl.int64)
    scales_ptr = scales_ptr.to(tl.int64)
    topk_idx_ptr = topk_idx_ptr.to(tl.int64)
    topk_weights_ptr = topk_weights_ptr.to(tl.int64)
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    ROW_BYTES: tl.constexpr = ROW_WORDS * 4
    PER_ROW: tl.constexpr = ROW_WORDS // WORDS
    IS_FP8: tl.constexpr = FORMAT == fp8_rows.QUANTIZE or FORMAT == fp8_rows.QUANTIZED
    THREADS: tl.constexpr = (H + 511) // 512 * 32 if IS_FP8 else PER_ROW  # that a row is sent by
    GATHERED: tl.constexpr = H if IS_FP8 else ROW_BYTES
    nearest_ptr = tl.load(peer_table + wire.add_mod(rank + 1, size))
    supplied = num_supplied * THREADS
    # Routing packets go to the programs after those with hidden rows.
    routing_program = pid - ((supplied + BLOCK - 1) // BLOCK) % programs
    routing_program = tl.where(routing_program < 0, routing_program + programs, routing_program)
    word = (routing_program * BLOCK + lanes) * 4
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)

    # Everything that the first packets need is asked for at once: one global-memory latency is half a microsecond, of a
    # dispatch of less than two.
    record = wire.read_record(buffer_ptr)
    valid = tl.load(step_counts)
    largest = tl.load(step_counts + 1)
    num_tokens = tl.load(step_counts + 2 + rank)
    first_row = tl.load(step_counts + 2 + size + rank)
    num_real = tl.load(num_real_ptr.to(tl.int64).to(tl.pointer_type(tl.int32)))
    dirty_rows = tl.load(wire.field(buffer_ptr, wire.DIRTY_ROWS_OFFSET, tl.int32))
    round_number = wire.read_round(counters_ptr)
    step = tl.load(wire.field(counters_ptr, wire.STEP_OFFSET, tl.int32))
    if TELEMETRY:
        board = waits.find_board(counters_ptr)
    packet = pid * BLOCK + lanes
    if IS_FP8:
        n0, n1, n2, n3, n4, n5, n6, n7 = fp8_rows.load_first_words(
            packet, hidden_ptr, scales_ptr, num_supplied, H, FORMAT, HIDDEN, BLOCK
        )
    else:
        n0, n1, n2, n3 = wire.load(hidden_ptr + packet.to(tl.int64) * (WORDS * 4), packet < supplied, WORDS)
    m0 = tl.zeros([BLOCK], tl.uint32)
    m1 = m0
    m2 = m0
    m3 = m0
    if routing_program * (BLOCK * 4) < num_supplied * (2 * K):
        m0 = routing_packets.load_routing(word, topk_idx_ptr, topk_weights_ptr, num_supplied, K, IDX, WEIGHTS)
        m1 = routing_packets.load_routing(word + 1, topk_idx_ptr, topk_weights_ptr, num_supplied, K, IDX, WEIGHTS)
        m2 = routing_packets.load_routing(word + 2, topk_idx_ptr, topk_weights_ptr, num_supplied, K, IDX, WEIGHTS)
        m3 = routing_packets.load_routing(word + 3, topk_idx_ptr, topk_weights_ptr, num_supplied, K, IDX, WEIGHTS)
    in_slots = largest <= slot_rows
    routing_offset = (slot_rows.to(tl.int64) * ROW_BYTES + 15) // 16 * 16
    hidden_place_offset = out_hidden_offset + first_row.to(tl.int64) * GATHERED

    # Hidden rows go to every peer and to their place in this rank's buffer. The next packets are loaded while these are sent.
    num_sent = num_tokens * (mode & wire.MODE_SEND)
    num_packets = num_sent * THREADS
    senders, receivers, receives, receiver = shares.senders_and_receivers(
        pid, programs, num_tokens, valid, in_slots, mode, PER_ROW, SPLIT, BLOCK
    )
    if SPLIT > 0:
        num_packets = tl.where(pid < senders, num_packets, 0)
    for b in range(pid, (num_packets + BLOCK - 1) // BLOCK, senders):
        packet = b * BLOCK + lanes
        live = packet < num_packets
        following = packet + senders * BLOCK
        if IS_FP8:
            w0, w1, w2, w3, scale = fp8_rows.words_to_send(
                packet, n0, n1, n2, n3, n4, n5, n6, n7, hidden_ptr, num_supplied, H, FORMAT, HIDDEN, POWER_OF_TWO, BLOCK
            )
            n0, n1, n2, n3, n4, n5, n6, n7 = fp8_rows.load_first_words(
                following, hidden_ptr, scales_ptr, num_supplied, H, FORMAT, HIDDEN, BLOCK
            )
            fp8_rows.send_words(packet, w0, w1, w2, w3, scale, num_packets, num_supplied, first_row, in_slots, rank, size,
                                buffer_ptr, peer_table, nearest_ptr, multicast_ptr, slots_offset, slot_bytes, out_hidden_offset,
                                out_scales_offset, ROW_BYTES, H, FORMAT, BLOCK, MULTICAST)  # fmt: skip
        else:
            offset = packet.to(tl.int64) * (WORDS * 4)
            w0 = fp8_rows.escape(n0, FORMAT)
            w1 = fp8_rows.escape(n1, FORMAT)
            w2 = fp8_rows.escape(n2, FORMAT)
            w3 = fp8_rows.escape(n3, FORMAT)
            n0, n1, n2, n3 = wire.load(hidden_ptr + following.to(tl.int64) * (WORDS * 4), following < supplied, WORDS)
            if MULTICAST:
                target_ptr = multicast_ptr + tl.where(in_slots, slots_offset + rank * slot_bytes, hidden_place_offset)
                wire.multicast(target_ptr + offset, w0, w1, w2, w3, live, buffer_ptr, WORDS)
            else:
                peer_ptr = nearest_ptr
                for i in range(1, size):
                    peer = wire.add_mod(rank + i, size)
                    slot_offset = slots_offset + (rank - (rank > peer).to(tl.int32)) * slot_bytes
                    target_ptr = peer_ptr + tl.where(in_slots, slot_offset, hidden_place_offset)
                    peer_ptr = tl.load(peer_table + wire.add_mod(peer + 1, size))
                    wire.send(target_ptr + offset, w0, w1, w2, w3, live, buffer_ptr, WORDS)
                wire.store(buffer_ptr + hidden_place_offset + offset, w0, w1, w2, w3, live, WORDS)

    # Expert numbers and weights, four words a packet.
    num_words = num_sent * (2 * K)
    num_packets = (num_words + 3) // 4
    for b in range(routing_program, (num_packets + BLOCK - 1) // BLOCK, programs):
        packet = b * BLOCK + lanes
        word = packet * 4
        r0 = routing_packets.mask_routing(word, m0, num_words, num_supplied, num_real, K)
        r1 = routing_packets.mask_routing(word + 1, m1, num_words, num_supplied, num_real, K)
        r2 = routing_packets.mask_routing(word + 2, m2, num_words, num_supplied, num_real, K)
        r3 = routing_packets.mask_routing(word + 3, m3, num_words, num_supplied, num_real, K)
        following = word + programs * (BLOCK * 4)
        m0 = routing_packets.load_routing(following, topk_idx_ptr, topk_weights_ptr, num_supplied, K, IDX, WEIGHTS)
        m1 = routing_packets.load_routing(following + 1, topk_idx_ptr, topk_weights_ptr, num_supplied, K, IDX, WEIGHTS)
        m2 = routing_packets.load_routing(following + 2, topk_idx_ptr, topk_weights_ptr, num_supplied, K, IDX, WEIGHTS)
        m3 = routing_packets.load_routing(following + 3, topk_idx_ptr, topk_weights_ptr, num_supplied, K, IDX, WEIGHTS)
        peer_ptr = nearest_ptr
        for i in range(1, size + 1):
            peer = wire.add_mod(rank + i, size)
            target_ptr = peer_ptr
            peer_ptr = tl.load(peer_table + wire.add_mod(peer + 1, size))
            if in_slots and i < size:
                slot_offset = slots_offset + (rank - (rank > peer).to(tl.int32)) * slot_bytes
                if MULTICAST:
                    slot_offset = slots_offset + rank * slot_bytes
                offset = slot_offset + routing_offset + packet.to(tl.int64) * 16
                wire.send(target_ptr + offset, r0, r1, r2, r3, packet < num_packets, buffer_ptr, 4)
            else:
                routing_packets.store_routing_packet(word, r0, r1, r2, r3, num_words, target_ptr + out_idx_offset,
                                                     target_ptr + out_weights_offset, first_row, K, OUT_IDX)  # fmt: skip

    # Ids of rows that an earlier, larger step has left behind.
    idx_pointer = (buffer_ptr + out_idx_offset).to(tl.pointer_type(OUT_IDX))
    left_behind = (dirty_rows - valid) * (mode & wire.MODE_SEND) * K
    for b in range(pid, (left_behind + BLOCK - 1) // BLOCK, programs):
        entry = b * BLOCK + lanes
        minus_one = tl.full([BLOCK], -1, OUT_IDX)
        tl.store(idx_pointer + valid.to(tl.int64) * K + entry, minus_one, mask=entry < left_behind)

    # The abort record was asked for first and is looked at here: what goes to a group that has given up does no harm.
    if record != 0:
        wire.report(buffer_ptr, record)
    else:
        blamed = wire.blame(step, layer, rank, wire.DATA_MISSING)
        hints_ptr = buffer_ptr + counts_offset + ((step + 1) & 1) * size * wire.COUNT_PACKET_BYTES + wire.COUNT_PACKET_STEP_OFFSET
        if TELEMETRY:
            begins = receives & (receiver == 0) & (mode >= wire.MODE_RECEIVE)
            waits.begin_round(board, step_counts, size, layer, step, lanes, begins, waits.DISPATCH)
        if in_slots & (mode >= wire.MODE_RECEIVE):
            begin = receiver
            for i in range(1 - MULTICAST, size):  # the multicast also writes this rank's own slot
                source = wire.add_mod(rank + i, size)
                source_tokens = tl.load(step_counts + 2 + source)
                source_row = tl.load(step_counts + 2 + size + source)
                slot_ptr = buffer_ptr + slots_offset + (source - (source > rank).to(tl.int32)) * slot_bytes
                if MULTICAST:
                    slot_ptr = buffer_ptr + slots_offset + source * slot_bytes
                blamed_source = wire.set_blamed_rank(blamed, source)
                hint_ptr = hints_ptr + source * wire.COUNT_PACKET_BYTES
                num_packets = source_tokens * PER_ROW
                target_ptr = buffer_ptr + out_hidden_offset + source_row.to(tl.int64) * GATHERED
                blocks = (num_packets + BLOCK - 1) // BLOCK
                if SPLIT > 0:
                    blocks = tl.where(receives, blocks, 0)
                if TELEMETRY and FLAG_BLOCK == 0:
                    noting = waits.notes(board, (begin == 0) & (source != rank))
                    since = waits.clock_if(noting)
                for b in range(begin, blocks, receivers):
                    packet = b * BLOCK + lanes
                    live = packet < num_packets
                    offset = packet.to(tl.int64) * (WORDS * 4)
                    if TELEMETRY and FLAG_BLOCK != 0:
                        since = wire_clock.clock()
                    w0, w1, w2, w3 = wire.poll_and_clear(slot_ptr + offset, live, buffer_ptr, blamed_source, hint_ptr, WORDS)
                    if TELEMETRY and FLAG_BLOCK == 0:
                        waits.note_first(board, size, layer, step, source, since, noting, waits.DISPATCH)
                        noting = waits.noted()
                    if TELEMETRY and FLAG_BLOCK != 0:
                        is_first = (b == 0) & (source != rank)
                        waits.note_source(board, size, layer, step, source, since, is_first, waits.DISPATCH)
                    if IS_FP8:
                        offset = fp8_rows.place_of_received(packet, out_scales_offset - out_hidden_offset, source_row, H)
                    wire.store(target_ptr + offset, w0, w1, w2, w3, live, WORDS)
                begin = shares.next_share(begin, blocks, receivers)
                num_words = source_tokens * (2 * K)
                if MULTICAST:
                    num_words = tl.where(i == 0, 0, num_words)
                num_packets = (num_words + 3) // 4
                blocks = (num_packets + BLOCK - 1) // BLOCK
                if SPLIT > 0:
                    blocks = tl.where(receives, blocks, 0)
                for b in range(begin, blocks, receivers):
                    packet = b * BLOCK + lanes
                    word = packet * 4
                    offset = slot_ptr + routing_offset + packet.to(tl.int64) * 16
                    r0, r1, r2, r3 = wire.poll_and_clear(offset, packet < num_packets, buffer_ptr, blamed_source, hint_ptr, 4)
                    routing_packets.store_routing_packet(word, r0, r1, r2, r3, num_words, buffer_ptr + out_idx_offset,
                                                         buffer_ptr + out_weights_offset, source_row, K, OUT_IDX)  # fmt: skip
                begin = shares.next_share(begin, blocks, receivers)
        elif largest > slot_rows:
            if FLAG_BLOCK == 0:
                is_peer = (lanes < size) & (lanes != rank)
                if (mode & wire.MODE_SEND) != 0:
                    buffers = tl.load(peer_table + lanes, mask=is_peer, other=0)
                    wire.signal(
                        buffers + arrived_offset + (rank * MAX_PROGRAMS + pid) * wire.FLAG_BYTES,
                        round_number + 1,
                        1,
                        is_peer,
                        buffer_ptr,
                    )
                if mode >= wire.MODE_RECEIVE:
                    brings = is_peer & (tl.load(step_counts + 2 + lanes, mask=is_peer, other=0) > 0)
                    flag_ptr = (buffer_ptr + arrived_offset) + (lanes * MAX_PROGRAMS + pid) * wire.FLAG_BYTES
                    blamed_ranks = wire.set_blamed_rank(blamed, lanes)
                    hint_ptrs = hints_ptr + lanes * wire.COUNT_PACKET_BYTES
                    if TELEMETRY:
                        since = wire_clock.clock()
                        clocks = wire_clock.await_signal(
                            flag_ptr, round_number + 1, 1, brings, buffer_ptr, blamed_ranks, hint_ptrs
                        )
                        is_noted = brings & (pid == 0)
                        waits.note_sources(board, size, layer, step, lanes, since, clocks, is_noted, waits.DISPATCH)
                    else:
                        wire.await_signal(flag_ptr, round_number + 1, 1, brings, buffer_ptr, blamed_ranks, hint_ptrs)
            else:
                # All that this CTA sends is on its way, so that it may set any of this rank's flags: all together stand for all
                # of its CTAs, and each of the peers' CTAs waits for the flags that it knows.
                num_pairs = (num_flags + programs - 1) // programs * size
                if (mode & wire.MODE_SEND) != 0:
                    for first_pair in range(0, num_pairs, BLOCK):
                        peers, flags, exist = wire.rank_and_flag(first_pair + lanes, pid, programs, size, num_flags)
                        is_told = exist & (peers != rank)
                        buffers = tl.load(peer_table + peers, mask=is_told, other=0)
                        told_ptr = buffers + arrived_offset + (rank * MAX_PROGRAMS + flags) * wire.FLAG_BYTES
                        wire.signal(told_ptr, round_number + 1, 1, is_told, buffer_ptr)
                if mode >= wire.MODE_RECEIVE:
                    for first_pair in range(0, num_pairs, BLOCK):
                        sources, flags, exist = wire.rank_and_flag(first_pair + lanes, pid, programs, size, num_flags)
                        is_awaited = exist & (sources != rank)
                        brings = is_awaited & (tl.load(step_counts + 2 + sources, mask=is_awaited, other=0) > 0)
                        flag_ptr = (buffer_ptr + arrived_offset) + (sources * MAX_PROGRAMS + flags) * wire.FLAG_BYTES
                        blamed_ranks = wire.set_blamed_rank(blamed, sources)
                        hint_ptrs = hints_ptr + sources * wire.COUNT_PACKET_BYTES
                        if TELEMETRY:
                            since = wire_clock.clock()
                            clocks = wire_clock.await_signal(
                                flag_ptr, round_number + 1, 1, brings, buffer_ptr, blamed_ranks, hint_ptrs
                            )
                            is_noted = brings & (flags == 0)
                            waits.note_sources(board, size, layer, step, sources, since, clocks, is_noted, waits.DISPATCH)
                        else:
                            wire.await_signal(flag_ptr, round_number + 1, 1, brings, buffer_ptr, blamed_ranks, hint_ptrs)
