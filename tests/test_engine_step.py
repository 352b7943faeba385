"""`Workspace.engine_step` and `check(wait=False)`, in one process: what leaves a step of an engine, and who is told."""

import asyncio
from collections.abc import Callable

import pytest

from bad_calls import finish, play
from operations import Operation, Surprise, interpose, on_another_thread, out_of_memory, scene_of, surprise
from tokenferry.errors import CapacityError, PeerFailedError, StateError

KNOWN = Operation("check(wait=False)", "opened", "opened", lambda s: s.ws.check(wait=False), "check_known")


@pytest.fixture(params=["local", "collective"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


def peer_failed() -> None:
    raise PeerFailedError(1, "out of luck", 0)


class PeerFailsLater:
    """Says nothing the first time, when the step begins."""

    def __init__(self) -> None:
        self.num_looks = 0

    def __call__(self) -> None:
        self.num_looks += 1
        if self.num_looks > 1:
            peer_failed()


def test_steps_within_it_are_as_ever_and_it_may_be_nested(transport: str) -> None:
    scene = scene_of(transport)
    with scene.ws.engine_step(), scene.ws.engine_step():
        play(scene, "dispatched")
    with scene.ws.engine_step():
        finish(scene, "dispatched")
    scene.ws.close()


def test_a_step_may_end_amid_an_engines_step_and_the_next_go_on_with_it(transport: str) -> None:
    """Async scheduling: the layers of a multi-token prediction run in the next engine's step, on the counts of this one's."""
    scene = scene_of(transport)
    with scene.ws.engine_step():
        play(scene, "stepped")
    with scene.ws.engine_step():
        assert scene.ws.step.num_tokens > 0
        finish(scene, "stepped")
    scene.ws.close()


def test_a_peers_failure_is_raised_at_its_end_and_at_the_beginning_of_the_next(transport: str) -> None:
    scene = scene_of(transport)
    between = interpose(scene, KNOWN, PeerFailsLater(), before=True)
    ran = False
    with pytest.raises(PeerFailedError, match="out of luck"), scene.ws.engine_step():
        ran = True
    assert ran
    with pytest.raises(PeerFailedError, match="out of luck"), scene.ws.engine_step():
        pytest.fail("a broken workspace began a step")
    assert between.said == []
    scene.ws.close()


def test_a_peers_failure_stands_for_what_the_engine_makes_of_missing_rows(transport: str) -> None:
    scene = scene_of(transport)
    between = interpose(scene, KNOWN, PeerFailsLater(), before=True)
    with pytest.raises(PeerFailedError, match="out of luck") as caught, scene.ws.engine_step():
        raise IndexError("token 1431655765 is out of range")
    assert isinstance(caught.value.__cause__, IndexError)
    assert between.said == []
    scene.ws.close()


@pytest.mark.parametrize("raises", [out_of_memory, surprise])
def test_an_exception_inside_is_told_to_the_peers_and_breaks_the_workspace(raises: Callable[[], None], transport: str) -> None:
    scene = scene_of(transport)
    between = interpose(scene, KNOWN, lambda: None, before=True)
    with pytest.raises((RuntimeError, Surprise)) as caught, scene.ws.engine_step():
        raises()
    assert between.said == [f"{type(caught.value).__name__}: {caught.value}"]
    with pytest.raises(PeerFailedError, match="out of"):
        scene.ws.begin_step(1)
    scene.ws.reset()
    finish(scene, "opened")
    scene.ws.close()


def test_a_wrong_call_inside_breaks_off_the_engines_step_and_is_told_too(transport: str) -> None:
    scene = scene_of(transport)
    between = interpose(scene, KNOWN, lambda: None, before=True)
    with pytest.raises(CapacityError), scene.ws.engine_step():
        scene.ws.begin_step(10**6)
    assert len(between.said) == 1
    scene.ws.close()


def test_a_cancelled_step_is_told_to_nobody(transport: str) -> None:
    scene = scene_of(transport)
    between = interpose(scene, KNOWN, lambda: None, before=True)

    async def step() -> None:
        with scene.ws.engine_step():
            await asyncio.sleep(30)

    async def server() -> None:
        task = asyncio.ensure_future(step())
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(server())
    assert between.said == []
    finish(scene, "opened")
    scene.ws.close()


def test_a_closed_workspace_begins_no_step(transport: str) -> None:
    scene = scene_of(transport)
    scene.ws.close()
    with pytest.raises(StateError, match="closed"), scene.ws.engine_step():
        pytest.fail("a closed workspace began a step")


def test_a_step_whose_workspace_another_thread_closes_says_so(transport: str) -> None:
    scene = scene_of(transport)
    with pytest.raises(StateError, match="check: the workspace is closed"), scene.ws.engine_step():
        on_another_thread(scene.ws.close)


def test_check_without_waiting_asks_the_transport_for_what_it_knows_alone(transport: str) -> None:
    scene = scene_of(transport)
    between = interpose(scene, KNOWN, lambda: None, before=True)
    scene.ws.check(wait=False)
    on_another_thread(lambda: scene.ws.check(wait=False))
    assert between.calls == ["check_known", "check_known"]
    scene.ws.close()
