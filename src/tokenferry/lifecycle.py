"""What a workspace may be asked next: one small state machine that every transport shares."""

from __future__ import annotations

import enum
import threading

from tokenferry.errors import PeerError, StateError

MAX_LAYERS = (1 << 16) - 1
"""Dispatchers of a workspace: an abort record names the layer in 16 bits (`kernels.wire.Record`)."""


class Stage(enum.Enum):
    """Where a workspace stands."""

    NO_STEP = "without a step"
    READY = "ready for a dispatch"
    DISPATCHING = "between dispatch_begin and dispatch_end"
    DISPATCHED = "between a dispatch and its combine"
    COMBINING = "between combine_begin and combine_end"
    CLOSED = "closed"


_NEXT = {
    "dispatch_begin": (Stage.READY, Stage.DISPATCHING),
    "dispatch_end": (Stage.DISPATCHING, Stage.DISPATCHED),
    "combine_input": (Stage.DISPATCHED, Stage.DISPATCHED),
    "combine_begin": (Stage.DISPATCHED, Stage.COMBINING),
    "combine_end": (Stage.COMBINING, Stage.READY),
}
_REMEDY = {
    Stage.NO_STEP: "call begin_step() once per model forward, first",
    Stage.READY: "call dispatch_begin() or dispatch() first",
    Stage.DISPATCHING: "call dispatch_end() of the same dispatcher",
    Stage.DISPATCHED: "call combine() of the same dispatcher, on every rank",
    Stage.COMBINING: "call combine_end() of the same dispatcher",
    Stage.CLOSED: "open a new Workspace",
}


class Ticket:
    """Identifies one dispatch; compared by identity."""

    __slots__ = ("layer",)

    def __init__(self, layer: int) -> None:
        self.layer = layer


class Lifecycle:
    """Stages NO_STEP -> READY -> DISPATCHING -> DISPATCHED -> COMBINING -> READY ..., and an error that stays until a reset.

    One thread at a time is inside a call; between calls a workspace may go from thread to thread, as servers' steps do.
    """

    def __init__(self) -> None:
        self.stage = Stage.NO_STEP
        self.layer = -1
        self.gathered_rows = 0  # R of the dispatch under way
        self.ticket: Ticket | None = None
        self.error: PeerError | None = None
        self._inside = threading.Lock()  # taken without waiting: 0.1 microseconds a call

    def enter(self, operation: str) -> None:
        """The calling thread is inside until `leave`. Raises StateError if another one is: its rows would mix with these."""
        if not self._inside.acquire(blocking=False):
            raise StateError(
                f"{operation}: another thread is inside a call on this workspace; let one thread at a time use it, or open a "
                "second workspace for the other"
            )

    def try_enter(self) -> bool:
        """`enter` without an error: False if another thread is inside."""
        return self._inside.acquire(False)

    @property
    def is_entered(self) -> bool:
        """Whether a thread is inside a call."""
        return self._inside.locked()

    def leave(self) -> None:
        """The call that `enter` began is over."""
        self._inside.release()

    def require_usable(self, what: str) -> None:
        """Raises StateError if closed, or the peer error that broke the workspace."""
        if self.stage is Stage.CLOSED:
            raise StateError(f"{what}: the workspace is closed; {_REMEDY[Stage.CLOSED]}")
        if self.error is not None:
            raise self.error

    def begin_step(self) -> None:
        """NO_STEP or READY -> READY."""
        self.require_usable("begin_step")
        if self.stage not in (Stage.NO_STEP, Stage.READY):
            raise StateError(f"begin_step: the workspace is {self.stage.value} in layer {self.layer}; {_REMEDY[self.stage]}")

    def enter_ready(self) -> None:
        """A step's counts are known."""
        self.stage, self.layer, self.ticket = Stage.READY, -1, None

    def leave_step(self) -> None:
        """The step's counts are gone."""
        self.stage, self.layer, self.ticket = Stage.NO_STEP, -1, None

    def require(self, operation: str, layer: int) -> None:
        """Whether `operation` of dispatcher `layer` may come now; changes nothing."""
        self.require_usable(operation)
        expected, _ = _NEXT[operation]
        if self.stage is not expected:
            owner = f" in layer {self.layer}" if self.layer >= 0 else ""
            raise StateError(f"{operation} in layer {layer}: the workspace is {self.stage.value}{owner}; {_REMEDY[self.stage]}")
        if operation != "dispatch_begin" and layer != self.layer:
            raise StateError(
                f"{operation} was called on the dispatcher of layer {layer}, but the dispatch under way is layer {self.layer}'s; "
                "use one dispatcher for a layer's dispatch and combine, or a second workspace for two layers in flight"
            )

    def advance(self, operation: str, layer: int) -> None:
        """Takes the step that `require` allowed."""
        _, self.stage = _NEXT[operation]
        if operation == "dispatch_begin":
            self.layer, self.ticket = layer, Ticket(layer)
        elif operation == "combine_begin":
            self.ticket = None
        elif operation == "combine_end":
            self.layer = -1

    def allows(self, stage: Stage) -> bool:
        """Whether the workspace stands at `stage` and works. The quick form of `require`, which says what is wrong."""
        return self.stage is stage and self.error is None

    def fail(self, error: PeerError) -> None:
        """Every call raises `error` from now on, until the workspace is reset."""
        if self.error is None:
            self.error = error
