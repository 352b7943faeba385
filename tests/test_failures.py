"""Exceptions out of a transport, failed resets, leaving a `with` block: what a workspace says afterwards."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokenferry as tf
from bad_calls import Scene, T, finish, play
from exchangeable import exchangeable
from operations import (
    BY_NAME,
    CHECK,
    FAIL,
    OPERATIONS,
    Operation,
    Surprise,
    interpose,
    on_another_thread,
    out_of_memory,
    scene_of,
    surprise,
)
from tokenferry import workspace as workspace_module
from tokenferry.errors import PeerFailedError, StateError
from tokenferry.graphs import GraphRunner
from tokenferry.lifecycle import WrongCallerError


@pytest.fixture(params=["local", "collective"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


# --- exceptions out of a transport ------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.parametrize("raises", [out_of_memory, surprise])
def test_an_exception_before_anything_was_launched_changes_nothing(
    operation: Operation, raises: Callable[[], None], transport: str
) -> None:
    scene = scene_of(transport)
    play(scene, operation.stage)
    place = exchangeable(scene.ws)
    original = place.inner
    between = interpose(scene, operation, raises, before=True)
    with pytest.raises((torch.OutOfMemoryError, Surprise)):
        operation.call(scene)
    assert between.said == []
    place.inner = original
    operation.call(scene)
    finish(scene, operation.after)
    scene.ws.close()


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.parametrize("raises", [out_of_memory, surprise])
def test_an_exception_after_something_was_launched_breaks_the_workspace_and_is_told(
    operation: Operation, raises: Callable[[], None]
) -> None:
    scene = scene_of("collective")
    play(scene, operation.stage)
    between = interpose(scene, operation, raises, before=False)
    with pytest.raises((torch.OutOfMemoryError, Surprise)) as caught:
        operation.call(scene)
    told = f"{operation.name} raised {type(caught.value).__name__}: {caught.value}"
    assert between.said == [told]
    broken = f"the workspace is broken since {told}; call reset"
    calls = [(other.name, other.call) for other in (*OPERATIONS, CHECK)]
    for name, call in (*calls, ("announce", lambda s: s.ws.announce(T)), ("solo", lambda s: s.ws.solo().__enter__())):
        if name in ("combine", "combine_begin"):
            scene.got = None
        with pytest.raises(StateError) as said:
            call(scene)
        assert str(said.value).startswith(broken), name
    scene.ws.reset()
    finish(scene, "opened")
    scene.ws.close()


def test_a_failed_announcement_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_of("collective")
    transport, said = exchangeable(scene.ws).inner, []
    monkeypatch.setattr(transport, "fail", said.append)
    monkeypatch.setattr(transport._communicator, "exchange_headers", lambda _: out_of_memory())
    with pytest.raises(torch.OutOfMemoryError):
        scene.ws.announce(T)
    assert said == ["announce raised OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"]
    with pytest.raises(StateError, match="broken since announce raised"):
        scene.ws.begin_step(T)


def test_an_announced_number_is_not_forgotten_by_a_wrong_begin_step() -> None:
    scene = scene_of("collective")
    scene.ws.announce(T)
    for _ in range(2):
        with pytest.raises(StateError, match=f"{T} tokens were announced but {T - 1} come"):
            scene.ws.begin_step(T - 1)
    finish(scene, "opened")
    scene.ws.close()


def test_a_graph_whose_launch_raises_breaks_the_workspace() -> None:
    scene = scene_of("collective")
    with pytest.raises(torch.OutOfMemoryError), scene.ws.replaying():
        out_of_memory()
    with pytest.raises(StateError, match="broken since replaying raised OutOfMemoryError"):
        scene.ws.begin_step(T)


def test_a_broken_workspace_does_not_keep_the_tensors_of_the_call_that_broke_it() -> None:
    scene = scene_of("collective")
    play(scene, "dispatched")
    interpose(scene, BY_NAME["combine"], out_of_memory, before=False)
    with pytest.raises(torch.OutOfMemoryError):
        scene.dispatcher.combine(scene.inputs.partial, scene.got)
    error = scene.ws.lifecycle.error
    assert error is not None
    for _ in range(2):
        with pytest.raises(StateError):
            scene.ws.check()
    assert error.__traceback__ is error.__cause__ is error.__context__ is None


# --- failed resets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raises", [out_of_memory, surprise])
@pytest.mark.parametrize("where", ["StepTensors", "open_together", "Operators"])
def test_a_reset_that_fails_leaves_a_broken_workspace_which_another_reset_mends(
    raises: Callable[[], None], where: str, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = scene_of(transport)
    play(scene, "stepped")
    with monkeypatch.context() as patched:
        patched.setattr(workspace_module, where, lambda *_: raises())
        with pytest.raises((torch.OutOfMemoryError, Surprise)):
            scene.ws.reset()
    for operation in (*OPERATIONS, CHECK):
        with pytest.raises(StateError, match="the workspace is broken since reset raised"):
            operation.call(scene)
    with pytest.raises(StateError, match="no step has begun"):
        _ = scene.ws.step
    scene.ws.fail("says nothing more")
    scene.ws.reset()
    finish(scene, "opened")
    scene.ws.close()


# --- the user's exception wins ----------------------------------------------------------------------------------------


def no_driver() -> None:
    raise RuntimeError("the driver is gone")


@pytest.mark.parametrize("method", ["fail", "close"])
def test_leaving_a_with_block_by_an_exception_raises_that_one_and_closes(method: str, transport: str) -> None:
    scene = scene_of(transport)
    lost = Operation(method, "opened", "opened", lambda s: None, method)
    between = interpose(scene, lost, no_driver, before=True)
    with pytest.raises(ValueError, match="the user's own"), scene.ws:
        raise ValueError("the user's own")
    assert scene.ws.lifecycle.closed
    assert method == "close" or between.calls == ["close"]


def test_a_with_block_that_ends_well_says_what_closing_raised() -> None:
    scene = scene_of("local")
    interpose(scene, Operation("close", "opened", "opened", lambda s: None, "close"), no_driver, before=True)
    with pytest.raises(RuntimeError, match="the driver is gone"), scene.ws:
        pass


class TwoRanks:
    """A group that says that there are two, so that a failure has somebody to be told to."""

    def __init__(self, group: tf.EPGroup) -> None:
        self._group, self.size = group, 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def runner_of(scene: Scene, fn: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> GraphRunner:
    runner = GraphRunner(scene.ws, fn, [T], inputs=[torch.zeros(1, 2)])
    monkeypatch.setattr(type(scene.ws), "group", property(lambda ws: TwoRanks(ws._settings.group)))
    return runner


def test_a_graph_runner_raises_the_forwards_error_where_the_peers_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(_: torch.Tensor) -> torch.Tensor:
        raise ValueError("the user's own")

    scene = scene_of("collective")
    runner = runner_of(scene, fn, monkeypatch)
    interpose(scene, FAIL, no_driver, before=True)
    with pytest.raises(ValueError, match="the user's own"):
        runner(torch.zeros(T, 2))
    with pytest.raises(PeerFailedError, match="ValueError: the user's own"):
        scene.ws.check()


def test_a_second_thread_in_a_graph_runner_is_refused_alone_and_the_peers_hear_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[BaseException] = []

    def fn(rows: torch.Tensor) -> torch.Tensor:  # between two calls on the workspace
        if threading.current_thread() is threading.main_thread():
            with pytest.raises(StateError) as caught:
                on_another_thread(lambda: runner(torch.zeros(T, 2)))
            said.append(caught.value)
        return rows + 1

    scene = scene_of("collective")
    runner = runner_of(scene, fn, monkeypatch)
    between = interpose(scene, FAIL, lambda: None, before=True)
    assert torch.equal(runner(torch.zeros(T, 2)), torch.ones(T, 2))
    assert [type(error) for error in said] == [WrongCallerError]
    assert "another thread" in str(said[0])
    assert between.said == []


def test_a_close_that_is_interrupted_while_it_waits_drops_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would: a second `close` does nothing."""
    scene = scene_of("collective")
    communicator, calls = exchangeable(scene.ws).inner._communicator, []

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(communicator, "let_launched_end", interrupted)
    monkeypatch.setattr(communicator, "abort", lambda: calls.append("abort"))
    with pytest.raises(KeyboardInterrupt):
        scene.ws.close()
    assert calls == ["abort"]
    monkeypatch.undo()
    communicator.abort()
