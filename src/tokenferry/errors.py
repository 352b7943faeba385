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
    """The root of the tree.

    What to do: Catch it to catch all of them, and let the message say which one it was.
    """


class UsageError(TokenferryError, ValueError):
    """A call that can never work, whatever the other ranks do. Nothing has been launched.

    What to do: Correct the call. No other rank was told, so the workspace goes on as it was.
    """


class ShapeError(UsageError):
    """A tensor has the wrong number of rows, columns or dimensions.

    What to do: Pass the shape that the message names; it has both numbers.
    """


class DtypeError(UsageError):
    """A tensor has a dtype that its argument does not take.

    What to do: Convert the tensor, or open the workspace with the dtype that you have.
    """


class DeviceError(UsageError):
    """A tensor lives on another device than the workspace.

    What to do: Move the tensor to the group's device, or give each rank the device that its tensors are on.
    """


class LayoutError(UsageError):
    """A tensor's strides or alignment are not what the kernels can read.

    What to do: Pass `tensor.contiguous()`.
    """


class CapacityError(UsageError):
    """More rows than the workspace was opened for.

    What to do: Bring fewer rows to a step, or open the workspace with a larger `max_tokens_per_rank`.
    """


class ConfigError(UsageError):
    """Settings exclude one another, or differ between the ranks of a group.

    What to do: Correct the setting that the message names, on the ranks that it names.
    """


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
    """A call that is right in itself, at a time when it is not.

    What to do: Make the call that the message says is due, such as the combine of a dispatch, or `reset()`.
    """


class TransportUnavailableError(TokenferryError, RuntimeError):
    """No transport fits; `decisions` holds one line of reason for every candidate.

    What to do: Read these lines, or run `tokenferry doctor`, which says what to do about each. If a slower transport will do,
    ask for `transport="auto"`.
    """

    def __init__(self, message: str, decisions: Sequence[object] = ()) -> None:
        self.decisions = tuple(decisions)
        trace = "".join(f"\n  {decision}" for decision in self.decisions)
        super().__init__(message + trace)


class PeerError(TokenferryError, RuntimeError):
    """Another rank is the cause. `rank` is its number in the group, `step` the step that this rank was in.

    What to do: Look at the log of the rank that is named. Then call `reset()` on every rank that goes on, or end the processes.
    """

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

    What to do: As for `PeerError`. If that rank was busy and not dead, let it say so (`Workspace.busy`), or raise `timeout_s`.

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
    where a process failed whose rank is not known, such as the host of a rendezvous store that is no rank of the group.

    What to do: As for `PeerError`. `reason` is the text of the exception that the other rank raised, where it raised one.
    """

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
    """A rank process failed. `rank` is the first that did, `traceback` its text.

    What to do: Mend what the traceback shows. The other ranks' failures came later, and were ended with it.
    """

    def __init__(self, rank: int, traceback: str) -> None:
        self.rank, self.traceback = rank, traceback
        super().__init__(f"rank {rank} failed first:\n{traceback}")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.rank, self.traceback)
