"""Seeded changes of kernels and host logic that the tests must notice: `run_mutants.py` makes each in a copy of the tree.

Each stands for a rule that was once broken, or could be without any test failing: an access that no longer orders others, a
missing barrier, another order of a sum. Interpreted kernels run one program in one thread, so that rules about threads are read
from the compiled PTX. Where the code changes, its mutant follows; `tests/test_mutants.py` fails if the text is no longer there.
"""

from __future__ import annotations

from dataclasses import dataclass

ORDER = "tests/test_kernel_order.py::"
SYMMETRIC = "tests/interpreter/test_symmetric.py::test_named_cases_give_the_bits_of_the_reference"
SUMS = "tests/interpreter/test_order_of_sums.py::test_terms_are_rounded_and_summed_in_rank_order"
GLOO = "tests/ranks/test_dispatch_combine.py::test_bits_as_reference"
EXAMPLES = "tests/interpreter/test_examples.py::"


@dataclass(frozen=True)
class Mutant:
    """One change that must make a test fail.

    Attributes:
        name: what is wrong afterwards.
        path: the file, from the root of the tree.
        find: its text there, exactly once; whole lines where the change is more than a word.
        replace: what stands there instead.
        tests: pytest's names of tests, of which at least one must fail. All pass before the change.
    """

    name: str
    path: str
    find: str
    replace: str
    tests: tuple[str, ...]

    def mutated(self, text: str) -> str:
        """The file's text with the change. Raises LookupError if `find` is not there exactly once, or changes nothing."""
        count = text.count(self.find)
        if count != 1 or self.replace == self.find:
            raise LookupError(f"{self.name}: {self.path} has its text {count} times, not once: {self.find!r}")
        return text.replace(self.find, self.replace)


_KERNELS = "src/tokenferry/kernels"
_TRANSPORTS = "src/tokenferry/transports"

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
        "W: ld.acquire.sys.global.b64 %v, [$1];",
        "W: ld.relaxed.sys.global.b64 %v, [$1];",
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
        f"{_KERNELS}/expert_math.py",
        "return tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)).to(tl.float8e4nv), scale",
        "return (x / scale[:, None]).to(tl.float8e4nv), scale",
        ("tests/test_experts_compile.py::test_rows_are_quantized_by_rounded_divisions",),
    ),
)
"""Read from the compiled kernels."""

OF_KERNELS = (
    Mutant(
        "one-parity-of-counts",
        f"{_KERNELS}/counts.py",
        "packets = wire.COUNT_PACKETS_OFFSET + (step & 1) * size * wire.COUNT_PACKET_BYTES",
        "packets = wire.COUNT_PACKETS_OFFSET + (step & 0) * size * wire.COUNT_PACKET_BYTES",
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
        "            for source in range(sources):\n",
        "            for place_in_sum in range(sources):\n"
        "                source = tl.where(place_in_sum == 0, 0, sources - place_in_sum)\n",
        (f"{SUMS}[p2p-order-T2]",),
    ),
    Mutant(
        "kernel-drops-the-rounding-of-the-owners-term",
        f"{_KERNELS}/combine.py",
        "                l0, h0 = wire.unpack(w0, WIRE)\n",
        "                l0, h0 = wire.unpack(w0, WIRE)\n"
        "                if PARTIAL.primitive_bitwidth == 32 and WIRE.primitive_bitwidth == 16 and WORDS == 4:\n"
        "                    exact = partial_ptr + (first_own_element + index * PER_PACKET) * 4\n"
        "                    e, f, g, h = wire.load(exact, live, 4)\n"
        "                    l0 = tl.where(source == rank, e.to(tl.float32, bitcast=True), l0)\n",
        (f"{SUMS}[p2p-rounding-T2]",),
    ),
    Mutant(
        "kernel-keeps-the-ids-of-padding-rows",
        f"{_KERNELS}/dispatch.py",
        "(row >= tl.minimum(num_supplied, num_real))",
        "(row >= num_supplied)",
        (f"{EXAMPLES}test_dispatch_and_combine_kernel",),
    ),
    Mutant(
        "kernel-keeps-the-ids-of-rows-not-supplied",
        f"{_KERNELS}/dispatch.py",
        "present = row < num_supplied",
        "present = row < num_supplied + 1",
        (f"{EXAMPLES}test_rows_that_are_not_supplied_are_never_read",),
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
        "kernels.dispatch if view.size > 1 else kernels.dispatch_alone",
        "kernels.dispatch",
        ("tests/interpreter/test_solo.py::test_solo_gives_its_own_rows_and_writes_to_no_peer[nvls-rank0of2-T3]",),
    ),
)
"""Of interpreted kernels, and what launches them."""

