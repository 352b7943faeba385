"""Wrong calls. Each raises its exception, with a message that helps, before anything is launched; afterwards the call that
was right goes through, and another round trip has the bits of the reference."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import tokenferry as tf
from bad_calls import ANOTHER_NUMBER, CALLS, CONFIG, NUMBERS, TABLE, Counted, Scene, T, Wrong, finish, open_workspace, play, same
from exchangeable import Opens, exchangeable
from tokenferry.errors import ConfigError, StateError
from tokenferry.testing.data import make_inputs
from tokenferry.transports.base import Transport


@pytest.fixture(params=["local", "collective"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


def scene_of(transport: str) -> Scene:
    ws = open_workspace(Opens(transport))
    inputs = make_inputs(CONFIG, [T], seed=7, payload="hostile")[0]
    scene = Scene(ws, ws.dispatcher(), ws.dispatcher(), inputs)
    ws.begin_step(T)
    scene.extra["earlier"] = scene.dispatcher.dispatch(*scene.rows)
    scene.dispatcher.combine(inputs.partial)
    with ws.solo():  # leaves the workspace without a step, as after opening
        pass
    return scene


@pytest.mark.parametrize("wrong", [*TABLE, *NUMBERS], ids=lambda wrong: wrong.name)
def test_a_wrong_call_is_named_and_changes_nothing(wrong: Wrong, transport: str) -> None:
    scene = scene_of(transport)
    play(scene, wrong.stage)
    place = exchangeable(scene.ws)
    place.inner = counted = Counted(place.inner)
    with pytest.raises(wrong.error, match=wrong.said) as caught:
        wrong.call(scene)
    assert type(caught.value) is wrong.error
    assert counted.launches == 0, "nothing may be launched"
    if wrong.stage != "closed":
        finish(scene, wrong.stage)
        finish(scene, "combined")
        scene.ws.close()


def test_the_table_is_large_and_its_calls_differ_in_more_than_a_number() -> None:
    assert len({wrong.name for wrong in (*TABLE, *NUMBERS)}) == len(TABLE) + len(NUMBERS)
    assert {wrong.name for wrong in NUMBERS} == ANOTHER_NUMBER
    assert len(TABLE) >= 150


# --- what looks wrong, and is right -----------------------------------------------------------------------------------

RIGHT: dict[str, Callable[[Scene], list[torch.Tensor]]] = {
    "a-leaf-that-wants-a-gradient": lambda s: [s.inputs.hidden.clone().requires_grad_(), *s.rows[1:]],
    "a-parameter": lambda s: [torch.nn.Parameter(s.inputs.hidden.clone()), *s.rows[1:]],
    "weights-with-a-graph": lambda s: [*s.rows[:2], s.inputs.topk_weights.clone().requires_grad_() * 1],
    "a-slice-of-rows": lambda s: [torch.cat([s.inputs.hidden] * 2)[:T], *s.rows[1:]],
    "an-unaligned-address": lambda s: [unaligned(s.inputs.hidden), *s.rows[1:]],
    "int32-ids": lambda s: [s.rows[0], s.rows[1].int(), s.rows[2]],
    "weights-transposed": lambda s: [*s.rows[:2], s.rows[2].t().contiguous().t()],
    "every-second-weight": lambda s: [*s.rows[:2], s.rows[2].repeat_interleave(2, 1)[:, ::2]],
}


def unaligned(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1), rows.flatten()])[1:].view(rows.shape)


@pytest.mark.parametrize("right", RIGHT, ids=str)
def test_an_unusual_call_that_is_right_goes_through(right: str, transport: str) -> None:
    scene = scene_of(transport)
    scene.ws.begin_step(T)
    got = scene.dispatcher.dispatch(*RIGHT[right](scene))
    assert not got.hidden.requires_grad or transport == "local"
    out = scene.dispatcher.combine(scene.inputs.partial, got)
    assert not out.requires_grad
    same("hidden", got.hidden, scene.inputs.hidden)
    same("topk_weights", got.topk_weights, scene.inputs.topk_weights)
    finish(scene, "combined")
    scene.ws.close()


def test_a_refused_opening_does_not_shift_names_against_the_peers() -> None:
    group = tf.EPGroup(device="cpu")
    for _ in range(3):
        with pytest.raises(ConfigError):
            tf.Workspace(CONFIG, group, max_tokens_per_rank=0)
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=1) as ws:
        assert ws._settings.name == "workspace.0"


def test_a_refused_reset_keeps_the_generation() -> None:
    scene = scene_of("collective")
    with pytest.raises(ConfigError):
        scene.ws.reset("everyone")
    assert scene.ws.generation == 0
    finish(scene, "opened")
    scene.ws.reset()
    assert scene.ws.generation == 1
    finish(scene, "opened")
    scene.ws.close()


# --- threads ----------------------------------------------------------------------------------------------------------


class Waiting:
    """A transport whose `operation` waits until it is told to go on."""

    def __init__(self, transport: Transport, operation: str) -> None:
        self._transport, self._operation = transport, operation
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        if name == self._operation:
            self.entered.set()
            assert self.go_on.wait(10)
        return getattr(self._transport, name)


@pytest.mark.parametrize("operation", ["begin_step", "dispatch_begin", "dispatch_end", "combine_begin", "combine_end"])
def test_two_threads_inside_one_workspace_are_an_error(operation: str) -> None:
    scene = scene_of("local")
    play(scene, {"begin_step": "opened"}.get(operation, CALLS.get(operation, (None, "", "opened"))[2]))
    place = exchangeable(scene.ws)
    place.inner = waiting = Waiting(place.inner, operation)
    calls: dict[str, Callable[[], Any]] = {
        "begin_step": lambda: scene.ws.begin_step(T),
        "dispatch_begin": lambda: scene.dispatcher.dispatch_begin(*scene.rows),
        "dispatch_end": scene.dispatcher.dispatch_end,
        "combine_begin": lambda: scene.dispatcher.combine_begin(scene.inputs.partial),
        "combine_end": scene.dispatcher.combine_end,
    }
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(calls[operation])
        try:
            assert waiting.entered.wait(10)
            for name, call in calls.items():
                with pytest.raises(StateError, match=f"{name}: another thread is inside a call on this workspace"):
                    call()
            with pytest.raises(StateError, match="reset: another thread is inside"):
                scene.ws.reset()
        finally:
            waiting.go_on.set()
        first.result()
    place.inner = waiting._transport
    if operation == "dispatch_end":
        scene.got = first.result()
    done = {"begin_step": "stepped", "dispatch_begin": "dispatching", "dispatch_end": "dispatched", "combine_begin": "combining"}
    finish(scene, done.get(operation, "combined"))
    scene.ws.close()


def test_a_workspace_may_go_from_thread_to_thread_between_calls(transport: str) -> None:
    scene = scene_of(transport)
    for _ in range(3):  # every call on a thread of its own
        for call in (
            lambda: scene.ws.begin_step(T),
            lambda: scene.dispatcher.dispatch_begin(*scene.rows),
            lambda: setattr(scene, "got", scene.dispatcher.dispatch_end()),
            lambda: scene.dispatcher.combine_begin(scene.inputs.partial, scene.got),
            scene.dispatcher.combine_end,
        ):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(call).result()
    finish(scene, "combined")
    scene.ws.close()
