"""Float8 terms in bulk: owners fetch them from the regions `terms` and `term_scales` of the ranks that hold them.

Like `wire`, this file holds device functions alone and no kernel.

Terms that lie elsewhere are copied there first, quantized on the way. A program has every so many-th block of a list: its rounds.
It copies LEAD rounds, says so, and then fetches a round and copies another in turn, the latter while what it has asked of its
peers is on its way. A flag's units are the rounds that are there so far. Copied all at once, with idle links, 4096 rows of H 7168
took 30 microseconds of 224 (2 x H200, 2026-11-26).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import fp8_rows, fp8_sum, fp8_terms, waits, wire, wire_clock, wire_float8

LEAD: tl.constexpr = tl.constexpr(4)
"""Rounds that are copied before the first is fetched."""
GROUP: tl.constexpr = tl.constexpr(2)
"""Rounds from one signal to the next: each costs the program a barrier and a release. LEAD is a multiple of it."""


@triton.jit
def rows_of(owner, step_counts, size, partial_ptr, scales_ptr, scale_row, H: tl.constexpr, PARTIAL: tl.constexpr):
    """How many rows an owner has, the number of its first one, and where its partial rows and their scales begin here."""
    num_rows = tl.load(step_counts + 2 + owner)
    first_row = tl.load(step_counts + 2 + size + owner).to(tl.int64)
    rows_ptr = partial_ptr + first_row * (H * (PARTIAL.primitive_bitwidth // 8))
    return num_rows, first_row, rows_ptr, scales_ptr + first_row * scale_row * 4


@triton.jit
def store_copy(thread, n0, n1, n2, n3, n4, n5, n6, n7, num_rows, first_row, rows_ptr, terms_ptr, term_scales_ptr,
               H: tl.constexpr, PARTIAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Quantizes what `fp8_terms.load_term` has loaded of an owner's rows, and stores it where the owner fetches it."""
    SCALES: tl.constexpr = (H + 511) // 512 * 16
    v0, v1, v2, v3, scale = fp8_terms.quantize_term(thread, n0, n1, n2, n3, n4, n5, n6, n7, rows_ptr, num_rows, H, PARTIAL, BLOCK)
    row, column = fp8_rows.place(thread, H)
    live = (row < num_rows) & (column < H)
    index = first_row + row
    wire.store(terms_ptr + index * H + column, v0, v1, v2, v3, live, 4)
    is_scale = live & (column % 128 == 0)
    wire.store(term_scales_ptr + index * SCALES + column // 128 * 4, scale, scale, scale, scale, is_scale, 1)


@triton.jit
def copy_terms(flag, num_flags, end, terms_ptr, term_scales_ptr, step_counts, rank, size, partial_ptr, scales_ptr, scale_row,
               H: tl.constexpr, PARTIAL: tl.constexpr, BLOCK: tl.constexpr, FLAG_BLOCK: tl.constexpr):  # fmt: skip
    """Copies what a flag stands for: of each owner's rows the blocks of FLAG_BLOCK threads that the CTA of this number fetches
    there, up to block number `end`."""
    for i in range(1, size):
        owner = wire.add_mod(rank + i, size)
        num_rows, first_row, rows_ptr, row_scales_ptr = rows_of(
            owner, step_counts, size, partial_ptr, scales_ptr, scale_row, H, PARTIAL
        )
        blocks = (num_rows * ((H + 511) // 512 * 32) + FLAG_BLOCK - 1) // FLAG_BLOCK
        for b in range(flag, tl.minimum(blocks, end), num_flags):
            for piece in tl.static_range(FLAG_BLOCK // BLOCK):
                thread = b * FLAG_BLOCK + piece * BLOCK + tl.arange(0, BLOCK)
                n0, n1, n2, n3, n4, n5, n6, n7 = fp8_terms.load_term(
                    thread, rows_ptr, row_scales_ptr, scale_row, num_rows, H, PARTIAL
                )
                store_copy(thread, n0, n1, n2, n3, n4, n5, n6, n7, num_rows, first_row, rows_ptr, terms_ptr, term_scales_ptr,
                           H, PARTIAL, BLOCK)  # fmt: skip


@triton.jit
def copy_block(block, n0, n1, n2, n3, n4, n5, n6, n7, terms_ptr, term_scales_ptr, step_counts, rank, size, partial_ptr,
               scales_ptr, scale_row, H: tl.constexpr, PARTIAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Copies the block of this number of each owner's rows. `n0` to `n7`: what `fp8_terms.load_term` has loaded of the next
    rank's."""
    thread = block * BLOCK + tl.arange(0, BLOCK)
    for i in range(1, size):
        owner = wire.add_mod(rank + i, size)
        num_rows, first_row, rows_ptr, row_scales_ptr = rows_of(
            owner, step_counts, size, partial_ptr, scales_ptr, scale_row, H, PARTIAL
        )
        if i > 1:
            n0, n1, n2, n3, n4, n5, n6, n7 = fp8_terms.load_term(
                thread, rows_ptr, row_scales_ptr, scale_row, num_rows, H, PARTIAL
            )
        store_copy(thread, n0, n1, n2, n3, n4, n5, n6, n7, num_rows, first_row, rows_ptr, terms_ptr, term_scales_ptr,
                   H, PARTIAL, BLOCK)  # fmt: skip


@triton.jit
def tell(units, flag_offset, epoch, peer_table, rank, size, buffer_ptr, BLOCK: tl.constexpr):
    """Sets this program's flag at every peer: the terms of so many of its rounds are there."""
    lanes = tl.arange(0, BLOCK)
    is_peer = (lanes < size) & (lanes != rank)
    buffers = tl.load(peer_table + lanes, mask=is_peer, other=0)
    wire.signal(buffers + flag_offset, epoch, units, is_peer, buffer_ptr)


@triton.jit
def tell_at_times(copied, all_blocks, programs, flag_offset, epoch, peer_table, rank, size, buffer_ptr, BLOCK: tl.constexpr):
    """`tell`, if the block that has just been copied is the last of a group, or of all that are this program's."""
    is_last = copied + programs >= all_blocks
    rounds = copied // programs + 1
    if is_last | (rounds % GROUP == 0):
        tell(tl.where(is_last, wire.ALL_UNITS, rounds), flag_offset, epoch, peer_table, rank, size, buffer_ptr, BLOCK)


@triton.jit
def await_round(block, known_units, pid, programs, num_flags, epoch, flags_ptr, rank, size, buffer_ptr, blamed, hints_ptr,
                MAX_PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, FLAG_BLOCK: tl.constexpr, TELEMETRY: tl.constexpr, board, layer,
                step):  # fmt: skip
    """Waits until the terms of a block of this rank's rows are there at every peer; returns how many rounds of it are.

    Args:
        known_units: what an earlier call returned. Where each CTA has a flag of its own it may spare the wait.
        flags_ptr: this rank's flags `ready`.
    """
    lanes = tl.arange(0, BLOCK)
    if FLAG_BLOCK == 0:
        flag = pid
        needed = block // programs + 1
    else:
        number = block * BLOCK // FLAG_BLOCK
        flag = number % num_flags
        needed = number // num_flags + 1
        known_units = 0 * known_units
    if needed > known_units:
        is_awaited = (lanes < size) & (lanes != rank)
        flag_ptr = flags_ptr + (lanes * MAX_PROGRAMS + flag) * wire.FLAG_BYTES
        blamed_ranks = wire.set_blamed_rank(blamed, lanes)
        hint_ptrs = hints_ptr + lanes * wire.COUNT_PACKET_BYTES
        if TELEMETRY:
            since = wire_clock.clock()
            clocks = wire_clock.await_signal(flag_ptr, epoch, needed, is_awaited, buffer_ptr, blamed_ranks, hint_ptrs)
            is_noted = is_awaited & (block == 0)
            waits.note_sources(board, size, layer, step, lanes, since, clocks, is_noted, waits.COMBINE)
        known_units = wire_float8.await_units(flag_ptr, epoch, needed, is_awaited, buffer_ptr, blamed_ranks, hint_ptrs)
    return known_units


@triton.jit
def fetch(first_thread, num_rows, first_row, peer_ptr, terms_offset, term_scales_offset, H: tl.constexpr, BLOCK: tl.constexpr):
    """Values of each thread's columns from a peer's regions, and of the first threads a scale each: those of a program's columns
    are neighbours. Loaded by each warp for itself, they would be a fifth of all requests. `share_scales` tells the others."""
    SCALES: tl.constexpr = (H + 511) // 512 * 16
    lanes = tl.arange(0, BLOCK)
    row, column = fp8_rows.place(first_thread + lanes, H)
    live = (row < num_rows) & (column < H)
    v0, v1, v2, v3 = wire.load_peer(peer_ptr + terms_offset + (first_row.to(tl.int64) + row) * H + column, live, 4)
    row, column = fp8_rows.place(first_thread + lanes * 8 % BLOCK, H)
    is_scale = (lanes < BLOCK // 8) & (row < num_rows) & (column < H)
    place = (first_row.to(tl.int64) + row) * SCALES + column // 128 * 4
    return v0, v1, v2, v3, wire_float8.load_peer_word(peer_ptr + term_scales_offset + place, is_scale)


@triton.jit
def share_scales(word, BLOCK: tl.constexpr):
    """The scale of each thread's columns, from what `fetch` has returned. The program waits here for what it has asked for."""
    return tl.gather(word, tl.arange(0, BLOCK) // 8, 0)


@triton.jit
def sum_terms(pid, programs, n0, n1, n2, n3, n4, n5, n6, n7, own_ptr, own_scales_ptr, scale_row, num_rows, num_out, first_row,
              rank, size, largest, copies_in_turn, partial_ptr, scales_ptr, step_counts, round_number, num_flags, ready_offset,
              buffer_ptr, peer_table, terms_offset, term_scales_offset, blamed, hints_ptr, out_ptr, H: tl.constexpr,
              PARTIAL: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
              FLAG_BLOCK: tl.constexpr, TELEMETRY: tl.constexpr, board, layer, step):  # fmt: skip
    """Sums the terms of this rank's rows, its own ones and those that it fetches, from rank 0's to the last. See
    `fp8_terms.sum_terms`.

    Args:
        largest: the most rows that a rank has.
        copies_in_turn: whether this program copies what is behind its first LEAD rounds of its peers' terms meanwhile.
    """
    PER_ROW: tl.constexpr = (H + 511) // 512 * 32
    own_blocks = (num_rows * PER_ROW + BLOCK - 1) // BLOCK
    all_blocks = (largest * PER_ROW + BLOCK - 1) // BLOCK
    known_units = tl.zeros([], tl.int32)
    fetched_from = tl.where(rank == 0, 1, 0)
    fetched_ptr = tl.load(peer_table + fetched_from)
    next_rows, _next_row, next_ptr, next_scales_ptr = rows_of(
        wire.add_mod(rank + 1, size), step_counts, size, partial_ptr, scales_ptr, scale_row, H, PARTIAL
    )
    next_rows = tl.where(copies_in_turn, next_rows, 0)
    for b in range(pid, tl.where(copies_in_turn, all_blocks, own_blocks), programs):
        thread = b * BLOCK + tl.arange(0, BLOCK)
        if b < own_blocks:
            known_units = await_round(b, known_units, pid, programs, num_flags, round_number + 1, buffer_ptr + ready_offset, rank,
                                      size, buffer_ptr, blamed, hints_ptr, MAX_PROGRAMS, BLOCK, FLAG_BLOCK, TELEMETRY, board,
                                      layer, step)  # fmt: skip
        if not fp8_terms.is_loaded_ahead(BLOCK):
            n0, n1, n2, n3, n4, n5, n6, n7 = fp8_terms.load_term(thread, own_ptr, own_scales_ptr, scale_row, num_rows, H, PARTIAL)
        copied = b + LEAD * programs
        if FLAG_BLOCK == 0:  # asked for ahead of what the peers are asked for, which takes longer
            c0, c1, c2, c3, c4, c5, c6, c7 = fp8_terms.load_term(
                copied * BLOCK + tl.arange(0, BLOCK), next_ptr, next_scales_ptr, scale_row, next_rows, H, PARTIAL
            )
        f0, f1, f2, f3, fetched_word = fetch(
            b * BLOCK, num_rows, first_row, fetched_ptr, terms_offset, term_scales_offset, H, BLOCK
        )
        o0, o1, o2, o3, own_scale = fp8_terms.quantize_term(
            thread, n0, n1, n2, n3, n4, n5, n6, n7, own_ptr, num_rows, H, PARTIAL, BLOCK
        )
        if FLAG_BLOCK == 0 and copies_in_turn & (copied < all_blocks):
            copy_block(copied, c0, c1, c2, c3, c4, c5, c6, c7, buffer_ptr + terms_offset, buffer_ptr + term_scales_offset,
                       step_counts, rank, size, partial_ptr, scales_ptr, scale_row, H, PARTIAL, BLOCK)  # fmt: skip
        if fp8_terms.is_loaded_ahead(BLOCK):
            n0, n1, n2, n3, n4, n5, n6, n7 = fp8_terms.load_term(
                thread + programs * BLOCK, own_ptr, own_scales_ptr, scale_row, num_rows, H, PARTIAL
            )
        s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15 = fp8_sum.zeros(BLOCK)
        for source in range(size):
            v0 = o0
            v1 = o1
            v2 = o2
            v3 = o3
            bits = own_scale
            if source != rank:
                if source != fetched_from:
                    f0, f1, f2, f3, fetched_word = fetch(
                        b * BLOCK, num_rows, first_row, tl.load(peer_table + source), terms_offset, term_scales_offset, H, BLOCK
                    )
                v0 = f0
                v1 = f1
                v2 = f2
                v3 = f3
                bits = share_scales(fetched_word, BLOCK)
            s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15 = fp8_sum.add_term(
                source == 0, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, v0, v1, v2, v3, bits
            )
        fp8_sum.store_sums(thread, tl.minimum(num_rows, num_out), out_ptr, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12,
                           s13, s14, s15, H, OUT)  # fmt: skip
        if FLAG_BLOCK == 0 and copies_in_turn & (copied < all_blocks):
            own_flag = ready_offset + (rank * MAX_PROGRAMS + pid) * wire.FLAG_BYTES
            tell_at_times(copied, all_blocks, programs, own_flag, round_number + 1, peer_table, rank, size, buffer_ptr, BLOCK)
