"""Combine: every rank's partial rows back to the rank that owns the token, summed there in rank order, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import fp8_bulk, fp8_terms, round_loads, shares, waits, wire, wire_clock
from tokenferry.kernels.term_rows import copy_terms, load_term, store_sum

SIGNATURE = {
    "buffer_ptr": "i64",
    "peer_table_ptr": "i64",
    "multicast_ptr": "i64",
    "rank": "i32",
    "size": "i32",
    "counters_ptr": "i64",
    "step_counts_ptr": "i64",
    "counts_offset": "i64",
    "ready_offset": "i64",
    "slots_offset": "i64",
    "slot_bytes": "i64",
    "slot_rows": "i32",
    "counted_rows": "i32",
    "num_flags": "i32",
    "terms_offset": "i64",
    "term_scales_offset": "i64",
    "partial_ptr": "i64",
    "scales_ptr": "i64",
    "scale_row": "i32",
    "num_partial": "i32",
    "is_in_place": "i32",
    "out_ptr": "i64",
    "num_out": "i32",
    "layer": "i32",
    "mode": "i32",
    "loads_ptr": "constexpr",
    "ids_offset": "constexpr",
    "num_experts": "constexpr",
    "H": "constexpr",
    "PARTIAL": "constexpr",
    "WIRE": "constexpr",
    "OUT": "constexpr",
    "WORDS": "constexpr",
    "BLOCK": "constexpr",
    "SWITCH_SUM": "constexpr",
    "MAX_PROGRAMS": "constexpr",
    "FLAG_BLOCK": "constexpr",
    "SPLIT": "constexpr",
    "TELEMETRY": "constexpr",
    "TOPK": "constexpr",
    "IDS": "constexpr",
    "PDL": "constexpr",
}
COUNTING_SIGNATURE = {**SIGNATURE, "loads_ptr": "i64", "ids_offset": "i64", "num_experts": "i32"}
"""With telemetry. Without, `NO_LOADS` are among the constants."""
NO_LOADS = {"loads_ptr": 0, "ids_offset": 0, "num_experts": 0, "TELEMETRY": 0, "TOPK": 0, "IDS": 0}


@triton.jit
def combine_kernel(
    buffer_ptr,
    peer_table_ptr,
    multicast_ptr,
    rank,
    size,
    counters_ptr,
    step_counts_ptr,
    counts_offset,
    ready_offset,
    slots_offset,
    slot_bytes,
    slot_rows,
    counted_rows,
    num_flags,
    terms_offset,
    term_scales_offset,
    partial_ptr,
    scales_ptr,
    scale_row,
    num_partial,
    is_in_place,
    out_ptr,
    num_out,
    layer,
    mode,
    loads_ptr,
    ids_offset,
    num_experts,
    H: tl.constexpr,
    PARTIAL: tl.constexpr,
    WIRE: tl.constexpr,
    OUT: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    SWITCH_SUM: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    FLAG_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    TELEMETRY: tl.constexpr,
    TOPK: tl.constexpr,
    IDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sends each owner this rank's terms for its rows, and sums the terms of this rank's own rows, from rank 0's to the last.

    With slots (see `dispatch_kernel`) every rank sends all rows of every owner, rows of zeros too: a row left out would need an
    acknowledgement before its slot may be used again. Without slots, terms are copied to the `terms` region (unless the experts
    wrote them there), a flag for each CTA of each peer says so, and owners fetch their rows. With SWITCH_SUM
    (`combine_order="any"`, float32) the switch sums what lies in all ranks' `terms` regions, in its own order.

    Args:
        buffer_ptr, peer_table_ptr, multicast_ptr, counters_ptr, step_counts_ptr: see `dispatch_kernel`.
        counts_offset, ready_offset, slots_offset, terms_offset: of regions within a buffer.
        partial_ptr, num_partial: [num_partial, H] PARTIAL, of which V rows are read. If V is more, none is, and this rank fails.
        is_in_place: whether `partial_ptr` is the `terms` region itself.
        out_ptr, num_out: [num_out, H] OUT with num_out <= T. Terms of rows beyond it are received and dropped.
        mode: MODE_SEND, MODE_RECEIVE or both. A launch that only sends is given no `out_ptr`.
        counted_rows: rounds of steps with more rows than that are counted: those in which the dispatch or the combine is bulk.
        num_flags, FLAG_BLOCK: see `dispatch_kernel`. A flag stands for the terms of each block of FLAG_BLOCK packets whose number
            is the flag's, modulo `num_flags`.
        SPLIT: see `dispatch_kernel`; programs that receive sum what they receive.
        loads_ptr, ids_offset, num_experts, TOPK, IDS: with TELEMETRY, the gathered numbers of the dispatch before are counted at
            `loads_ptr`, the word of expert 0, unless that is 0: see `round_loads`. They are TOPK of IDS a row, of the region at
            `ids_offset`.

    Example:
        Two ranks with one row each, bfloat16: partials [[1], [2]] on rank 0 and [[10], [20]] on rank 1 give [[11]] and [[22]].
    """
    tl.static_assert(FLAG_BLOCK % BLOCK == 0, "flags stand for whole blocks")
    tl.static_assert(FLAG_BLOCK == 0 or SWITCH_SUM == 0, "what the switch sums, a CTA has copied itself")
    buffer_ptr = buffer_ptr.to(tl.int64)
    peer_table = peer_table_ptr.to(tl.int64).to(tl.pointer_type(tl.int64))
    counters_ptr = counters_ptr.to(tl.int64)
    step_counts = step_counts_ptr.to(tl.int64).to(tl.pointer_type(tl.int32))
    partial_ptr = partial_ptr.to(tl.int64)
    scales_ptr = scales_ptr.to(tl.int64)
    out_ptr = out_ptr.to(tl.int64)
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    WIRE_BYTES: tl.constexpr = WIRE.primitive_bitwidth // 8
    PER_PACKET: tl.constexpr = WORDS * 4 // WIRE_BYTES
    IS_FP8: tl.constexpr = tl.float8e4nv == WIRE
    tl.static_assert(SPLIT == 0 or not IS_FP8, "programs that only send or only sum have not been tried with float8 terms")
    PER_ROW: tl.constexpr = (H + 511) // 512 * 32 if IS_FP8 else H // PER_PACKET
    ROW_BYTES: tl.constexpr = H * WIRE_BYTES
    # These are read before the previous kernel has ended. The step's counts and the round are as they were when it began, since
    # a dispatch always lies between this kernel and whatever last wrote them.
    nearest_ptr = tl.load(peer_table + wire.add_mod(rank + 1, size))
    num_valid = tl.load(step_counts)
    largest = tl.load(step_counts + 1)
    num_tokens = tl.load(step_counts + 2 + rank)
    first_row = tl.load(step_counts + 2 + size + rank)
    round_number = wire.read_round(counters_ptr)
    step = tl.load(wire.field(counters_ptr, wire.STEP_OFFSET, tl.int32))
    board = tl.zeros([], tl.int64)
    if TELEMETRY:
        board = waits.find_board(counters_ptr)
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    record = wire.read_record(buffer_ptr)
    is_short = num_valid > num_partial
    if is_short:  # not `& (record == 0)`: every launch would wait here for the record, before it asks for the first packet
        mine = wire.set_blamed_rank(wire.blame(step, layer, rank, wire.TOO_FEW_ROWS), rank)
        if pid == 0:
            for peer in range(size):
                wire.claim_record(tl.load(peer_table + peer), mine)
        record = tl.where(record == 0, mine, record)
    size = tl.where(is_short, 1, size)  # then nothing is read, sent or awaited
    num_tokens = tl.where(is_short, 0, num_tokens)
    if TELEMETRY:
        ids_ptr = buffer_ptr + ids_offset
        counts_here = (loads_ptr != 0) & (board != 0) & (is_short == 0)
    in_slots = largest <= slot_rows
    is_bulk = (largest > slot_rows) & (size > 1)
    is_counted = (largest > counted_rows) & (size > 1)
    ticket = tl.zeros([], tl.int64)
    if is_counted & (mode >= wire.MODE_RECEIVE):
        ticket = wire.take_ticket(counters_ptr)
    blamed = wire.blame(step, layer, rank, wire.DATA_MISSING)
    hints_ptr = buffer_ptr + counts_offset + ((step + 1) & 1) * size * wire.COUNT_PACKET_BYTES + wire.COUNT_PACKET_STEP_OFFSET
    num_own_packets = num_tokens * PER_ROW
    first_own_element = first_row.to(tl.int64) * H
    senders, summers, sums, summer = shares.senders_and_receivers(
        pid, programs, num_tokens, num_valid, in_slots, mode, PER_ROW, SPLIT, BLOCK
    )
    if SPLIT > 0:
        num_own_packets = tl.where(sums, num_own_packets, 0)
    if TELEMETRY:  # asked for here, and counted once all is sent: by the last programs first, which have the fewest rows
        counter = summers - 1 - summer
        num_counted = tl.where(counts_here & sums & (is_bulk == 0), num_valid * TOPK, 0)
        ids = round_loads.load_ids(ids_ptr, round_loads.places(lanes, counter, summers), num_counted, IDS)
    packet = summer * BLOCK + lanes
    if IS_FP8:
        own_ptr = partial_ptr + first_own_element * (PARTIAL.primitive_bitwidth // 8)
        own_scales_ptr = scales_ptr + first_row.to(tl.int64) * scale_row * 4
        n0, n1, n2, n3, n4, n5, n6, n7 = fp8_terms.no_words(BLOCK)
        if fp8_terms.is_loaded_ahead(BLOCK):
            n0, n1, n2, n3, n4, n5, n6, n7 = fp8_terms.load_term(
                packet, own_ptr, own_scales_ptr, scale_row, num_tokens, H, PARTIAL
            )
    else:
        element = first_own_element + packet.to(tl.int64) * PER_PACKET
        n0, n1, n2, n3 = load_term(partial_ptr, element, packet < num_own_packets, PARTIAL, WIRE, WORDS)
    if in_slots & (mode != wire.MODE_RECEIVE):
        begin = pid
        peer_ptr = nearest_ptr
        for i in range(1, size):
            owner = wire.add_mod(rank + i, size)
            num_rows = tl.load(step_counts + 2 + owner)
            first_sent = tl.load(step_counts + 2 + size + owner).to(tl.int64)
            target_ptr = peer_ptr + slots_offset + (rank - (rank > owner).to(tl.int32)) * slot_bytes
            peer_ptr = tl.load(peer_table + wire.add_mod(owner + 1, size))
            num_packets = num_rows * PER_ROW
            blocks = (num_packets + BLOCK - 1) // BLOCK
            if SPLIT > 0:
                blocks = tl.where(pid < senders, blocks, 0)
            if IS_FP8:
                sent_ptr = partial_ptr + first_sent * (H * (PARTIAL.primitive_bitwidth // 8))
                sent_scales_ptr = scales_ptr + first_sent * scale_row * 4
                fp8_terms.send_terms(begin, blocks, programs, target_ptr, sent_ptr, sent_scales_ptr, scale_row, num_rows,
                                     buffer_ptr, H, PARTIAL, BLOCK)  # fmt: skip
            else:
                for b in range(begin, blocks, senders):
                    packet = b * BLOCK + lanes
                    live = packet < num_packets
                    index = packet.to(tl.int64)
                    w0, w1, w2, w3 = load_term(partial_ptr, first_sent * H + index * PER_PACKET, live, PARTIAL, WIRE, WORDS)
                    wire.send(target_ptr + index * (WORDS * 4), w0, w1, w2, w3, live, buffer_ptr, WORDS)
            begin = shares.next_share(begin, blocks, senders)
    elif is_bulk:
        epoch = round_number + 1
        terms_ptr = buffer_ptr + terms_offset
        term_scales_ptr = buffer_ptr + term_scales_offset
        is_told_at_once = is_in_place != 0
        if TELEMETRY:  # who counts numbers, tells for itself that it has read them
            is_told_at_once = is_told_at_once & (loads_ptr == 0)
            if counts_here:
                round_loads.add_before_flags(ids_ptr, loads_ptr, num_experts, step_counts, rank, size, pid, programs, TOPK, IDS,
                                             PER_ROW, BLOCK, BLOCK if FLAG_BLOCK == 0 else FLAG_BLOCK)  # fmt: skip
        if mode == wire.MODE_RECEIVE:
            pass
        elif is_told_at_once:  # nothing to copy: one CTA sets all of this rank's flags at a peer at once
            for peer in range(pid, size, programs):
                if peer != rank:
                    flags_ptr = tl.load(peer_table + peer) + ready_offset + (rank * MAX_PROGRAMS) * wire.FLAG_BYTES
                    for first in range(0, num_flags, BLOCK):
                        flag_ptr = flags_ptr + (first + lanes) * wire.FLAG_BYTES
                        wire.signal(flag_ptr, epoch, 1, first + lanes < num_flags, buffer_ptr)
        elif FLAG_BLOCK == 0:
            if is_in_place != 0:
                pass
            elif IS_FP8:
                fp8_bulk.copy_terms(pid, programs, terms_ptr, term_scales_ptr, step_counts, rank, size, partial_ptr, scales_ptr,
                                    scale_row, H, PARTIAL, BLOCK, BLOCK)  # fmt: skip
            else:
                copy_terms(pid, programs, terms_ptr, step_counts, rank, size, partial_ptr, H, PARTIAL, WIRE, WORDS, BLOCK, BLOCK,
                           SWITCH_SUM)  # fmt: skip
            is_peer = (lanes < size) & (lanes != rank)
            buffers = tl.load(peer_table + lanes, mask=is_peer, other=0)
            wire.signal(buffers + ready_offset + (rank * MAX_PROGRAMS + pid) * wire.FLAG_BYTES, epoch, 1, is_peer, buffer_ptr)
        else:
            for flag in range(pid, tl.where(is_in_place != 0, 0, num_flags), programs):
                if IS_FP8:
                    fp8_bulk.copy_terms(flag, num_flags, terms_ptr, term_scales_ptr, step_counts, rank, size,
                                        partial_ptr, scales_ptr, scale_row, H, PARTIAL, BLOCK, FLAG_BLOCK)  # fmt: skip
                else:
                    copy_terms(flag, num_flags, terms_ptr, step_counts, rank, size, partial_ptr, H, PARTIAL, WIRE, WORDS, BLOCK,
                               FLAG_BLOCK, 0)  # fmt: skip
            for first_pair in range(0, (num_flags + programs - 1) // programs * size, BLOCK):
                peers, flags, exist = wire.rank_and_flag(first_pair + lanes, pid, programs, size, num_flags)
                is_told = exist & (peers != rank)
                buffers = tl.load(peer_table + peers, mask=is_told, other=0)
                told_ptr = buffers + ready_offset + (rank * MAX_PROGRAMS + flags) * wire.FLAG_BYTES
                wire.signal(told_ptr, epoch, 1, is_told, buffer_ptr)
        if (mode >= wire.MODE_RECEIVE) & (FLAG_BLOCK == 0 and not IS_FP8):
            flag_ptr = (buffer_ptr + ready_offset) + (lanes * MAX_PROGRAMS + pid) * wire.FLAG_BYTES
            is_awaited = (lanes < size) & (lanes != rank) & (num_tokens > 0)
            blamed_ranks = wire.set_blamed_rank(blamed, lanes)
            hint_ptrs = hints_ptr + lanes * wire.COUNT_PACKET_BYTES
            if TELEMETRY:
                since = wire_clock.clock()
                clocks = wire_clock.await_signal(flag_ptr, epoch, 1, is_awaited, buffer_ptr, blamed_ranks, hint_ptrs)
                is_noted = is_awaited & (pid == 0)
                waits.note_sources(board, size, layer, step, lanes, since, clocks, is_noted, waits.COMBINE)
            else:
                wire.await_signal(flag_ptr, epoch, 1, is_awaited, buffer_ptr, blamed_ranks, hint_ptrs)

    if TELEMETRY:  # noqa: SIM102  # this one is decided by the compiler
        if num_counted > 0:
            round_loads.add_ids(loads_ptr, ids, num_experts)
            round_loads.add_share(ids_ptr, loads_ptr, num_experts, 1, counter, summers, num_counted, IDS, BLOCK)

    # The abort record was asked for first and is looked at here: what goes to a group that has given up does no harm.
    if record != 0:
        wire.report(buffer_ptr, record)
    elif mode >= wire.MODE_RECEIVE:
        if TELEMETRY:
            waits.begin_round(board, step_counts, size, layer, step, lanes, sums & (summer == 0), waits.COMBINE)
        if IS_FP8:
            if is_bulk:
                fp8_bulk.sum_terms(pid, programs, n0, n1, n2, n3, n4, n5, n6, n7, own_ptr, own_scales_ptr, scale_row, num_tokens,
                                   num_out, first_row, rank, size, round_number, num_flags, ready_offset, buffer_ptr, peer_table,
                                   terms_offset, term_scales_offset, blamed, hints_ptr, out_ptr, H, PARTIAL, OUT, BLOCK,
                                   MAX_PROGRAMS, FLAG_BLOCK, TELEMETRY, board, layer, step)  # fmt: skip
            else:
                fp8_terms.sum_terms(pid, programs, n0, n1, n2, n3, n4, n5, n6, n7, own_ptr, own_scales_ptr, scale_row, num_tokens,
                                    num_out, rank, size, buffer_ptr, slots_offset, slot_bytes, blamed, hints_ptr, out_ptr, H,
                                    PARTIAL, OUT, BLOCK, TELEMETRY, board, layer, step)  # fmt: skip
        else:
            if TELEMETRY and FLAG_BLOCK == 0:
                noting = waits.notes(board, summer == 0)
            for b in range(summer, (num_own_packets + BLOCK - 1) // BLOCK, summers):
                packet = b * BLOCK + lanes
                live = packet < num_own_packets
                index = packet.to(tl.int64)
                o0 = n0
                o1 = n1
                o2 = n2
                o3 = n3
                following = packet + summers * BLOCK
                element = first_own_element + following.to(tl.int64) * PER_PACKET
                n0, n1, n2, n3 = load_term(partial_ptr, element, following < num_own_packets, PARTIAL, WIRE, WORDS)
                if FLAG_BLOCK != 0:  # noqa: SIM102  # this one is decided by the compiler
                    if is_bulk:
                        flag = b * BLOCK // FLAG_BLOCK % num_flags
                        flag_ptr = (buffer_ptr + ready_offset) + (lanes * MAX_PROGRAMS + flag) * wire.FLAG_BYTES
                        is_awaited = (lanes < size) & (lanes != rank)
                        blamed_ranks = wire.set_blamed_rank(blamed, lanes)
                        hint_ptrs = hints_ptr + lanes * wire.COUNT_PACKET_BYTES
                        if TELEMETRY:
                            since = wire_clock.clock()
                            clocks = wire_clock.await_signal(
                                flag_ptr, round_number + 1, 1, is_awaited, buffer_ptr, blamed_ranks, hint_ptrs
                            )
                            is_noted = is_awaited & (b == 0)
                            waits.note_sources(board, size, layer, step, lanes, since, clocks, is_noted, waits.COMBINE)
                        else:
                            wire.await_signal(flag_ptr, round_number + 1, 1, is_awaited, buffer_ptr, blamed_ranks, hint_ptrs)
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
                        slot_ptr = buffer_ptr + slots_offset + (source - (source > rank).to(tl.int32)) * slot_bytes
                        blamed_source = wire.set_blamed_rank(blamed, source)
                        packet_ptr = slot_ptr + index * (WORDS * 4)
                        hint_ptr = hints_ptr + source * wire.COUNT_PACKET_BYTES
                        if TELEMETRY and FLAG_BLOCK == 0:
                            since = waits.clock_if(noting)
                        if TELEMETRY and FLAG_BLOCK != 0:
                            since = wire_clock.clock()
                        w0, w1, w2, w3 = wire.poll_and_clear(packet_ptr, live, buffer_ptr, blamed_source, hint_ptr, WORDS)
                        if TELEMETRY and FLAG_BLOCK == 0:
                            waits.note_first(board, size, layer, step, source, since, noting, waits.COMBINE)
                        if TELEMETRY and FLAG_BLOCK != 0:
                            waits.note_source(board, size, layer, step, source, since, b == 0, waits.COMBINE)
                    elif SWITCH_SUM:
                        if is_bulk:
                            summed_ptr = multicast_ptr.to(tl.int64) + terms_offset + first_row.to(tl.int64) * ROW_BYTES
                            w0, w1, w2, w3 = wire.multicast_sum(summed_ptr + index * (WORDS * 4), live, buffer_ptr)
                    elif source != rank:
                        fetched_ptr = tl.load(peer_table + source) + terms_offset + first_row.to(tl.int64) * ROW_BYTES
                        w0, w1, w2, w3 = wire.load_peer(fetched_ptr + index * (WORDS * 4), live, WORDS)
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
                store_sum(out_ptr, index * PER_PACKET, kept, s0, s1, s2, s3, s4, s5, s6, s7, WIRE, OUT, WORDS)
                if TELEMETRY and FLAG_BLOCK == 0:
                    noting = waits.noted()
        if is_counted:
            wire.end_round(counters_ptr, ticket, programs, round_number)
        if pid == 0:  # the next dispatch reads it
            tl.store(wire.field(buffer_ptr, wire.DIRTY_ROWS_OFFSET, tl.int32), num_valid)
