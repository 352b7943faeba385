"""Seeded changes of plain PyTorch and Python."""

from __future__ import annotations

from verification.mutant import Mutant

SUMS = "tests/interpreter/test_order_of_sums.py::test_terms_are_rounded_and_summed_in_rank_order"
GLOO = "tests/ranks/test_dispatch_combine.py::test_bits_as_reference"
LIBRARY = "tests/ranks/test_library_calls.py"
_KERNELS = "src/tokenferry/kernels"
_TRANSPORTS = "src/tokenferry/transports"

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
        f"{_TRANSPORTS}/collective/rows.py",
        "sum_in_rank_order([self._term_of(term[:num_wanted]) for term in terms])",
        "sum_in_rank_order([self._term_of(term[:num_wanted]) for term in terms[::-1]])",
        (f"{SUMS}[collective-order-T2]",),
    ),
    Mutant(
        "collective-drops-the-rounding-of-the-owners-term",
        f"{_TRANSPORTS}/collective/transport.py",
        "self._combine = _Combine(pending, terms, outgoing[rank], rows)",
        "self._combine = _Combine(pending, terms, partial.split(self._counts)[rank], rows)",
        (f"{GLOO}[EP2-fp32-partials-bf16-wire]",),
    ),
    Mutant(
        "local-drops-the-rounding-of-the-owners-term",
        f"{_TRANSPORTS}/local.py",
        "term = in_combine_dtype(partial[: self._num_supplied], self._settings.combine_dtype)",
        "term = partial[: self._num_supplied]",
        ("tests/test_core.py::test_a_rank_alone_rounds_its_term_too[local]",),
    ),
    Mutant(
        "collective-takes-equal-counts-for-granted",
        f"{_TRANSPORTS}/collective/transport.py",
        "own_rows, hidden_size = self._counts[rank], rows.shape[1]",
        "own_rows, hidden_size = self._counts[0], rows.shape[1]",
        (f"{GLOO}[EP4-K1-E5-uneven-experts]",),
    ),
    Mutant(
        "the-library-rounds-sums-to-the-wires-dtype",
        f"{_TRANSPORTS}/collective/reducing.py",
        "settings.combine_dtype in (torch.float32, settings.result_dtype)",
        "settings.combine_dtype.is_floating_point",
        (f"{LIBRARY}::test_two_ranks_keep_the_bits_of_the_reference[a-sum-that-the-wire-would-round]",),
    ),
    Mutant(
        "the-library-sums-for-three-ranks",
        f"{_TRANSPORTS}/collective/reducing.py",
        "has_one_order = settings.group.size == 2",
        "has_one_order = settings.group.size >= 2",
        (f"{LIBRARY}::test_other_groups_sum_in_rank_order[EP3]",),
    ),
    Mutant(
        "own-routing-is-gathered-from-rank-0s-place",
        f"{_TRANSPORTS}/collective/transport.py",
        "self._first_row = own * request.num_tokens",
        "self._first_row = 0",
        (f"{GLOO}[EP2-equal-counts]",),
    ),
    Mutant(
        "a-whole-call-is-left-unwatched",
        f"{_TRANSPORTS}/collective/nccl.py",
        "self._watchdog.launched(call, on_stream=not overlaps)",
        "self._watchdog.launched(call, on_stream=False)",
        ("tests/test_nccl_calls.py::test_a_whole_call_is_one_launch_on_the_current_stream",),
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
        "weights-that-were-put-in-place-of-others-are-the-old-ones",
        "src/tokenferry/experts/module.py",
        '            or known.up_proj is not parts["up_proj"]\n',
        "",
        ("tests/test_experts_wrong_use.py::test_parameters_that_are_put_in_their_place_are_checked_too",),
    ),
    Mutant(
        "weights-are-checked-once-whatever-their-data-are",
        "src/tokenferry/experts/module.py",
        "checked = weights, weights.up_proj.shape, weights.down_proj.shape",
        "checked = weights, torch.Size(), torch.Size()",
        ("tests/test_experts_wrong_use.py::test_parameters_that_are_put_in_their_place_are_checked_too",),
    ),
    Mutant(
        "errors-of-fused-moe-have-the-experts-names",
        "src/tokenferry/integrations/megatron/fused_moe.py",
        "raise type(error)(_by_names_of_here(str(error))) from error",
        "raise",
        ("tests/test_quantized_experts.py::test_errors_of_fused_moe_name_its_own_arguments[no-scales]",),
    ),
    Mutant(
        "scratch-that-graphs-still-use-is-dropped",
        "src/tokenferry/experts/scratch.py",
        "                self._retired.append(self._memory)\n",
        "                pass\n",
        ("tests/test_scratch.py::test_a_scratch_that_grows_keeps_the_memory_that_graphs_write_to",),
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
