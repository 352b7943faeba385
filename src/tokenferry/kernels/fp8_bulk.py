"""Float8 terms in bulk: owners fetch them from the regions `terms` and `term_scales` of the ranks that hold them.

Like `wire`, this file holds device functions alone and no kernel.

Terms that lie elsewhere are copied there first, quantized on the way. Copied piece by piece while others were fetched, with a
flag that told how far they were, 4096 rows of H 7168 took longer: see docs/formats.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import fp8_rows, fp8_sum, fp8_terms, waits, wire, wire_clock, wire_float8


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
def copy_terms(flag, num_flags, terms_ptr, term_scales_ptr, step_counts, rank, size, partial_ptr, scales_ptr, scale_row,
               H: tl.constexpr, PARTIAL: tl.constexpr, BLOCK: tl.constexpr, FLAG_BLOCK: tl.constexpr):  # fmt: skip
    """Copies what a flag stands for: of each owner's rows the blocks of FLAG_BLOCK threads that the CTA of this number fetches
    there."""
    for i in range(1, size):
        owner = wire.add_mod(rank + i, size)
        num_rows = tl.load(step_counts + 2 + owner)
        first_row = tl.load(step_counts + 2 + size + owner).to(tl.int64)
        rows_ptr = partial_ptr + first_row * (H * (PARTIAL.primitive_bitwidth // 8))
        row_scales_ptr = scales_ptr + first_row * scale_row * 4
        blocks = (num_rows * ((H + 511) // 512 * 32) + FLAG_BLOCK - 1) // FLAG_BLOCK
        for b in range(flag, blocks, num_flags):
            for piece in tl.static_range(FLAG_BLOCK // BLOCK):
                thread = b * FLAG_BLOCK + piece * BLOCK + tl.arange(0, BLOCK)
                n0, n1, n2, n3, n4, n5, n6, n7 = fp8_terms.load_term(
                    thread, rows_ptr, row_scales_ptr, scale_row, num_rows, H, PARTIAL
                )
                store_copy(thread, n0, n1, n2, n3, n4, n5, n6, n7, num_rows, first_row, rows_ptr, terms_ptr, term_scales_ptr,
                           H, PARTIAL, BLOCK)  # fmt: skip


@triton.jit
def await_terms(block, pid, num_flags, epoch, flags_ptr, rank, size, buffer_ptr, blamed, hints_ptr, MAX_PROGRAMS: tl.constexpr,
                BLOCK: tl.constexpr, FLAG_BLOCK: tl.constexpr, TELEMETRY: tl.constexpr, board, layer, step):  # fmt: skip
    """Waits until the terms of a block of this rank's rows are there at every peer. `flags_ptr`: this rank's flags `ready`."""
    lanes = tl.arange(0, BLOCK)
    flag = pid
    if FLAG_BLOCK != 0:
        flag = block * BLOCK // FLAG_BLOCK % num_flags
    is_awaited = (lanes < size) & (lanes != rank)
    flag_ptr = flags_ptr + (lanes * MAX_PROGRAMS + flag) * wire.FLAG_BYTES
    blamed_ranks = wire.set_blamed_rank(blamed, lanes)
    hint_ptrs = hints_ptr + lanes * wire.COUNT_PACKET_BYTES
    if TELEMETRY:
        since = wire_clock.clock()
        clocks = wire_clock.await_signal(flag_ptr, epoch, 1, is_awaited, buffer_ptr, blamed_ranks, hint_ptrs)
        is_noted = is_awaited & (block == 0)
        waits.note_sources(board, size, layer, step, lanes, since, clocks, is_noted, waits.COMBINE)
    else:
        wire.await_signal(flag_ptr, epoch, 1, is_awaited, buffer_ptr, blamed_ranks, hint_ptrs)


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
              rank, size, round_number, num_flags, ready_offset, buffer_ptr, peer_table, terms_offset, term_scales_offset, blamed,
              hints_ptr, out_ptr, H: tl.constexpr, PARTIAL: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
              MAX_PROGRAMS: tl.constexpr, FLAG_BLOCK: tl.constexpr, TELEMETRY: tl.constexpr, board, layer, step):  # fmt: skip
    """Sums the terms of this rank's rows, its own ones and those that it fetches, from rank 0's to the last. See
    `fp8_terms.sum_terms`."""
    PER_ROW: tl.constexpr = (H + 511) // 512 * 32
    own_blocks = (num_rows * PER_ROW + BLOCK - 1) // BLOCK
    fetched_from = tl.where(rank == 0, 1, 0)
    fetched_ptr = tl.load(peer_table + fetched_from)
    for b in range(pid, own_blocks, programs):
        thread = b * BLOCK + tl.arange(0, BLOCK)
        if FLAG_BLOCK != 0 or b == pid:
            await_terms(b, pid, num_flags, round_number + 1, buffer_ptr + ready_offset, rank, size, buffer_ptr, blamed, hints_ptr,
                        MAX_PROGRAMS, BLOCK, FLAG_BLOCK, TELEMETRY, board, layer, step)  # fmt: skip
        if not fp8_terms.is_loaded_ahead(BLOCK):
            n0, n1, n2, n3, n4, n5, n6, n7 = fp8_terms.load_term(thread, own_ptr, own_scales_ptr, scale_row, num_rows, H, PARTIAL)
        f0, f1, f2, f3, fetched_word = fetch(
            b * BLOCK, num_rows, first_row, fetched_ptr, terms_offset, term_scales_offset, H, BLOCK
        )
        o0, o1, o2, o3, own_scale = fp8_terms.quantize_term(
            thread, n0, n1, n2, n3, n4, n5, n6, n7, own_ptr, num_rows, H, PARTIAL, BLOCK
        )
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
