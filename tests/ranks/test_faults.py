"""Late, dead, raising and one-step-off ranks on gloo: the right error on every live rank in time, then reset and go on."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import tokenferry as tf
from fault_runs import Run, assert_named_in_time, assert_nothing_left, run_faults
from faults import CONFIG, CULPRIT, DEADLY, FAULTS, Fault, Setting, one_step
from patience import PATIENT_S, SLACK_S
from supervisors import ENDS, assert_ended, end_while_ranks_work
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.ranks

SETTING = Setting("collective", right_steps=100)
FLOAT8 = Setting("collective", right_steps=20, float8=True)
GROUPS = [
    pytest.param((2, SETTING), id="2", marks=pytest.mark.long),
    pytest.param((3, SETTING), id="3"),
    pytest.param((3, FLOAT8), id="3-float8", marks=pytest.mark.long),
]


def open_workspace(group: tf.EPGroup) -> tf.Workspace:
    return tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="collective", timeout_s=PATIENT_S)


@pytest.fixture(scope="module", params=GROUPS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    world_size, setting = request.param
    return run_faults(setting, world_size, [fault.name for fault in FAULTS], tmp_path_factory.mktemp("faults"), 120)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_rank_blames_the_culprit_in_time_and_goes_on(run: Run, fault: Fault) -> None:
    assert_named_in_time(run, fault)


def test_neither_processes_nor_shared_memory_are_left(run: Run) -> None:
    assert_nothing_left(run)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("fault", DEADLY, ids=lambda fault: fault.name)
def test_a_killed_rank_is_named_at_once_and_the_others_go_on(fault: Fault, group: tuple[int, Setting], tmp_path: Path) -> None:
    world_size, setting = group
    run = run_faults(setting, world_size, [fault.name], tmp_path, 60)
    assert_named_in_time(run, fault)
    assert {outcome.error for outcome in run.outcomes[fault.name].values()} == {"PeerFailedError"}
    assert_nothing_left(run)


def no_more() -> None:
    raise ValueError("no more")


def leave_by_exception(group: tf.EPGroup) -> str:
    try:
        with open_workspace(group) as ws:
            dispatchers = [ws.dispatcher()]
            one_step(ws, dispatchers, 0, no_more if group.rank == CULPRIT else None)
    except (tf.PeerError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_an_exception_that_leaves_the_workspace_reaches_the_peers_with_its_text() -> None:
    said = run_ranks(leave_by_exception, 2)
    assert said[1] == "ValueError: no more"
    assert said[0].startswith("PeerFailedError: rank 1 failed in step 1: ValueError: no more")


def gives_up_as_the_second(group: tf.EPGroup) -> tuple[str, float]:
    """Rank 0 gives rank 1 up, then rank 2 does, whose connection to rank 0 is gone by then. Rank 1 comes when both are out."""
    with open_workspace(group) as ws:
        ws.set_timeout((1.0, PATIENT_S, 3.0)[group.rank])
        group.channel.barrier("all are open", PATIENT_S)
        if group.rank == CULPRIT:
            group.channel.barrier("the others are out", PATIENT_S)
        start = time.monotonic()
        with pytest.raises(tf.PeerError) as caught:
            ws.begin_step(1)
        waited_s = time.monotonic() - start
        if group.rank != CULPRIT:
            group.channel.barrier("the others are out", PATIENT_S)
        return f"{type(caught.value).__name__} {caught.value.rank}", waited_s


def test_a_rank_is_given_up_in_time_by_the_second_that_does_so_too() -> None:
    (first, first_s), _, (second, second_s) = run_ranks(gives_up_as_the_second, 3, timeout_s=2 * PATIENT_S)
    assert (first, second) == ("PeerTimeoutError 1", "PeerTimeoutError 1")
    assert first_s < 1.0 + SLACK_S
    assert second_s < 3.0 + SLACK_S


def one_never_opens(group: tf.EPGroup, transport: str) -> str:
    group.channel.barrier("all have started", PATIENT_S)
    if group.rank == CULPRIT:
        group.channel.barrier("the others have given up", PATIENT_S)
        return ""
    with pytest.raises(tf.PeerTimeoutError) as caught:
        tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport=transport, open_timeout_s=2)
    group.channel.barrier("the others have given up", PATIENT_S)
    return f"{caught.value.rank} {caught.value.phase}"


@pytest.mark.parametrize("transport", ["collective", "p2p"])
def test_a_rank_that_does_not_open_is_named(transport: str) -> None:
    assert run_ranks(one_never_opens, 3, transport, env={"TRITON_INTERPRET": "1"}) == ["1 open", "", "1 open"]


def one_is_slow_to_open(group: tf.EPGroup) -> list[int]:
    if group.rank == CULPRIT:
        time.sleep(2)
    config = {"max_tokens_per_rank": 8, "transport": "collective", "timeout_s": 0.5, "open_timeout_s": PATIENT_S}
    with tf.Workspace(CONFIG, group, **config) as ws:
        ws.set_timeout(PATIENT_S)
        tokens = ws.begin_step(group.rank + 1).tokens_per_rank.tolist()
        ws.check()
        return tokens


def test_a_rank_that_loads_for_longer_than_timeout_s_is_waited_for_while_opening() -> None:
    assert run_ranks(one_is_slow_to_open, 3) == [[1, 2, 3]] * 3


def one_cannot_open(group: tf.EPGroup) -> str:
    from tokenferry.transports import opening

    if group.rank == CULPRIT:

        def refuse(*_: object) -> None:
            raise torch.cuda.OutOfMemoryError("no memory left")

        opening.CollectiveTransport = refuse
    with pytest.raises(tf.TransportUnavailableError) as caught:
        tf.Workspace(CONFIG, group, max_tokens_per_rank=8, open_timeout_s=PATIENT_S)
    return str(caught.value)


def test_a_rank_that_cannot_open_is_named_on_all_ranks() -> None:
    said = run_ranks(one_cannot_open, 2)
    assert all("could not be opened on rank 1: OutOfMemoryError: no memory left" in text for text in said)


def reset_without_a_rank(group: tf.EPGroup) -> str:
    with open_workspace(group) as ws:
        dispatchers = [ws.dispatcher()]
        if group.rank == CULPRIT:
            ws.fail("gives up")
            group.channel.barrier("the other has left its reset", PATIENT_S)
        else:
            with pytest.raises(tf.PeerFailedError):
                one_step(ws, dispatchers, 0)
        try:
            ws.reset(timeout_s=1)
        except tf.PeerTimeoutError as error:
            phase = error.phase
        if group.rank != CULPRIT:
            group.channel.barrier("the other has left its reset", PATIENT_S)
        ws.reset(timeout_s=PATIENT_S)
        return f"{phase} {one_step(ws, dispatchers, 1)}"


def test_a_reset_that_a_rank_misses_can_be_tried_again() -> None:
    assert run_ranks(reset_without_a_rank, 2) == ["reset True", "reset True"]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("how", ENDS)
def test_no_descendant_and_no_memory_outlive_a_run_that_ends_amid_steps(how: str, tmp_path: Path) -> None:
    assert_ended(end_while_ranks_work(replace(SETTING, timeout_s=PATIENT_S), how, tmp_path), how)


# --- two workspaces of one group ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoWorkspaces:
    """Rank 0 begins a step in the first workspace, rank 1 in the one that `second` says, `later_s` after it, or when it has been
    given up."""

    name: str
    second: int
    later_s: float
    told: tuple[tuple[str, str], ...]
    """For each rank the kind of the error, and a part of its text."""
    is_late: bool = False


def swapped(rank: int, there: int) -> tuple[str, str]:
    return (
        "PeerFailedError",
        f"the ranks disagree in step 1: rank {rank} is alive, but it waits in workspace.{there} after step 0, while rank "
        f"{1 - rank} waits in workspace.{1 - there} after step 0",
    )


OTHER_ORDER = [
    TwoWorkspaces("at-once", 1, 0.0, (swapped(1, 1), swapped(0, 0))),
    TwoWorkspaces("one-half-a-time-out-later", 1, 0.5, (swapped(1, 1), swapped(0, 0))),
    TwoWorkspaces(
        "only-late",
        0,
        0.0,
        (("PeerTimeoutError", "rank 1 is late: not-entered in step 1"), ("PeerFailedError", "")),
        is_late=True,
    ),
]


def begin_in_two(group: tf.EPGroup, transport: str) -> list[tuple[str, str]]:
    return [_begin_in_two(group.subset(range(2)), transport, case) for case in OTHER_ORDER]


def _begin_in_two(group: tf.EPGroup, transport: str, case: TwoWorkspaces) -> tuple[str, str]:
    config = {"max_tokens_per_rank": 8, "transport": transport, "timeout_s": 2.0}
    with tf.Workspace(CONFIG, group, **config) as first, tf.Workspace(CONFIG, group, **config) as second:
        group.channel.barrier("both are open", PATIENT_S)
        mine = (first, second)[case.second if group.rank == 1 else 0]
        if case.is_late and group.rank == 1:
            group.channel.barrier("rank 0 has been told", PATIENT_S)
        time.sleep(case.later_s if group.rank == 1 else 0.0)
        try:
            mine.begin_step(1)
        except tf.PeerError as error:
            said = type(error).__name__, str(error)
        else:
            said = "nothing", ""
        if case.is_late and group.rank == 0:
            group.channel.barrier("rank 0 has been told", PATIENT_S)
        group.channel.barrier("both have been told", PATIENT_S)
        return said


@pytest.fixture(scope="module", params=["collective", "p2p"])
def told_in_two(request: pytest.FixtureRequest) -> list[list[tuple[str, str]]]:
    return run_ranks(begin_in_two, 2, request.param, env={"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("case", OTHER_ORDER, ids=lambda case: case.name)
def test_workspaces_used_in_another_order(case: TwoWorkspaces, told_in_two: list[list[tuple[str, str]]]) -> None:
    for said, (kind, text) in zip(told_in_two, case.told, strict=True):
        assert said[OTHER_ORDER.index(case)][0] == kind
        assert text in said[OTHER_ORDER.index(case)][1]
