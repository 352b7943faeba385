"""A peer that dies, is late or raises ends the step of Megatron's own engine on two GPUs: in replayed graphs, eagerly, and in
dummy steps. Where the peer lives the engine is restarted, and its tokens are those of an engine without a fault."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine_failures import Outcome, Trial, environment, run_unsupervised
from engine_harness import missing
from patience import SLACK_S

pytestmark = [pytest.mark.gpu(count=2), pytest.mark.timeout(400), pytest.mark.skipif(bool(missing()), reason=missing())]

RUN_S = 120.0
AT_ONCE = 4
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


HEALTHY = Trial("nccl", "nothing", graph_scope="block")
Outcomes = Mapping[str, list[Outcome | None]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of all trials, some at once: they wait more than they work. One takes half a minute, most of it until it begins."""
    trials = [HEALTHY, *DEADLY, *MENDED]
    folders = [tmp_path_factory.mktemp(str(trial)) for trial in trials]
    with environment(NO_VCS_VERSION="1"), ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda trial, folder: run_unsupervised(trial, folder, "nccl", RUN_S), trials, folders)
        return dict(zip(map(str, trials), found, strict=True))


def assert_rank_1_is_named_in_time(trial: Trial, outcome: Outcome | None) -> None:
    assert outcome is not None, "rank 0 did not end"
    assert outcome.error in ("PeerTimeoutError", "PeerFailedError"), outcome
    assert outcome.blamed == 1, outcome
    assert outcome.waited_s < trial.timeout_s + SLACK_S, outcome


@pytest.mark.parametrize("trial", DEADLY, ids=str)
def test_a_peer_that_is_gone_ends_the_step_in_time(trial: Trial, outcomes: Outcomes) -> None:
    assert_rank_1_is_named_in_time(trial, outcomes[str(trial)][0])


@pytest.mark.parametrize("trial", MENDED, ids=str)
def test_after_a_restart_the_requests_are_finished(trial: Trial, outcomes: Outcomes) -> None:
    """Expected: as many tokens as asked for, and those from before the fault are the right ones. What follows is computed from a
    prefill in the place of decode steps, whose roundings may differ."""
    assert_rank_1_is_named_in_time(trial, outcomes[str(trial)][0])
    for outcome, healthy in zip(outcomes[str(trial)], outcomes[str(HEALTHY)], strict=True):
        assert outcome is not None
        assert healthy is not None
        assert len(outcome.tokens) == len(healthy.tokens) > 0
        assert outcome.tokens[:5] == healthy.tokens[:5]
