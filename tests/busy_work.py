"""A rank that is busy for longer than the time-out, on any transport: what its peers see."""

import gc
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import tokenferry as tf
from faults import CAPACITY, CONFIG, one_step, stop_until
from patience import PATIENT_S, SLACK_S

BUSY, PATIENT = 1, 0
"""The rank that is busy, and one that waits for it."""
TIMEOUT_S, BUSY_TIMEOUTS, SHORT_OPEN_TIMEOUT_S = 1.5, 2, 3.0
OUT = "the patient rank is out"


@dataclass(frozen=True)
class Told:
    """What a rank saw: the error's class and blamed rank, its text, and how long it waited."""

    error: str = ""
    rank: int = -1
    text: str = ""
    waited_s: float = 0.0
    right: bool = False


def open_workspace(group: tf.EPGroup, transport: str, open_timeout_s: float = 60.0) -> tf.Workspace:
    return tf.Workspace(
        CONFIG, group, max_tokens_per_rank=CAPACITY, transport=transport, timeout_s=TIMEOUT_S, open_timeout_s=open_timeout_s
    )


def first_step(ws: tf.Workspace, dispatchers: list[tf.Dispatcher]) -> bool:
    """With a limit that a machine with other work keeps too: what is slow in the first step is not what is tested."""
    ws.set_timeout(PATIENT_S)
    try:
        return one_step(ws, dispatchers, 0)
    finally:
        ws.set_timeout(TIMEOUT_S)


def step_as_told(ws: tf.Workspace, dispatchers: list[tf.Dispatcher]) -> Told:
    started_s = time.monotonic()
    try:
        right = one_step(ws, dispatchers, 3)
    except tf.PeerError as error:
        return Told(type(error).__name__, error.rank, str(error), time.monotonic() - started_s)
    return Told(waited_s=time.monotonic() - started_s, right=right)


def until_out(group: tf.EPGroup, told: Told) -> Told:
    """Tells rank 1, which waits for it, that rank 0 is out of the step."""
    if group.rank == PATIENT:
        group.channel.barrier(OUT, PATIENT_S)
    return told


def waits_for_a_busy_rank(group: tf.EPGroup, transport: str, busy_s: float) -> Told:
    """Rank 1 is busy for `busy_s` before a step."""
    with open_workspace(group, transport) as ws:
        dispatchers = [ws.dispatcher() for _ in range(2)]
        assert first_step(ws, dispatchers)
        if group.rank == BUSY:
            with ws.busy("compiling"), ws.busy("capturing 3 graphs"):
                time.sleep(busy_s)
        return step_as_told(ws, dispatchers)


def waits_amid_a_layer(group: tf.EPGroup, transport: str, busy_s: float) -> Told:
    """Rank 1 is busy for `busy_s` between a dispatch and its combine."""
    with open_workspace(group, transport) as ws:
        dispatchers = [ws.dispatcher()]
        assert first_step(ws, dispatchers)

        def be_busy() -> None:
            with ws.busy("compiling experts"):
                time.sleep(busy_s)

        started_s = time.monotonic()
        right = one_step(ws, dispatchers, 3, be_busy if group.rank == BUSY else None)
        return Told(waited_s=time.monotonic() - started_s, right=right)


def busy_rank_stops(group: tf.EPGroup, transport: str) -> Told:
    """Rank 1's process is stopped while it is busy, after it was busy for more than a time-out."""
    with open_workspace(group, transport) as ws:
        dispatchers = [ws.dispatcher()]
        assert first_step(ws, dispatchers)
        with tempfile.TemporaryDirectory() as folder:
            is_out = Path(group.channel.exchange("folder", folder, PATIENT_S)[BUSY], "out")
            if group.rank == BUSY:
                with ws.busy("compiling"):
                    time.sleep(2 * TIMEOUT_S)
                    stop_until([is_out], 2 * SLACK_S)
            told = step_as_told(ws, dispatchers)
            if group.rank == PATIENT:
                is_out.touch()
            ws.set_timeout(PATIENT_S)
            ws.reset(timeout_s=PATIENT_S)
            assert one_step(ws, dispatchers, 1)
        return told


