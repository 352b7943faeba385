"""Seeded changes of interpreted kernels, and of what launches them."""

from __future__ import annotations

from verification.mutant import Mutant

SYMMETRIC = "tests/interpreter/test_symmetric.py::test_named_cases_give_the_bits_of_the_reference"
SUMS = "tests/interpreter/test_order_of_sums.py::test_terms_are_rounded_and_summed_in_rank_order"
EXAMPLES = "tests/interpreter/test_examples.py::"
_KERNELS = "src/tokenferry/kernels"
_TRANSPORTS = "src/tokenferry/transports"

OF_KERNELS = (
    Mutant(
        "own-term-is-added-in-the-place-of-the-next-rank",
        f"{_KERNELS}/term_sum.py",
        "tl.where(rank == r, own,",
        "tl.where(rank + 1 == r, own,",
        ("tests/interpreter/test_collective_rows.py::test_terms_are_summed_as_by_operators[EP3-bf16-terms]",),
    ),
    Mutant(
        "two-bfloat16-terms-are-left-to-llvm",
        f"{_KERNELS}/term_sum.py",
        "if terms.dtype == tl.bfloat16:",
        "if terms.dtype == tl.float64:",
        (
            "tests/test_compile_kernels.py::test_terms_are_not_added_in_a_dtype_that_cannot_hold_them"
            "[torch.bfloat16-torch.float16]",
        ),
    ),
    Mutant(
        "ids-are-cut-off-to-32-bits",
        f"{_KERNELS}/own_routing.py",
        "(number == number.to(tl.int32).to(tl.int64)) & ",
        "",
        ("tests/interpreter/test_collective_rows.py::test_routing_is_written_as_by_operators[int64-to-int32]",),
    ),
    Mutant(
        "one-parity-of-counts",
        f"{_KERNELS}/counts.py",
        "packets = wire.COUNT_PACKETS_OFFSET + (step & 1) * size * wire.COUNT_PACKET_BYTES",
        "packets = wire.COUNT_PACKETS_OFFSET + (step & 0) * size * wire.COUNT_PACKET_BYTES",
        ("tests/interpreter/test_conformance.py::test_recorded_events_obey_the_rules_of_the_models[2]",),
    ),
    Mutant(
        "partial-rows-that-are-missing-are-read",
        f"{_KERNELS}/combine.py",
        "    num_tokens = tl.where(is_short, 0, num_tokens)\n",
        "",
        ("tests/interpreter/test_symmetric_failures.py::test_no_row_is_read_that_was_not_given[slots]",),
    ),
    Mutant(
        "one-missing-partial-row-is-not-noticed",
        f"{_KERNELS}/combine.py",
        "is_short = num_valid > num_partial",
        "is_short = num_valid > num_partial + 1",
        ("tests/interpreter/test_symmetric_failures.py::test_no_row_is_read_that_was_not_given[slots]",),
    ),
    Mutant(
        "peers-are-not-told-of-missing-partial-rows",
        f"{_KERNELS}/combine.py",
        "            for peer in range(size):\n                wire.claim_record(",
        "            for peer in range(rank, rank + 1):\n                wire.claim_record(",
        (
            "tests/interpreter/test_symmetric_failures.py::test_a_combine_of_too_few_rows_fails_on_all_ranks_and_names_its_own"
            "[slots-whole]",
        ),
    ),
    Mutant(
        "rounds-in-slots-are-counted",
        f"{_KERNELS}/combine.py",
        "        if is_counted:\n            wire.end_round",
        "        if size > 1:\n            wire.end_round",
        ("tests/interpreter/test_conformance.py::test_recorded_events_obey_the_rules_of_the_models[2]",),
    ),
    Mutant(
        "bulk-rounds-are-not-counted",
        f"{_KERNELS}/combine.py",
        "        if is_counted:\n            wire.end_round",
        "        if size == 0:\n            wire.end_round",
        ("tests/interpreter/test_conformance.py::test_recorded_events_obey_the_rules_of_the_models[2]",),
    ),
    Mutant(
        "interpreted-poll-leaves-the-packet-in-its-slot",
        f"{_KERNELS}/wire_interpreter.py",
        "                window[index[ready] + j] = SENTINEL\n",
        "",
        (f"{SYMMETRIC}[2]",),
    ),
    Mutant(
        "payload-of-the-sentinels-bits-is-not-escaped",
        f"{_KERNELS}/wire.py",
        "    return tl.minimum(word, tl.full([], _ESCAPED_SENTINEL, tl.uint32))",
        "    return word",
        (f"{EXAMPLES}test_no_payload_word_is_the_sentinel",),
    ),
    Mutant(
        "kernel-sums-in-another-order",
        f"{_KERNELS}/combine.py",
        "                for source in range(sources):\n",
        "                for place_in_sum in range(sources):\n"
        "                    source = tl.where(place_in_sum == 0, 0, sources - place_in_sum)\n",
        (f"{SUMS}[p2p-order-T2]",),
    ),
    Mutant(
        "kernel-drops-the-rounding-of-the-owners-term",
        f"{_KERNELS}/combine.py",
        "                    l0, h0 = wire.unpack(w0, WIRE)\n",
        "                    l0, h0 = wire.unpack(w0, WIRE)\n"
        "                    if PARTIAL.primitive_bitwidth == 32 and WIRE.primitive_bitwidth == 16 and WORDS == 4:\n"
        "                        exact = partial_ptr + (first_own_element + index * PER_PACKET) * 4\n"
        "                        e, f, g, h = wire.load(exact, live, 4)\n"
        "                        l0 = tl.where(source == rank, e.to(tl.float32, bitcast=True), l0)\n",
        (f"{SUMS}[p2p-rounding-T2]",),
    ),
    Mutant(
        "kernel-keeps-the-ids-of-padding-rows",
        f"{_KERNELS}/routing_packets.py",
        "(row >= tl.minimum(num_supplied, num_real))",
        "(row >= num_supplied)",
        (f"{EXAMPLES}test_dispatch_and_combine_kernel",),
    ),
    Mutant(
        "kernel-keeps-the-ids-of-rows-not-supplied",
        f"{_KERNELS}/routing_packets.py",
        "present = row < num_supplied",
        "present = row < num_supplied + 1",
        (f"{EXAMPLES}test_rows_that_are_not_supplied_are_never_read",),
    ),
    Mutant(
        "receivers-of-a-split-round-leave-out-a-block",
        f"{_KERNELS}/shares.py",
        "receiver = tl.where(is_split & receives, pid - senders, pid)",
        "receiver = tl.where(is_split & receives, pid - senders + 1, pid)",
        ("tests/interpreter/test_split_rounds.py::test_the_bits_of_the_reference[EP2-partial-bf16]",),
    ),
    Mutant(
        "ids-of-a-larger-step-stay-behind",
        f"{_KERNELS}/dispatch.py",
        "left_behind = (dirty_rows - valid) * (mode & wire.MODE_SEND) * K",
        "left_behind = (dirty_rows - valid) * 0",
        ("tests/interpreter/test_symmetric.py::test_ids_come_as_int64_if_asked_for",),
    ),
    Mutant(
        "experts-work-on-rows-beyond-the-valid-ones",
        f"{_KERNELS}/expert_table.py",
        "    total = tl.maximum(tl.minimum(valid - first_row, num_rows), 0) * K\n",
        "    total = num_rows * K\n",
        ("tests/interpreter/test_expert_examples.py::test_table_kernel",),
    ),
    Mutant(
        "experts-write-rows-beyond-the-valid-ones",
        f"{_KERNELS}/expert_sum.py",
        "    rows = tl.maximum(tl.minimum(tl.load(valid_tokens) - first_row, num_rows), 0)\n",
        "    rows = num_rows\n",
        ("tests/interpreter/test_expert_examples.py::test_sum_kernel",),
    ),
    Mutant(
        "last-abort-record-wins",
        f"{_KERNELS}/wire.py",
        'tl.atomic_cas(pointer, tl.full([], 0, tl.int64), record.to(tl.int64), sem="relaxed", scope="sys")',
        'tl.atomic_xchg(pointer, record.to(tl.int64), sem="relaxed", scope="sys")',
        (f"{EXAMPLES}test_abort_kernel_leaves_an_earlier_record",),
    ),
    Mutant(
        "router-tells-zeros-apart",
        f"{_KERNELS}/route.py",
        "bits = (value + 0.0).to(tl.int32, bitcast=True)",
        "bits = value.to(tl.int32, bitcast=True)",
        ("tests/interpreter/test_route_kernel.py::test_hostile_rows_get_valid_experts_each_once",),
    ),
    Mutant(
        "solo-multicasts",
        f"{_TRANSPORTS}/symmetric/bound_launches.py",
        "rows.dispatch_alone if view.size == 1 else rows.dispatch,",
        "rows.dispatch,",
        ("tests/interpreter/test_solo.py::test_solo_gives_its_own_rows_and_writes_to_no_peer[nvls-rank0of2-T3]",),
    ),
)
"""Of interpreted kernels, and what launches them."""
