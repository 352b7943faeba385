"""Closing amid a call, exceptions out of a transport, failed resets, leaving a `with` block: what a workspace says afterwards."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tokenferry as tf
from bad_calls import CONFIG, STAGES, Scene, T, finish, open_workspace, play
from tokenferry import workspace as workspace_module
from tokenferry.errors import PeerFailedError, StateError
from tokenferry.graphs import GraphRunner
from tokenferry.lifecycle import Lease, WrongCallerError
from tokenferry.testing.data import make_inputs


@pytest.fixture(params=["local", "collective"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


def scene_of(transport: str) -> Scene:
    ws = open_workspace(transport)
    return Scene(ws, ws.dispatcher(), ws.dispatcher(), make_inputs(CONFIG, [T], seed=7, payload="hostile")[0])


@dataclass(frozen=True)
class Operation:
    """A call, the stage that it is right at, the stage after it, and the transport's method behind it."""

    name: str
    stage: str
    after: str
    call: Callable[[Scene], Any]
    method: str

    def __str__(self) -> str:
        return self.name


def keep(scene: Scene, got: tf.Dispatched) -> None:
    scene.got = got


OPERATIONS = [
    Operation("begin_step", "opened", "stepped", lambda s: s.ws.begin_step(T), "begin_step"),
    Operation("dispatch", "stepped", "dispatched", lambda s: keep(s, s.dispatcher.dispatch(*s.rows)), "dispatch"),
    Operation("dispatch_begin", "stepped", "dispatching", lambda s: s.dispatcher.dispatch_begin(*s.rows), "dispatch_begin"),
    Operation("dispatch_end", "dispatching", "dispatched", lambda s: keep(s, s.dispatcher.dispatch_end()), "dispatch_end"),
    Operation("combine", "dispatched", "combined", lambda s: s.dispatcher.combine(s.inputs.partial, s.got), "combine"),
    Operation(
        "combine_begin", "dispatched", "combining", lambda s: s.dispatcher.combine_begin(s.inputs.partial, s.got), "combine_begin"
    ),
    Operation("combine_end", "combining", "combined", lambda s: s.dispatcher.combine_end(), "combine_end"),
]
CHECK = Operation("check", "dispatched", "dispatched", lambda s: s.ws.check(), "check")
FAIL = Operation("fail", "dispatched", "dispatched", lambda s: s.ws.fail("a watchdog"), "fail")
BY_NAME = {operation.name: operation for operation in OPERATIONS}


class Between:
    """A transport that does something before, or after, its `operation`, and notes which methods were called."""

    def __init__(self, transport: Any, operation: str, do: Callable[[], None], *, before: bool) -> None:
        self.__dict__.update(_transport=transport, _operation=operation, _do=do, _before=before, calls=[], said=[])

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._transport, name, value)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._transport, name)
        if not callable(value):
            return value

        def call(*args: Any) -> Any:
            if name == self._operation and self._before:
                self._do()
            result = value(*args)
            self.calls.append(name)
            if name == "fail":
                self.said.append(args[0])
            if name == self._operation and not self._before:
                self._do()
            return result

        return call


def interpose(scene: Scene, operation: Operation, do: Callable[[], None], *, before: bool) -> Between:
    scene.ws._transport = between = Between(scene.ws._transport, operation.method, do, before=before)
    return between


def on_another_thread(call: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result(10)


class Surprise(BaseException):
    """Of no library, and no Exception either, as Ctrl-C is none."""


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def surprise() -> None:
    raise Surprise("out of nowhere")


def no_connection() -> None:
    raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")


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


# --- exceptions out of a transport ------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.parametrize("raises", [out_of_memory, surprise])
def test_an_exception_before_anything_was_launched_changes_nothing(
    operation: Operation, raises: Callable[[], None], transport: str
) -> None:
    scene = scene_of(transport)
    play(scene, operation.stage)
    original = scene.ws._transport
    between = interpose(scene, operation, raises, before=True)
    with pytest.raises((torch.OutOfMemoryError, Surprise)):
        operation.call(scene)
    assert between.said == []
    scene.ws._transport = original
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
    transport, said = scene.ws._transport, []
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


def test_every_stage_has_an_operation() -> None:
    assert {operation.stage for operation in OPERATIONS} == set(STAGES) - {"combined", "closed"}