def busy_without_end(group: tf.EPGroup, transport: str) -> Told:
    """Rank 1 stays busy for longer than `open_timeout_s`."""
    with open_workspace(group, transport, open_timeout_s=SHORT_OPEN_TIMEOUT_S) as ws:
        dispatchers = [ws.dispatcher()]
        assert first_step(ws, dispatchers)
        if group.rank == BUSY:
            with ws.busy("waiting for the moon"):
                group.channel.barrier(OUT, PATIENT_S)
        return until_out(group, step_as_told(ws, dispatchers))


def busy_no_longer(group: tf.EPGroup, transport: str) -> Told:
    """Rank 1 was busy, and then is late without a word."""
    with open_workspace(group, transport) as ws:
        dispatchers = [ws.dispatcher()]
        assert first_step(ws, dispatchers)
        if group.rank == BUSY:
            with ws.busy("compiling"):
                time.sleep(TIMEOUT_S / 2)
            group.channel.barrier(OUT, PATIENT_S)
        return until_out(group, step_as_told(ws, dispatchers))


def waits_after_a_reset(group: tf.EPGroup, transport: str, busy_s: float) -> Told:
    """As `waits_for_a_busy_rank`, after a reset whose own limit was shorter than that."""
    with open_workspace(group, transport) as ws:
        group.channel.barrier("both are open", PATIENT_S)
        ws.reset(timeout_s=busy_s - TIMEOUT_S)
        dispatchers = [ws.dispatcher()]
        if group.rank == BUSY:
            with ws.busy("compiling"):
                time.sleep(busy_s)
        return step_as_told(ws, dispatchers)


def waits_while_busy(group: tf.EPGroup, transport: str) -> Told:
    """Rank 0 waits within a block of its own for rank 1, which is late without a word."""
    with open_workspace(group, transport) as ws:
        dispatchers = [ws.dispatcher()]
        assert first_step(ws, dispatchers)
        if group.rank == BUSY:
            group.channel.barrier(OUT, PATIENT_S)
            return step_as_told(ws, dispatchers)
        with ws.busy("warming up"):
            return until_out(group, step_as_told(ws, dispatchers))


def limit_is_changed(group: tf.EPGroup, transport: str, old_s: float, timeout_s: float, late_s: float) -> Told:
    """Rank 0 changes its limit when it waits already, by another thread; rank 1 is late without being busy, by so many seconds,
    or with 0 until rank 0 is out."""
    with open_workspace(group, transport) as ws:
        dispatchers = [ws.dispatcher()]
        assert first_step(ws, dispatchers)
        if group.rank == BUSY:
            ws.set_timeout(PATIENT_S)
            time.sleep(late_s)
            if not late_s:
                group.channel.barrier(OUT, PATIENT_S)
        else:
            ws.set_timeout(old_s)
            timer = threading.Timer(0.25, ws.set_timeout, (timeout_s,))
            timer.start()
        told = step_as_told(ws, dispatchers)
        if not late_s:
            until_out(group, told)
        assert ws.timeout_s == (PATIENT_S if group.rank == BUSY else timeout_s)
        return told


def is_gone_once_dropped(group: tf.EPGroup, transport: str) -> bool:
    """Of a workspace that was busy, with nobody who collects cycles."""
    ws = open_workspace(group, transport)
    with ws.busy("compiling"):
        time.sleep(0.1)
    parts = [weakref.ref(ws), weakref.ref(ws._transport)]
    gc.disable()
    try:
        del ws
        return all(part() is None for part in parts)
    finally:
        gc.enable()


def wrong_use(group: tf.EPGroup) -> None:
    """What `busy` and `set_timeout` refuse, on an open workspace and on a closed one."""
    with open_workspace(group, "local") as ws:
        with pytest.raises(tf.UsageError, match="reason must be of type str, got int"), ws.busy(3):  # type: ignore[arg-type]
            pass
        for wrong in (0, "30", True, float("nan")):
            with pytest.raises(tf.ConfigError, match="timeout_s must be positive"):
                ws.set_timeout(wrong)  # type: ignore[arg-type]
        assert ws.timeout_s == TIMEOUT_S
    with pytest.raises(tf.StateError, match="busy: the workspace is closed"), ws.busy("compiling"):
        pass
    with pytest.raises(tf.StateError, match="set_timeout: the workspace is closed"):
        ws.set_timeout(3.0)


