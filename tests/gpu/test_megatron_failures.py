"""A peer that dies, is late or raises ends the step of Megatron's own engine on two GPUs: in replayed graphs, eagerly, and in
dummy steps. Where the peer lives the engine is restarted, and its tokens are those of an engine without a fault."""

from pathlib import Path

import pytest

from engine_failures import Outcome, Trial, run_unsupervised
from engine_harness import missing

pytestmark = [pytest.mark.gpu(count=2), pytest.mark.timeout(200), pytest.mark.skipif(bool(missing()), reason=missing())]

SLACK_S = 2.0
RUN_S = 180.0
DEADLY = [
    Trial(dispatcher, "dies", graph_scope=scope, idle=idle)
    for dispatcher in ("nvls", "nccl")
    for scope in ("block", "none")
    for idle in (False, True)
]
DEADLY += [
    Trial("nvls", "dies", graph_scope="layer"),
    Trial("nvls", "dies", graph_scope="block", options={"async_scheduling": True}),
]
MENDED = [Trial(dispatcher, fault, graph_scope="block") for dispatcher in ("nvls", "nccl") for fault in ("late", "raises")]


def run(trial: Trial, folder: Path) -> list[Outcome | None]:
    return run_unsupervised(trial, folder, "nccl", {"NO_VCS_VERSION": "1"}, RUN_S)


def assert_rank_1_is_named_in_time(trial: Trial, outcome: Outcome | None) -> None:
    assert outcome is not None, "rank 0 did not end"
    assert outcome.error in ("PeerTimeoutError", "PeerFailedError"), outcome
    assert outcome.blamed == 1, outcome
    assert outcome.waited_s < trial.timeout_s + SLACK_S, outcome


@pytest.mark.parametrize("trial", DEADLY, ids=str)
def test_a_peer_that_is_gone_ends_the_step_in_time(trial: Trial, tmp_path: Path) -> None:
    assert_rank_1_is_named_in_time(trial, run(trial, tmp_path)[0])


@pytest.fixture(scope="module")
def tokens_without_a_fault(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    outcomes = run(Trial("nccl", "nothing", graph_scope="block"), tmp_path_factory.mktemp("healthy"))
    return [[] if outcome is None else outcome.tokens for outcome in outcomes]


@pytest.mark.parametrize("trial", MENDED, ids=str)
def test_after_a_restart_the_requests_are_finished(trial: Trial, tmp_path: Path, tokens_without_a_fault: list[list[int]]) -> None:
    """Expected: as many tokens as asked for, and those from before the fault are the right ones. What follows is computed from a
    prefill in the place of decode steps, whose roundings may differ."""
    outcomes = run(trial, tmp_path)
    assert_rank_1_is_named_in_time(trial, outcomes[0])
    for outcome, wanted in zip(outcomes, tokens_without_a_fault, strict=True):
        assert outcome is not None
        assert len(outcome.tokens) == len(wanted) > 0
        assert outcome.tokens[:5] == wanted[:5]
