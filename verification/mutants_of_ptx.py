"""Seeded changes that only the compiled kernels show: accesses that order others, barriers, waits."""

from __future__ import annotations

from verification.mutant import Mutant

ORDER = "tests/test_kernel_order.py::"
_KERNELS = "src/tokenferry/kernels"

OF_PTX = (
    Mutant(
        "flag-is-not-released",
        f"{_KERNELS}/wire_ptx.py",
        "@%p0 st.release.sys.global.b64 [$1], %v; }",
        "@%p0 st.relaxed.sys.global.b64 [$1], %v; }",
        (f"{ORDER}test_flags_are_released_and_acquired[dispatch-90]",),
    ),
    Mutant(
        "flag-is-not-acquired",
        f"{_KERNELS}/wire_ptx.py",
        "W: ld.acquire.sys.global.b64 %v, [{flag}];",
        "W: ld.relaxed.sys.global.b64 %v, [{flag}];",
        (f"{ORDER}test_flags_are_released_and_acquired[combine-90]",),
    ),
    Mutant(
        "no-barrier-before-the-flag",
        f"{_KERNELS}/wire.py",
        "        tl.debug_barrier()\n        tl.inline_asm_elementwise(\n            _SIGNAL",
        "        tl.inline_asm_elementwise(\n            _SIGNAL",
        (f"{ORDER}test_all_threads_have_stored_before_one_of_them_sets_the_flag[combine-90]",),
    ),
    Mutant(
        "counts-sends-before-the-previous-kernel-has-ended",
        f"{_KERNELS}/counts.py",
        "    wire.wait_for_previous_kernel(PDL)\n",
        "",
        (f"{ORDER}test_nothing_goes_to_a_peer_before_the_previous_kernel_has_ended[counts-EP2-90]",),
    ),
    Mutant(
        "dispatch-waits-for-the-previous-kernel-on-one-path",
        f"{_KERNELS}/dispatch.py",
        "    wire.wait_for_previous_kernel(PDL)\n",
        "    if num_supplied > 0:\n        wire.wait_for_previous_kernel(PDL)\n",
        (f"{ORDER}test_nothing_goes_to_a_peer_before_the_previous_kernel_has_ended[dispatch-multicast-90]",),
    ),
    Mutant(
        "combine-sends-before-the-previous-kernel-has-ended",
        f"{_KERNELS}/combine.py",
        "    wire.wait_for_previous_kernel(PDL)\n",
        "    wire.send(nearest_ptr, num_valid, num_tokens, first_row, round_number, lanes < 1, buffer_ptr, WORDS)\n"
        "    wire.wait_for_previous_kernel(PDL)\n",
        (f"{ORDER}test_nothing_goes_to_a_peer_before_the_previous_kernel_has_ended[combine-90]",),
    ),
    Mutant(
        "counts-reads-the-step-before-the-previous-kernel-has-ended",
        f"{_KERNELS}/counts.py",
        "    wire.wait_for_previous_kernel(PDL)\n    wire.let_next_kernel_start(PDL)\n"
        "    record = wire.read_record(buffer_ptr)\n"
        "    step_pointer = wire.field(counters_ptr, wire.STEP_OFFSET, tl.int32)\n    step = tl.load(step_pointer) + 1\n",
        "    step_pointer = wire.field(counters_ptr, wire.STEP_OFFSET, tl.int32)\n    step = tl.load(step_pointer) + 1\n"
        "    wire.wait_for_previous_kernel(PDL)\n    wire.let_next_kernel_start(PDL)\n"
        "    record = wire.read_record(buffer_ptr)\n",
        (f"{ORDER}test_the_counter_and_the_step_are_read_after_the_previous_kernel_has_ended[counts-EP72-90]",),
    ),
    Mutant(
        "dispatch-reads-the-round-before-the-previous-kernel-has-ended",
        f"{_KERNELS}/dispatch.py",
        "    wire.wait_for_previous_kernel(PDL)\n",
        "    programs += wire.read_round(counters_ptr)\n    wire.wait_for_previous_kernel(PDL)\n",
        (f"{ORDER}test_the_counter_and_the_step_are_read_after_the_previous_kernel_has_ended[dispatch-90]",),
    ),
    Mutant(
        "every-thread-takes-a-ticket",
        f"{_KERNELS}/wire_ptx.py",
        "setp.eq.u32 %p0, %t, 0; mov.u64 $0, 0;",
        "setp.ge.u32 %p0, %t, 0; mov.u64 $0, 0;",
        (f"{ORDER}test_one_thread_takes_the_ticket_and_all_have_loaded_the_round_by_then[combine-90]",),
    ),
    Mutant(
        "every-warp-takes-a-ticket",
        f"{_KERNELS}/wire_ptx.py",
        'TAKE_TICKET = f"""{{ .reg .pred %p0; .reg .u32 %t; mov.u32 %t, %tid.x;',
        'TAKE_TICKET = f"""{{ .reg .pred %p0; .reg .u32 %t; mov.u32 %t, %laneid;',
        (f"{ORDER}test_one_thread_takes_the_ticket_and_all_have_loaded_the_round_by_then[combine-90]",),
    ),
    Mutant(
        "every-program-ends-the-round",
        f"{_KERNELS}/wire_ptx.py",
        " setp.eq.and.u32 %p0, %t, $3, %p0;",
        "",
        (f"{ORDER}test_the_holder_of_the_last_ticket_ends_the_round_and_nobody_else[combine-90]",),
    ),
    Mutant(
        "no-barrier-before-the-ticket",
        f"{_KERNELS}/wire.py",
        "        tl.debug_barrier()\n        return tl.inline_asm_elementwise(_TAKE_TICKET",
        "        return tl.inline_asm_elementwise(_TAKE_TICKET",
        (f"{ORDER}test_one_thread_takes_the_ticket_and_all_have_loaded_the_round_by_then[combine-16-warps-90]",),
    ),
    Mutant(
        "packets-are-polled-in-the-cache",
        f"{_KERNELS}/wire_ptx.py",
        "W: ld.relaxed.sys.global{_vector(words)}, [$4];",
        "W: ld.global{_vector(words)}, [$4];",
        (f"{ORDER}test_whatever_waits_for_a_peer_polls_past_the_caches[combine-90]",),
    ),
    Mutant(
        "waits-look-at-the-abort-record-in-the-cache",
        f"{_KERNELS}/wire_ptx.py",
        "ld.relaxed.sys.global.v2.u64 {{%rec, %w}}, [{control}];",
        "ld.global.v2.u64 {{%rec, %w}}, [{control}];",
        (f"{ORDER}test_whatever_waits_for_a_peer_looks_at_the_control_block_past_the_caches[dispatch-90]",),
    ),
    Mutant(
        "waits-do-not-leave-because-of-an-abort-record",
        f"{_KERNELS}/wire_ptx.py",
        "setp.ne.u64 %p0, %rec, 0; @%p0 bra LEFT;\n      cvt",
        "cvt",
        (f"{ORDER}test_whatever_waits_for_a_peer_looks_at_the_control_block_past_the_caches[dispatch-90]",),
    ),
    Mutant(
        "packets-are-sent-by-plain-stores",
        f"{_KERNELS}/wire_ptx.py",
        'return _store(words, "st.relaxed.sys.global")',
        'return _store(words, "st.global")',
        (f"{ORDER}test_packets_are_sent_past_the_caches[dispatch-90]",),
    ),
    Mutant(
        "compiled-poll-leaves-the-packet-in-its-slot",
        f"{_KERNELS}/wire_ptx.py",
        "GOT: mov.u32 %i, {SENTINEL:#x}; st.relaxed.sys.global{restore};",
        "GOT:",
        (f"{ORDER}test_a_packet_that_was_polled_leaves_the_sentinel_in_its_place[dispatch-90]",),
    ),
    Mutant(
        "float8-rows-are-divided-roughly",
        f"{_KERNELS}/wire_float8.py",
        "return tl.where(remainder == 0, first, quotient)",
        "return first",
        ("tests/test_experts_compile.py::test_rows_are_quantized_by_rounded_divisions",),
    ),
)
"""Read from the compiled kernels."""