# --- what must be seen --------------------------------------------------------------------------------------------------


def goes_on(told: list[Told]) -> None:
    """Nobody was given up, and the rows are right."""
    assert [each.error for each in told] == [""] * len(told), told
    assert all(each.right for each in told)
    assert told[PATIENT].waited_s > BUSY_TIMEOUTS * TIMEOUT_S - 1


def given_up(told: Told, at_least_s: float, at_most_s: float, reason: str = "") -> None:
    """The busy rank was, in this time, and with its reason if it was busy to the last."""
    assert (told.error, told.rank) == ("PeerTimeoutError", BUSY), told
    assert at_least_s < told.waited_s < at_most_s, told
    assert (f"rank 1 was busy with {reason!r} for " in told.text) if reason else ("busy" not in told.text), told


def given_up_a_time_out_after_its_last_sign(told: list[Told]) -> None:
    """The last sign came after two time-outs."""
    given_up(told[PATIENT], 3 * TIMEOUT_S - 0.4, 3 * TIMEOUT_S + SLACK_S, "compiling")
    assert told[BUSY].error == "PeerFailedError"


def given_up_after_open_timeout(told: list[Told]) -> None:
    """Though its signs went on."""
    given_up(told[PATIENT], SHORT_OPEN_TIMEOUT_S - 0.1, SHORT_OPEN_TIMEOUT_S + SLACK_S, "waiting for the moon")


def given_up_as_ever(told: list[Told]) -> None:
    """Nothing is said of what the rank was busy with before."""
    given_up(told[PATIENT], 0.0, 2 * TIMEOUT_S + SLACK_S)


def given_up_before_the_old_limit(told: list[Told]) -> None:
    """The new one is the shorter."""
    given_up(told[PATIENT], 0.0, SLACK_S)


def is_waited_for(told: list[Told]) -> None:
    """Though it is later than the old limit."""
    assert [each.error for each in told] == ["", ""], told


@dataclass(frozen=True)
class Scenario:
    """Two ranks or more, what they do after the transport's name, and what must have been seen."""

    name: str
    worker: Callable[..., Told]
    check: Callable[[list[Told]], None]
    args: tuple[float, ...] = ()
    world_size: int = 2


SCENARIOS = (
    Scenario("busy-before-a-step", waits_for_a_busy_rank, goes_on, (BUSY_TIMEOUTS * TIMEOUT_S,)),
    Scenario("busy-amid-a-layer", waits_amid_a_layer, goes_on, (BUSY_TIMEOUTS * TIMEOUT_S,)),
    Scenario("stopped-while-busy", busy_rank_stops, given_up_a_time_out_after_its_last_sign),
    Scenario("busy-without-end", busy_without_end, given_up_after_open_timeout),
    Scenario("busy-no-longer", busy_no_longer, given_up_as_ever),
    Scenario("waits-while-busy-itself", waits_while_busy, given_up_as_ever),
    Scenario("limit-is-raised-amid-a-wait", limit_is_changed, is_waited_for, (2.0, PATIENT_S, 3.0)),
    Scenario("limit-is-lowered-amid-a-wait", limit_is_changed, given_up_before_the_old_limit, (PATIENT_S, 0.5, 0.0)),
)
OF_THREE = (
    Scenario("busy-before-a-step-EP3", waits_for_a_busy_rank, goes_on, (BUSY_TIMEOUTS * TIMEOUT_S,), 3),
    Scenario("busy-amid-a-layer-EP3", waits_amid_a_layer, goes_on, (BUSY_TIMEOUTS * TIMEOUT_S,), 3),
)
"""Rank 0 also waits for rank 2, which waits for the busy one itself."""