OF_HOST_LOGIC = (
    Mutant(
        "reference-sums-in-another-order",
        "src/tokenferry/reference.py",
        "    for term in terms[1:]:\n",
        "    for term in reversed(terms[1:]):\n",
        ("tests/test_reference.py::test_the_order_is_the_ranks",),
    ),
    Mutant(
        "collective-sums-in-another-order",
        f"{_TRANSPORTS}/collective/transport.py",
        "terms = [term[: self._num_supplied] for term in combine.terms]",
        "terms = [term[: self._num_supplied] for term in combine.terms[::-1]]",
        (f"{SUMS}[collective-order-T2]",),
    ),
    Mutant(
        "collective-drops-the-rounding-of-the-owners-term",
        f"{_TRANSPORTS}/collective/transport.py",
        "outgoing[rank] if peer == rank else",
        "partial.split(self._counts)[rank] if peer == rank else",
        (f"{GLOO}[EP2-fp32-partials-bf16-wire]",),
    ),
    Mutant(
        "local-drops-the-rounding-of-the-owners-term",
        f"{_TRANSPORTS}/local.py",
        "term = partial[: self._num_supplied].to(self._settings.combine_dtype)",
        "term = partial[: self._num_supplied]",
        ("tests/test_core.py::test_a_rank_alone_rounds_its_term_too[local]",),
    ),
    Mutant(
        "collective-takes-equal-counts-for-granted",
        f"{_TRANSPORTS}/collective/transport.py",
        "own_rows = self._counts[rank]",
        "own_rows = self._counts[0]",
        (f"{GLOO}[EP4-K1-E5-uneven-experts]",),
    ),
    Mutant(
        "host-keeps-the-ids-of-padding-rows",
        f"{_TRANSPORTS}/base.py",
        "        masked[num_real_tokens:] = -1\n",
        "",
        (f"{GLOO}[EP2-padding-int]",),
    ),
    Mutant(
        "rows-not-supplied-go-to-expert-0",
        "src/tokenferry/reference.py",
        "pad(topk_idx, (0, 0, 0, missing), value=-1)",
        "pad(topk_idx, (0, 0, 0, missing), value=0)",
        ("tests/test_core.py::test_fewer_rows_than_announced_travel_with_rows_of_no_expert[collective]",),
    ),
    Mutant(
        "the-last-ranks-hold-the-extra-experts",
        "src/tokenferry/groups.py",
        "return range(start, start + share + (rank < extra))",
        "return range(start, start + share + (rank >= self.size - extra))",
        ("tests/test_core.py::test_experts_lie_in_blocks_the_first_ranks_hold_one_more",),
    ),
    Mutant(
        "kernels-import-one-another",
        f"{_KERNELS}/abort.py",
        "from tokenferry.kernels import wire\n",
        "from tokenferry.kernels import counts, wire  # noqa: F401\n",
        ("tests/test_layering.py::test_kernels_import_only_wire_from_one_another",),
    ),
    Mutant(
        "dispatch-twice-is-allowed",
        "src/tokenferry/lifecycle.py",
        "        if self.stage is not expected:\n",
        '        if self.stage is not expected and operation != "dispatch_begin":\n',
        ("tests/test_core.py::test_misuse_names_the_argument_and_the_remedy[local-dispatch-twice]",),
    ),
    Mutant(
        "combine-twice-is-allowed",
        "src/tokenferry/lifecycle.py",
        '        elif operation == "combine_begin":\n            self.handle = None\n',
        "",
        ("tests/test_core.py::test_misuse_names_the_argument_and_the_remedy[collective-combined-twice]",),
    ),
    Mutant(
        "reset-keeps-the-generation",
        "src/tokenferry/workspace.py",
        "        old, generation = self._settings, self._settings.generation + 1\n",
        "        old, generation = self._settings, self._settings.generation\n",
        ("tests/ranks/test_graphs.py::test_a_runner_from_before_a_reset_is_refused_and_captures_again",),
    ),
    Mutant(
        "last-word-wins-in-the-store",
        "src/tokenferry/channel.py",
        "return json.loads(self._store.set_if_absent(name, json.dumps(value)))",
        "self._store.set(name, json.dumps(value)); return value",
        ("tests/test_core.py::test_the_first_to_claim_a_name_keeps_it",),
    ),
    Mutant(
        "a-lost-store-raises-torchs-error",
        "src/tokenferry/channel.py",
        "        except RuntimeError as error:  # torch's store errors",
        "        except KeyError as error:  # torch's store errors",
        ("tests/test_channel.py::test_a_lost_store_is_its_hosts_failure[peek]",),
    ),
    Mutant(
        "a-peer-that-left-with-the-stores-host-is-blamed",
        f"{_TRANSPORTS}/settling.py",
        "        blamed = lost.rank\n",
        "        blamed = record.rank\n",
        ("tests/test_channel.py::test_what_a_rank_settles_on_without_the_store[peer-gone]",),
    ),
    Mutant(
        "the-watchdog-ends-without-a-word",
        f"{_TRANSPORTS}/collective/watchdog.py",
        "            self._give_up(CommunicationError(self._communicator.rank, 0.0, told))\n",
        "",
        ("tests/test_watchdog.py::test_an_exception_of_its_own_aborts_and_is_told[the-event-raises]",),
    ),
    Mutant(
        "a-bucket-must-be-larger-than-the-step",
        "src/tokenferry/graphs.py",
        "if bucket >= num_tokens), None)",
        "if bucket > num_tokens), None)",
        ("tests/test_graphs.py::test_the_smallest_bucket_that_fits",),
    ),
    Mutant(
        "a-rank-chooses-its-bucket-alone-on-the-collective-transport",
        "src/tokenferry/graphs.py",
        "largest = num_tokens if announced is None else max(announced.tokens_per_rank)",
        "largest = num_tokens",
        ("tests/ranks/test_graphs.py::test_all_16_combinations_of_eager_two_graphs_and_idle",),
    ),
    Mutant(
        "scratch-that-graphs-still-use-is-dropped",
        "src/tokenferry/experts/scratch.py",
        "                self._retired.append(self._memory)\n",
        "                pass\n",
        ("tests/test_scratch.py::test_a_scratch_that_grows_keeps_the_block_that_graphs_write_to",),
    ),
    Mutant(
        "groups-are-dropped-with-zeros",
        "src/tokenferry/router.py",
        "masked_fill(dropped_TG.unsqueeze(-1), -math.inf)",
        "masked_fill(dropped_TG.unsqueeze(-1), 0.0)",
        ("tests/test_router.py::test_a_dropped_group_loses_also_to_negative_scores",),
    ),
    Mutant(
        "ranks-stop-when-one-is-done",
        f"{_TRANSPORTS}/collective/transport.py",
        "all(header.flags & FLAG_DONE for header in headers)",
        "any(header.flags & FLAG_DONE for header in headers)",
        ("tests/ranks/test_graphs.py::test_an_idle_rank_that_is_not_done_keeps_the_others",),
    ),
)
"""Of plain PyTorch and Python."""

MUTANTS = (*OF_PTX, *OF_KERNELS, *OF_HOST_LOGIC)
