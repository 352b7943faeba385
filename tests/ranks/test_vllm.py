"""The manager for vLLM between rank processes on gloo, in a small vLLM: the bits of plain gathers."""

import pytest
import torch

from tokenferry.testing import run_ranks
from vllm_quantized_work import run_float8_terms, run_forms_of_scales, run_quantized
from vllm_work import (
    run_a_release_that_copies_sums,
    run_against_plain_gathers,
    run_asynchronous_failure,
    run_draft_model,
    run_failing_step,
    run_fallbacks,
    run_idle_worker,
    run_logits,
    run_new_kinds_after_the_profile_run,
    run_other_counts_in_a_forward,
    run_slow_warm_up,
    run_worker_beside_other_managers,
)

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("into_output", [False, True], ids=["combine", "combine-into-output"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("ep", [2, 3])
def test_same_bits_as_plain_gathers(ep: int, dtype: torch.dtype, into_output: bool) -> None:
    """One step a forward of two layers, with ranks that have no rows."""
    for transport, steps, forwards in run_ranks(run_against_plain_gathers, ep, "auto", dtype, into_output):
        assert (transport, steps) == ("collective", forwards)


@pytest.mark.interpreter
@pytest.mark.parametrize("into_output", [False, True], ids=["combine", "combine-into-output"])
def test_same_bits_on_the_symmetric_kernels(into_output: bool) -> None:
    environment = {"TRITON_INTERPRET": "1"}
    outcomes = run_ranks(run_against_plain_gathers, 2, "p2p", torch.bfloat16, into_output, env=environment, timeout_s=120.0)
    assert [outcome[0] for outcome in outcomes] == ["p2p", "p2p"]


def test_sums_go_into_vllms_output_where_it_would_copy_them() -> None:
    """As 0.26 does, with its own exchange too."""
    assert run_ranks(run_a_release_that_copies_sums, 2) == [[False, True, False, True]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_router_logits_arrive_unchanged(dtype: torch.dtype) -> None:
    run_ranks(run_logits, 2, dtype)


def test_what_cannot_be_carried_goes_to_vllms_own_gathers_with_a_line_in_the_log() -> None:
    words = {
        "sequence parallel": "sequence parallelism",
        "LoRA mappings": "LoRA mappings",
        "LoRA mappings of float8 rows": "",
        "one scale of each rank's rows": "scales of quantized rows",
        "complex rows": "hidden rows of torch.complex64",
        "double weights": "weights or logits of torch.float64",
        "logits with LoRA mappings": "",
    }
    for outcome in run_ranks(run_fallbacks, 2):
        assert outcome.keys() == words.keys()
        for name, (calls, lines) in outcome.items():
            assert calls == ["dispatch_router_logits" if name.startswith("logits") else "dispatch", "combine"]
            assert len(lines) == bool(words[name]), f"{name}: a line for a reason, once"
            assert all(words[name] in line for line in lines)


def test_ranks_agree_whether_a_scale_is_one_rows_or_all_rows() -> None:
    """A rank with a single row cannot tell by itself, and once went another way than the others."""
    for found in run_ranks(run_forms_of_scales, 2):
        assert found[:-1] == ["theirs", "theirs", "theirs", "ours", "ours", "ours", "ours", "theirs", "theirs"]
        assert "with scales of shape [1, 1], and such rows had scales of their own before" in found[-1]


@pytest.mark.parametrize("logits", [False, True], ids=["experts", "logits"])
@pytest.mark.parametrize(
    ("name", "row_format"),
    [
        ("fp8 with a scale for 128 columns", "fp8_block128"),
        ("fp8 with a scale for 32 columns", "bytes of 72"),
        ("fp8 with a scale for a row", "bytes of 80"),
        ("fp8 with one scale for all", "bytes of 64"),
        ("int8", "bytes of 64"),
        ("packed fp4", "bytes of 40"),
    ],
)
def test_quantized_rows_and_their_scales_arrive_unchanged(name: str, row_format: str, logits: bool) -> None:
    assert run_ranks(run_quantized, 2, "auto", name, logits) == [("collective", row_format)] * 2


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["fp8 with a scale for 128 columns", "fp8 with a scale for a row"])
def test_quantized_rows_on_the_symmetric_kernels(name: str) -> None:
    outcomes = run_ranks(run_quantized, 2, "p2p", name, False, env={"TRITON_INTERPRET": "1"}, timeout_s=180.0)
    assert [outcome[0] for outcome in outcomes] == ["p2p", "p2p"]


@pytest.mark.parametrize("transport", ["collective", pytest.param("p2p", marks=pytest.mark.interpreter)])
def test_terms_travel_as_float8_where_the_settings_say_so(transport: str) -> None:
    env = {"TRITON_INTERPRET": "1"} if transport == "p2p" else {}
    assert run_ranks(run_float8_terms, 2, transport, env=env, timeout_s=180.0) == [(transport, "torch.float8_e4m3fn")] * 2


def test_a_draft_models_forwards_are_steps_of_their_own() -> None:
    assert run_ranks(run_draft_model, 2) == [[1, 2, 3, 4]] * 2


def test_other_counts_within_a_forward_begin_another_step() -> None:
    assert run_ranks(run_other_counts_in_a_forward, 2) == [2, 2]


@pytest.mark.parametrize("from_tensor", [False, True], ids=["host", "device"])
def test_rows_that_are_no_requests_reach_no_expert(from_tensor: bool) -> None:
    for seen in run_ranks(run_idle_worker, 2, from_tensor):
        nobodys = [[all(number == -1 for number in row) for row in ids] for ids in seen]
        padding, drafts, outside = [False, True, True], [False, False, True], [False, False, False]
        assert nobodys == [padding, drafts, outside], "a draft model's forwards bring other rows than the batch's"


def test_a_worker_warns_if_tokenferry_is_on_and_not_used() -> None:
    (outcome,) = run_ranks(run_worker_beside_other_managers, 1)
    assert outcome["ours"] == outcome["another, off"] == []
    (line,) = outcome["another"]
    assert line.startswith("tokenferry is switched on, but nothing goes through it")


def test_a_rank_that_compiles_is_waited_for_and_one_that_is_late_is_not() -> None:
    first, second = run_ranks(run_slow_warm_up, 2)
    assert first == ["memory", "warm-up", "PeerTimeoutError for rank 1"]
    assert second[:2] == ["memory", "warm-up"]


def test_a_rank_whose_step_fails_is_named_by_the_others() -> None:
    first, second = run_ranks(run_failing_step, 2)
    assert second == "ValueError: out of pages"
    assert first.startswith("PeerFailedError") and "rank 1" in first and "out of pages" in first, first


def test_tokens_of_an_asynchronous_step_are_not_given_out_where_a_peer_failed_in_it() -> None:
    first, _ = run_ranks(run_asynchronous_failure, 2)
    assert first == ["first", "1: out of pages"]


def test_rows_of_a_new_kind_are_vllms_own_once_it_has_counted_its_memory() -> None:
    theirs = ["dispatch", "combine"]
    assert run_ranks(run_new_kinds_after_the_profile_run, 2) == [[[], [], theirs, [], []]] * 2
