"""A peer that dies, is late or raises ends the step of Megatron's own engine: its eager path on CPUs, over gloo and over
interpreted kernels. Where the peer lives the engine is restarted and finishes with the tokens of one without a fault."""

from pathlib import Path

import pytest

import tokenferry as tf
from engine_failures import Outcome, Trial, environment, run_unsupervised
from engine_harness import ENVIRONMENT, missing
from patience import SLACK_S
from tokenferry.integrations.megatron import engine_hook
from tokenferry.testing import run_ranks

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.long,
    pytest.mark.timeout(150),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

RUN_S = 120.0
DEADLY = [
    Trial("nccl", "dies"),
    Trial("nvls", "dies", transport="p2p"),
    Trial("nvls", "dies", transport="p2p", idle=True),
]
MENDED = [
    Trial("nccl", "raises"),
    Trial("nvls", "late", transport="p2p"),
    Trial("nvls", "raises", transport="p2p", options={"async_scheduling": True}),
]


def run(trial: Trial, folder: Path) -> list[Outcome | None]:
    with environment(**ENVIRONMENT):
        return run_unsupervised(trial, folder, "gloo", RUN_S)


@pytest.fixture(scope="module")
def tokens_without_a_fault(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    outcomes = run(Trial("nccl", "nothing"), tmp_path_factory.mktemp("healthy"))
    return [[] if outcome is None else outcome.tokens for outcome in outcomes]


def assert_rank_1_is_named_in_time(trial: Trial, outcome: Outcome | None) -> None:
    assert outcome is not None, "rank 0 did not end"
    assert outcome.error in ("PeerTimeoutError", "PeerFailedError"), outcome
    assert outcome.blamed == 1, outcome
    assert outcome.waited_s < trial.timeout_s + SLACK_S, outcome


@pytest.mark.parametrize("trial", DEADLY, ids=str)
def test_a_peer_that_is_gone_ends_the_step_in_time(trial: Trial, tmp_path: Path) -> None:
    assert_rank_1_is_named_in_time(trial, run(trial, tmp_path)[0])


@pytest.mark.parametrize("trial", MENDED, ids=str)
def test_after_a_restart_the_requests_are_finished(trial: Trial, tmp_path: Path, tokens_without_a_fault: list[list[int]]) -> None:
    outcomes = run(trial, tmp_path)
    assert_rank_1_is_named_in_time(trial, outcomes[0])
    assert [outcome and outcome.tokens for outcome in outcomes] == tokens_without_a_fault
    assert all(tokens_without_a_fault)


def hook_and_undo(group: tf.EPGroup) -> tuple[int, bool]:
    from engine_harness import Ranks

    Ranks(group)
    owners = [engine_hook._class_at(path) for path, _ in engine_hook.WRAPS]
    before = [dict(vars(owner)) for owner in owners]
    hook = engine_hook.place_engine_hook()
    hook()
    return len(hook.replaced), [dict(vars(owner)) for owner in owners] == before


def test_every_method_that_is_wrapped_is_there_and_comes_back() -> None:
    assert run_ranks(hook_and_undo, 1, env=ENVIRONMENT) == [(len(engine_hook.WRAPS), True)]
