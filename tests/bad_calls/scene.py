"""The scenes in which wrong calls are made, and what a wrong call is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import tokenferry as tf
from tokenferry.testing.data import RankInputs
from tokenferry.testing.numeric import first_difference
from tokenferry.transports.base import Transport, TransportFactory

H, E, K, C, T = 8, 6, 2, 5, 3
CONFIG = tf.MoEConfig(hidden_size=H, num_experts=E, topk=K, dtype=torch.float32)

CapacityError, ConfigError, DeviceError, DtypeError = tf.CapacityError, tf.ConfigError, tf.DeviceError, tf.DtypeError
LayoutError, ShapeError, StateError, UsageError = tf.LayoutError, tf.ShapeError, tf.StateError, tf.UsageError

STAGES = ("opened", "stepped", "dispatching", "dispatched", "combining", "combined", "closed")
"""Where a workspace stands when the wrong call comes."""


class Counted:
    """A transport that counts what it is asked to launch."""

    LAUNCHES = (
        "begin_step",
        "dispatch",
        "dispatch_begin",
        "dispatch_end",
        "combine",
        "combine_begin",
        "combine_end",
        "close",
        "fail",
    )

    def __init__(self, transport: Transport) -> None:
        self._transport, self.launches = transport, 0

    def __getattr__(self, name: str) -> Any:
        if name in self.LAUNCHES:
            self.launches += 1
        return getattr(self._transport, name)


@dataclass
class Scene:
    """A workspace at some stage, and all that a call may take."""

    ws: tf.Workspace
    dispatcher: tf.Dispatcher
    other: tf.Dispatcher
    inputs: RankInputs
    got: tf.Dispatched | None = None
    used: tf.Dispatched | None = None
    foreign: tf.Workspace | None = None
    foreign_got: tf.Dispatched | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[torch.Tensor]:
        return [self.inputs.hidden, self.inputs.topk_idx, self.inputs.topk_weights]

    def dispatch_with(self, **changed: Any) -> None:
        names = ("hidden", "topk_idx", "topk_weights")
        self.dispatcher.dispatch_begin(*(changed.get(name, row) for name, row in zip(names, self.rows, strict=True)))


def open_workspace(transport: str | TransportFactory, **changed: Any) -> tf.Workspace:
    """On p2p for T rows: its gathered rows are as many as there may be, and the table's partial rows are T."""
    is_p2p = getattr(transport, "name", transport) == "p2p"  # the table also gives what has no name
    settings = {"max_tokens_per_rank": T if is_p2p else C, "transport": transport, **changed}
    return tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), **settings)


def same(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    difference = first_difference(got, want)
    assert not difference, f"{name}: {difference}"


def finish(scene: Scene, stage: str) -> None:
    """The right calls from `stage` on, with the reference's bits."""
    ws, dispatcher, inputs = scene.ws, scene.dispatcher, scene.inputs
    wanted = tf.reference.dispatch([inputs.hidden], [inputs.topk_idx], [inputs.topk_weights])
    if stage in ("opened", "combined"):
        ws.begin_step(T)
    if stage in ("opened", "stepped", "combined"):
        dispatcher.dispatch_begin(*scene.rows)
    if stage in ("opened", "stepped", "combined", "dispatching"):
        scene.got = dispatcher.dispatch_end()
    if stage != "combining":
        assert scene.got is not None
        same("hidden", scene.got.hidden, wanted.hidden)
        same("topk_idx", scene.got.topk_idx, wanted.topk_idx)
        same("topk_weights", scene.got.topk_weights, wanted.topk_weights)
        dispatcher.combine_begin(inputs.partial, scene.got)
    (combined,) = tf.reference.combine([inputs.partial], [T], CONFIG.dtype, CONFIG.dtype)
    same("combined", dispatcher.combine_end(), combined)


def play(scene: Scene, stage: str) -> None:
    """The right calls up to `stage`."""
    index = STAGES.index(stage)
    if stage == "closed":
        scene.ws.close()
        return
    if index >= 1:
        scene.ws.begin_step(T)
    if index >= 2:
        scene.dispatcher.dispatch_begin(*scene.rows)
    if index >= 3:
        scene.got = scene.used = scene.dispatcher.dispatch_end()
    if index >= 4:
        scene.dispatcher.combine_begin(scene.inputs.partial, scene.got)
    if index >= 5:
        scene.dispatcher.combine_end()


@dataclass(frozen=True)
class Wrong:
    """A wrong call, and what it must say."""

    name: str
    stage: str
    call: Callable[[Scene], Any]
    error: type[Exception]
    said: str


class Table(list[Wrong]):
    """Wrong calls of one subject."""

    def add(self, name: str, stage: str, error: type[Exception], said: str, call: Callable[[Scene], Any]) -> None:
        self.append(Wrong(name, stage, call, error, said))
