"""Every exception that tokenferry raises on purpose.

    TokenferryError
    ├── UsageError (ValueError)             a call that can never work; raised before anything is launched
    │   ├── ShapeError                      wrong number of rows, columns or dimensions
    │   ├── DtypeError                      a dtype that the argument does not take
    │   ├── DeviceError                     a tensor on another device than its workspace
    │   ├── LayoutError                     strides or alignment that the kernels cannot read
    │   ├── CapacityError                   more rows than were provided for
    │   └── ConfigError                     settings that exclude one another, or differ between ranks
    ├── StateError (RuntimeError)           a right call at the wrong time
    ├── TransportUnavailableError (RuntimeError)   no transport fits; `.decisions` says why
    ├── PeerError (RuntimeError)            another rank is the cause
    │   ├── PeerTimeoutError                it did not come in time
    │   └── PeerFailedError                 it failed, left, or was declared dead
    └── RankFailedError (RuntimeError)      a rank started by `launch` or `testing` failed

Messages say what is wrong, with both numbers where there are two, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

Phase = Literal["open", "not-entered", "data-missing", "counts-disagree", "reset"]
"""Where a peer was missed: while opening, at the start of a step, in the middle of one, off by a step, in a reset."""


class TokenferryError(Exception):
    """The root of the tree."""


class UsageError(TokenferryError, ValueError):
    """A call that can never work, whatever the other ranks do. Nothing has been launched."""


class ShapeError(UsageError):
    """A tensor has the wrong number of rows, columns or dimensions."""


class DtypeError(UsageError):
    """A tensor has a dtype that its argument does not take."""


class DeviceError(UsageError):
    """A tensor lives on another device than the workspace."""


class LayoutError(UsageError):
    """A tensor's strides or alignment are not what the kernels can read."""


class CapacityError(UsageError):
    """More rows than the workspace was opened for."""


class ConfigError(UsageError):
    """Settings exclude one another, or differ between the ranks of a group."""


def check_kind(name: str, value: object, kind: type) -> None:
    """Raises UsageError unless `value`, the argument `name`, is a `kind`."""
    if not isinstance(value, kind):
        raise UsageError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")


def refuse_pickling(instance: object, instead: str) -> NoReturn:
    """For `__reduce_ex__` of what cannot leave its process, nor be copied: torch's own error there names an inner object.

    Raises:
        UsageError: always.
    """
    raise UsageError(f"{type(instance).__name__} objects can be neither pickled nor copied; {instead}")


class StateError(TokenferryError, RuntimeError):
    """A call that is right in itself, at a time when it is not."""


class TransportUnavailableError(TokenferryError, RuntimeError):
    """No transport fits; `decisions` holds one line of reason for every candidate."""

    def __init__(self, message: str, decisions: Sequence[object] = ()) -> None:
        self.decisions = tuple(decisions)
        trace = "".join(f"\n  {decision}" for decision in self.decisions)
        super().__init__(message + trace)


class PeerError(TokenferryError, RuntimeError):
    """Another rank is the cause. `rank` is its number in the group, `step` the step that this rank was in."""

    rank: int
    phase: Phase
    step: int
    waits: tuple[Any, ...] = ()
    """With telemetry: the last steps (`telemetry.StepRecord`), the oldest first, with what this rank waited for each peer."""
    reading: str = ""
    """With telemetry: these in one line, as in "rank 3 was last to enter in 97 of the last 100 steps, by 4.1 ms"."""

    def __str__(self) -> str:
        return f"{super().__str__()}; {self.reading}" if self.reading else super().__str__()

    def _seen(self) -> dict[str, Any]:
        """What telemetry adds, for a copy."""
        return {"waits": self.waits, "reading": self.reading} if self.waits else {}


class PeerTimeoutError(PeerError):
    """Rank `rank` did not come within the time-out.

    Args:
        rank: the late rank, numbered in the expert-parallel group; -1 where it is not known.
        phase: what was waited for.
        step: the step that was under way (0 before the first).
        layer: the dispatcher's number within the workspace, or -1 outside a layer.
        waited_s: seconds waited.
    """

    def __init__(self, rank: int, phase: Phase, step: int, layer: int, waited_s: float, detail: str = "") -> None:
        self.rank, self.phase, self.step, self.layer, self.waited_s, self.detail = rank, phase, step, layer, waited_s, detail
        where = f"step {step}" + (f", layer {layer}" if layer >= 0 else "")
        super().__init__(
            f"{_named(rank)} is late: {phase} in {where}, waited {waited_s:.1f} s"
            + (f" ({detail})" if detail else "")
            + "; look at that rank's log, then call reset() on every rank that goes on"
        )

    def __reduce__(self) -> tuple[type, tuple[object, ...], dict[str, Any]]:
        return type(self), (self.rank, self.phase, self.step, self.layer, self.waited_s, self.detail), self._seen()


class PeerFailedError(PeerError):
    """Rank `rank` failed, closed its connection, or was declared dead by its peers (then it may be this rank itself). It is -1
    where a process failed whose rank is not known, such as the host of a rendezvous store that is no rank of the group."""

    def __init__(self, rank: int, reason: str, step: int, phase: Phase = "data-missing") -> None:
        self.rank, self.reason, self.step, self.phase = rank, reason, step, phase
        if phase == "open":
            super().__init__(f"{_named(rank)} failed before its workspace was open: {reason}")
            return
        what = f"the ranks disagree in step {step}" if phase == "counts-disagree" else f"{_named(rank)} failed in step {step}"
        super().__init__(f"{what}: {reason}; call reset() on every rank that goes on")

    def __reduce__(self) -> tuple[type, tuple[object, ...], dict[str, Any]]:
        return type(self), (self.rank, self.reason, self.step, self.phase), self._seen()


def _named(rank: int) -> str:
    return f"rank {rank}" if rank >= 0 else "a process of unknown rank"


class RankFailedError(TokenferryError, RuntimeError):
    """A rank process failed. `rank` is the first that did, `traceback` its text."""

    def __init__(self, rank: int, traceback: str) -> None:
        self.rank, self.traceback = rank, traceback
        super().__init__(f"rank {rank} failed first:\n{traceback}")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.rank, self.traceback)
