"""The calls on a workspace by stage, and transports that do something between; see test_lifecycle.py and test_failures.py."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

import tokenferry as tf
from bad_calls import CONFIG, Scene, T, open_workspace
from exchangeable import Opens, exchangeable
from tokenferry.testing.data import make_inputs


def scene_of(transport: str) -> Scene:
    ws = open_workspace(Opens(transport))
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
SET_TIMEOUT = Operation("set_timeout", "dispatched", "dispatched", lambda s: s.ws.set_timeout(3.0), "set_timeout")
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
    place = exchangeable(scene.ws)
    place.inner = between = Between(place.inner, operation.method, do, before=before)
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
