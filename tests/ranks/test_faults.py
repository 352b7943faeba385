"""Late, dead, raising and one-step-off ranks on gloo: the right error on every live rank in time, then reset and go on."""

import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch

import tokenferry as tf
from tokenferry.testing import run_ranks, same_bits
from tokenferry.testing.data import make_inputs

pytestmark = pytest.mark.ranks

TIMEOUT_S = 2.0
CULPRIT = 1
CONFIG = tf.MoEConfig(hidden_size=16, num_experts=8, topk=2)


@dataclass(frozen=True)
class Outcome:
    """What a rank saw."""

    error: str
    rank: int
    phase: str
    waited_s: float
    right_steps: int


def open_workspace(group: tf.EPGroup) -> tf.Workspace:
    return tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="collective", timeout_s=TIMEOUT_S)


def one_step(ws: tf.Workspace, dispatchers: list[tf.Dispatcher], seed: int, *, crash: BaseException | None = None) -> bool:
    """One step with a check of the bits; `crash` is raised between the first dispatch and its combine."""
    tokens = [(3 * rank + seed) % 5 for rank in range(ws.group.size)]
    ws.begin_step(tokens[ws.group.rank])
    right = True
    for layer, dispatcher in enumerate(dispatchers):
        inputs = make_inputs(CONFIG, tokens, seed=seed * 7 + layer)
        own = inputs[ws.group.rank]
        got = dispatcher.dispatch(own.hidden, own.topk_idx, own.topk_weights)
        if crash is not None:
            raise crash
        out = dispatcher.combine(own.partial, got)
        wanted = tf.reference.combine([i.partial for i in inputs], tokens, CONFIG.dtype, CONFIG.dtype)
        right &= same_bits(out, wanted[ws.group.rank])
    return right


def go_on(ws: tf.Workspace, dispatchers: list[tf.Dispatcher], group: tf.EPGroup) -> int:
    ws.reset(group=group, timeout_s=20)
    return sum(one_step(ws, dispatchers, seed) for seed in range(20))


def culprit_acts(fault: str, ws: tf.Workspace, dispatchers: list[tf.Dispatcher]) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stopped":
        resume_after(3 * TIMEOUT_S)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "late":
        time.sleep(3 * TIMEOUT_S)
    elif fault == "late-in-layer":
        ws.begin_step(1)
        time.sleep(3 * TIMEOUT_S)
    elif fault == "one-step-behind":
        one_step(ws, dispatchers[:1], 3)  # leaves out the second layer, and so comes to the next step too early
        ws.begin_step(0)
        return
    elif fault == "raises":
        try:
            one_step(ws, dispatchers, 3, crash=ValueError("out of luck"))
        except ValueError as error:
            ws.fail(f"ValueError: {error}")
    one_step(ws, dispatchers, 3)


def resume_after(seconds: float) -> None:
    """A child process that continues this one, which is about to be stopped."""
    pid = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        os._exit(0)


def suffer(group: tf.EPGroup, fault: str) -> Outcome | None:
    with open_workspace(group) as ws:
        dispatchers = [ws.dispatcher(), ws.dispatcher()]
        assert all(one_step(ws, dispatchers, seed) for seed in range(3))
        start = time.monotonic()
        try:
            if group.rank == CULPRIT:
                culprit_acts(fault, ws, dispatchers)
            else:
                one_step(ws, dispatchers, 3)
                ws.begin_step(0)
        except tf.PeerError as error:
            waited_s = time.monotonic() - start
            with pytest.raises(type(error)):
                ws.begin_step(1)  # it stays broken until the reset
            alive = [rank for rank in range(group.size) if fault != "killed" or rank != CULPRIT]
            survivors = group if len(alive) == group.size else group.subset(alive)
            right_steps = go_on(ws, dispatchers, survivors)
            return Outcome(type(error).__name__, error.rank, error.phase, waited_s, right_steps)
    return None


