"""An exception while a CUDA graph is captured, in one process: no peer hears of it, nothing waits, and the next step is as ever.

There is no CUDA here. `Workspace.capturing()` says by itself that a capture is under way; of one that the caller made with torch
alone, the stand-in for `torch.cuda.is_current_stream_capturing` says it. Real ones are in tests/gpu/test_failed_capture.py.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

import tokenferry as tf
from bad_calls import T, finish, play
from exchangeable import exchangeable
from operations import CHECK, FAIL, OPERATIONS, Operation, Surprise, interpose, scene_of, surprise
from tokenferry import peers
from tokenferry.errors import PeerFailedError

Captures = Callable[[tf.Workspace], contextlib.AbstractContextManager[object]]


@pytest.fixture(params=["local", "collective"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["capturing()", "torch alone"])
def captures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Captures:
    if request.param == "capturing()":
        return lambda ws: ws.capturing()

    @contextlib.contextmanager
    def by_torch(_: tf.Workspace) -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setattr(peers, "is_capturing", lambda device: True)
            yield

    return by_torch


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_what_a_transport_raises_is_told_to_nobody_and_the_next_step_works(
    operation: Operation, transport: str, captures: Captures
) -> None:
    scene = scene_of(transport)
    original = exchangeable(scene.ws).inner
    between = interpose(scene, operation, surprise, before=False)
    with pytest.raises(Surprise), captures(scene.ws):
        play(scene, operation.stage)
        try:
            operation.call(scene)
        except Surprise as error:
            scene.ws.tell_peers(error)  # as the layers around do with whatever breaks off a forward
            raise
    assert between.said == []
    exchangeable(scene.ws).inner = original
    play(scene, "dispatched")
    finish(scene, "dispatched")
    scene.ws.close()


@pytest.mark.parametrize("stage", ["stepped", "dispatching", "dispatched", "combining"])
def test_what_the_layers_around_raise_is_told_to_nobody_and_the_next_step_works(
    stage: str, transport: str, captures: Captures
) -> None:
    scene = scene_of(transport)
    between = interpose(scene, FAIL, lambda: None, before=True)
    with captures(scene.ws):
        play(scene, stage)
        scene.ws.tell_peers(Surprise())
    assert between.said == []
    play(scene, "dispatched")
    finish(scene, "dispatched")
    scene.ws.close()


def test_outside_of_a_capture_the_peers_are_told(transport: str) -> None:
    scene = scene_of(transport)
    between = interpose(scene, FAIL, lambda: None, before=True)
    with scene.ws.capturing():
        pass
    play(scene, "stepped")
    scene.ws.tell_peers(Surprise())
    assert len(between.said) == 1
    scene.ws.close()


def test_a_capture_within_a_capture_is_still_one(transport: str) -> None:
    scene = scene_of(transport)
    between = interpose(scene, FAIL, lambda: None, before=True)
    with scene.ws.capturing():
        with scene.ws.capturing():
            pass
        scene.ws.tell_peers(Surprise())
    assert between.said == []
    scene.ws.close()


def test_check_asks_neither_the_device_nor_the_store(transport: str, captures: Captures) -> None:
    scene = scene_of(transport)
    play(scene, "stepped")
    between = interpose(scene, CHECK, surprise, before=True)
    with captures(scene.ws):
        scene.ws.check()
    assert between.calls == ["check_known"]
    scene.ws.close()


def test_a_peers_failure_breaks_the_workspace_in_a_capture_too(transport: str, captures: Captures) -> None:
    scene = scene_of(transport)

    def peer_failed() -> None:
        raise PeerFailedError(1, "out of luck", 0)

    between = interpose(scene, OPERATIONS[0], peer_failed, before=True)
    with pytest.raises(PeerFailedError), captures(scene.ws):
        scene.ws.begin_step(T)
    with pytest.raises(PeerFailedError, match="out of luck"):
        scene.ws.begin_step(T)
    assert between.said == []
    scene.ws.close()


@pytest.mark.parametrize("fails", [False, True], ids=["ends well", "fails"])
def test_a_capture_leaves_the_number_of_steps_as_it_was(fails: bool, transport: str) -> None:
    scene = scene_of(transport)
    scene.ws.begin_step(T)
    with contextlib.suppress(Surprise), scene.ws.capturing() as num_steps:
        scene.ws.begin_step(T)
        if fails:
            raise Surprise
    assert (num_steps(), scene.ws.last_step) == (1, 1)
    scene.ws.close()


def test_a_workspace_on_a_cpu_is_never_captured_by_torch() -> None:
    assert not peers.is_capturing(torch.device("cpu"))
