"""Closing amid a call, from another thread or a signal handler: what a workspace says afterwards, and when it gives back."""

from collections.abc import Callable
from typing import Any

import pytest

from bad_calls import STAGES, T, finish, play
from operations import (
    BY_NAME,
    CHECK,
    FAIL,
    OPERATIONS,
    SET_TIMEOUT,
    Operation,
    Surprise,
    interpose,
    no_connection,
    on_another_thread,
    scene_of,
    surprise,
)
from tokenferry import workspace as workspace_module
from tokenferry.errors import StateError
from tokenferry.lifecycle import Lease, WrongCallerError


@pytest.fixture(params=["local", "collective"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


# --- closing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [*OPERATIONS, CHECK, FAIL], ids=str)
@pytest.mark.parametrize("by", ["another-thread", "a-signal-handler"])
def test_closing_amid_a_call_gives_back_when_the_call_ends_and_stays(operation: Operation, by: str, transport: str) -> None:
    scene = scene_of(transport)
    play(scene, operation.stage)
    held: list[str] = []

    def close() -> None:
        on_another_thread(scene.ws.close) if by == "another-thread" else scene.ws.close()
        held.extend(between.calls)

    between = interpose(scene, operation, close, before=True)
    try:
        operation.call(scene)
    except StateError as error:
        assert "closed" in str(error)
    assert "abort" in held
    assert "close" not in held
    assert between.calls[-1] == "close"
    with pytest.raises(StateError, match="begin_step: the workspace is closed"):
        scene.ws.begin_step(T)
    scene.ws.close()
    assert between.calls.count("close") == 1


def test_a_signal_handler_may_close_amid_set_timeout(transport: str) -> None:
    """The thread would wait for itself, if it could not enter twice what keeps others out meanwhile."""
    scene = scene_of(transport)
    held: list[str] = []

    def close() -> None:
        scene.ws.close()
        held.extend(between.calls)

    between = interpose(scene, SET_TIMEOUT, close, before=True)
    SET_TIMEOUT.call(scene)
    assert held == ["abort"]
    assert between.calls == ["abort", "set_timeout", "close"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_time_out_that_is_set_during_another_threads_reset_holds(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_of("collective")
    open_together = workspace_module.open_together

    def opens(*args: Any) -> Any:
        if when == "before":
            on_another_thread(lambda: scene.ws.set_timeout(3.0))
        opened = open_together(*args)
        if when == "after":
            on_another_thread(lambda: scene.ws.set_timeout(3.0))
        return opened

    monkeypatch.setattr(workspace_module, "open_together", opens)
    scene.ws.reset()
    assert scene.ws.timeout_s == 3.0
    assert scene.ws.active_transport.innermost._communicator.timeout_s == 3.0
    finish(scene, "opened")


@pytest.mark.parametrize(("raises", "seen"), [(no_connection, StateError), (surprise, Surprise)], ids=["library", "ctrl-c"])
def test_what_a_library_says_of_connections_that_another_thread_has_dropped_is_said_in_our_words(
    raises: Callable[[], None], seen: type[BaseException]
) -> None:
    scene = scene_of("collective")
    play(scene, "stepped")

    def close_and_raise() -> None:
        on_another_thread(scene.ws.close)
        raises()

    interpose(scene, BY_NAME["dispatch"], close_and_raise, before=True)
    with pytest.raises(seen) as caught:
        scene.dispatcher.dispatch(*scene.rows)
    assert seen is Surprise or str(caught.value) == "dispatch: the workspace was closed by another thread meanwhile"


def test_closing_with_nobody_inside_aborts_nothing(transport: str) -> None:
    scene = scene_of(transport)
    between = interpose(scene, CHECK, lambda: None, before=True)
    scene.ws.close()
    assert between.calls == ["close"]


def test_a_reset_does_not_open_again_what_another_thread_has_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_of("collective")
    open_together = workspace_module.open_together

    def opens_while_closed(*args: Any) -> Any:
        opened = open_together(*args)
        on_another_thread(scene.ws.close)
        return opened

    monkeypatch.setattr(workspace_module, "open_together", opens_while_closed)
    with pytest.raises(StateError, match="reset: the workspace is closed"):
        scene.ws.reset()
    with pytest.raises(StateError, match="begin_step: the workspace is closed"):
        scene.ws.begin_step(T)


class Closes:
    """Counts."""

    def __init__(self) -> None:
        self.num_closes = 0

    def close(self) -> None:
        self.num_closes += 1

    def abort(self) -> None: ...
    def fail(self, reason: str) -> None: ...


def test_a_lease_closes_once_as_its_last_user_leaves() -> None:
    lease = Lease(held := Closes())
    with lease:
        with lease:
            lease.end()
            lease.end()
        assert held.num_closes == 0
        with pytest.raises(WrongCallerError, match="being closed or reset"), lease:
            pass
    assert held.num_closes == 1


def test_a_check_during_another_threads_reset_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_of("collective")
    said: list[str] = []
    open_together = workspace_module.open_together

    def look(*args: Any) -> Any:
        for call in (scene.ws.check, lambda: scene.ws.fail("a watchdog")):
            with pytest.raises(StateError) as caught:
                on_another_thread(call)
            said.append(str(caught.value))
        return open_together(*args)

    monkeypatch.setattr(workspace_module, "open_together", look)
    scene.ws.reset()
    assert all("being closed or reset, by another thread" in text for text in said), said
    finish(scene, "opened")
    scene.ws.close()


def test_every_stage_has_an_operation() -> None:
    assert {operation.stage for operation in OPERATIONS} == set(STAGES) - {"combined", "closed"}