def suffer_and_tell(group: tf.EPGroup, fault: str, folder: str) -> None:
    """Writes what it saw to a file: the killed rank makes the run as a whole fail, which the test expects."""
    outcome = suffer(group, fault)
    with open(os.path.join(folder, f"{group.rank}"), "w") as file:
        file.write(repr(outcome))
    while len(os.listdir(folder)) < group.size - 1:  # the supervisor ends all ranks once one has failed for it
        time.sleep(0.01)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("fault", "error", "phase"),
    [
        ("late", "PeerTimeoutError", "not-entered"),
        ("stopped", "PeerTimeoutError", "not-entered"),
        ("late-in-layer", "PeerTimeoutError", "data-missing"),
        ("one-step-behind", "PeerFailedError", "counts-disagree"),
        ("raises", "PeerFailedError", "data-missing"),
    ],
)
def test_every_rank_blames_the_culprit_in_time_and_goes_on(fault: str, error: str, phase: str, world_size: int) -> None:
    outcomes = run_ranks(suffer, world_size, fault, timeout_s=90)
    for rank, outcome in enumerate(outcomes):
        assert outcome is not None
        assert outcome.right_steps == 20
        if fault == "one-step-behind" and world_size == 2:
            assert outcome.phase == phase  # two ranks at two places: which one is off is not for them to know
            continue
        assert outcome.rank == CULPRIT
        assert outcome.phase == phase
        assert outcome.error == ("PeerFailedError" if rank == CULPRIT else error)
        if rank != CULPRIT:
            assert outcome.waited_s < TIMEOUT_S + 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_killed_rank_is_named_at_once_and_the_others_go_on(world_size: int, tmp_path) -> None:
    """The supervisor would end the others 2 s after the death: they have gone on by then."""
    with pytest.raises(tf.RankFailedError, match="killed by SIGKILL") as caught:
        run_ranks(suffer_and_tell, world_size, "killed", str(tmp_path), timeout_s=60)
    assert caught.value.rank == CULPRIT
    told = {int(path.name): eval(path.read_text()) for path in tmp_path.iterdir()}
    assert sorted(told) == [rank for rank in range(world_size) if rank != CULPRIT]
    for outcome in told.values():
        assert (outcome.error, outcome.rank, outcome.right_steps) == ("PeerFailedError", CULPRIT, 20)
        assert outcome.waited_s < TIMEOUT_S + 2


def leave_by_exception(group: tf.EPGroup) -> str:
    try:
        with open_workspace(group) as ws:
            dispatchers = [ws.dispatcher()]
            one_step(ws, dispatchers, 0, crash=ValueError("no more") if group.rank == CULPRIT else None)
    except (tf.PeerError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_an_exception_that_leaves_the_workspace_reaches_the_peers_with_its_text() -> None:
    said = run_ranks(leave_by_exception, 2)
    assert said[1] == "ValueError: no more"
    assert said[0].startswith("PeerFailedError: rank 1 failed in step 1: ValueError: no more")


def one_never_opens(group: tf.EPGroup) -> str:
    if group.rank == CULPRIT:
        time.sleep(2)
        return ""
    with pytest.raises(tf.PeerTimeoutError) as caught:
        tf.Workspace(CONFIG, group, max_tokens_per_rank=8, open_timeout_s=1)
    return f"{caught.value.rank} {caught.value.phase}"


def test_a_rank_that_does_not_open_is_named() -> None:
    assert run_ranks(one_never_opens, 3) == ["1 open", "", "1 open"]


def one_cannot_open(group: tf.EPGroup) -> str:
    from tokenferry.transports import open as opening

    if group.rank == CULPRIT:

        def refuse(*_: object) -> None:
            raise torch.cuda.OutOfMemoryError("no memory left")

        opening.CollectiveTransport = refuse
    with pytest.raises(tf.TransportUnavailableError) as caught:
        tf.Workspace(CONFIG, group, max_tokens_per_rank=8, open_timeout_s=5)
    return str(caught.value)


def test_a_rank_that_cannot_open_is_named_on_all_ranks() -> None:
    said = run_ranks(one_cannot_open, 2)
    assert all("could not be opened on rank 1: OutOfMemoryError: no memory left" in text for text in said)


def reset_without_a_rank(group: tf.EPGroup) -> str:
    with open_workspace(group) as ws:
        dispatchers = [ws.dispatcher()]
        if group.rank == CULPRIT:
            ws.fail("gives up")
            time.sleep(2)  # comes to the reset after the others have left it
        else:
            with pytest.raises(tf.PeerFailedError):
                one_step(ws, dispatchers, 0)
        try:
            ws.reset(timeout_s=1)
        except tf.PeerTimeoutError as error:
            phase = error.phase
        ws.reset(timeout_s=20)
        return f"{phase} {one_step(ws, dispatchers, 1)}"


def test_a_reset_that_a_rank_misses_can_be_tried_again() -> None:
    assert run_ranks(reset_without_a_rank, 2) == ["reset True", "reset True"]
