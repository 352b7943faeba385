"""What the collective transport's ranks send one another, and what a communicator must be able to do.

A communicator is made over exactly the group's ranks and never shared: after a failure it is aborted alone, and the
application's own process groups stay as they are.
"""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from typing import Protocol

import torch

Rows = Sequence[Sequence[torch.Tensor]]
"""For each peer the tensors that go to it or come from it; this rank's own entry is ignored, empty tensors do not travel."""

CONNECTION_GONE = "its connection is gone (the process ended, or closed its workspace)"


class CommunicationError(Exception):
    """Rank `rank` (-1: not known which) failed for `reason`; with an empty one it is late by `waited_s` seconds."""

    def __init__(self, rank: int, waited_s: float, reason: str = "") -> None:
        super().__init__(reason)
        self.rank, self.waited_s, self.reason = rank, waited_s, reason


@dataclass(frozen=True)
class Header:
    """The packet at the head of every operation. Equal on all ranks but for `num_tokens`, `flags` and `entered_ns`, or a
    rank is off."""

    operation: int
    step: int
    layer: int
    generation: int
    num_tokens: int = 0
    flags: int = 0
    entered_ns: int = 0
    """When the rank came, by its host's clock; 0 where it does not count what it waits for."""

    def position(self) -> tuple[int, int, int, int]:
        """What must agree, in the order in which ranks advance."""
        return (self.generation, self.step, self.operation, self.layer)

    def words(self) -> torch.Tensor:
        """int64 [HEADER_WORDS] on the host."""
        return torch.tensor(astuple(self), dtype=torch.int64, device="cpu")


HEADER_WORDS = 7


class Pending(Protocol):
    """A started exchange."""

    def headers(self) -> list[Header] | None:
        """Every rank's header, or None where the backend sends none outside `begin_step`. Waits, at most the time-out."""

    def finish(self) -> None:
        """Waits until the incoming rows are there (on CUDA: makes the current stream wait)."""


class Communicator(ABC):
    """Messages between the ranks of a group. Its methods raise `CommunicationError` if a peer is late or gone."""

    rank: int
    size: int
    timeout_s: float
    """May be set at any moment, and counts for waits under way too."""
    on_wait: Callable[[int, int], None] | None = None
    """Called with a peer and the nanoseconds that the host has waited for a message from or to it."""

    @property
    def peers(self) -> list[int]:
        """The other ranks, the next one first, so that not all ranks begin with rank 0."""
        return [(self.rank + shift) % self.size for shift in range(1, self.size)]

    @abstractmethod
    def exchange_headers(self, header: Header) -> list[Header]:
        """Every rank's header, known to the host on return."""

    @abstractmethod
    def start(self, header: Header, outgoing: Rows, incoming: Rows) -> Pending:
        """Starts to send `outgoing[r]` to rank r and to receive `incoming[r]` from it. Finish it before the next start."""

    def all_gather(self, gathered: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], *, overlaps: bool) -> Pending | None:
        """Starts to gather each of `rows`, equally many on every rank, into the tensor of `gathered` at the same place: rank r's
        are the r-th of equal parts, and `rows` may be this rank's part itself. `overlaps`: what is launched on the current stream
        before `finish` need not wait. None, with nothing sent, where the library has nothing faster than `start`."""
        return None

    def reduce_scatter(self, out: torch.Tensor, rows: torch.Tensor, *, overlaps: bool) -> Pending | None:
        """Starts the library's own reduce-scatter, for equal counts: one addition in the dtype of `rows` for each further rank,
        in an order of its own. None, with nothing sent, where it has none that is faster than the exchange in rank order."""
        return None

    def watching_replay(self) -> AbstractContextManager[None]:
        """Around the launch of a graph that was captured with this communicator: a peer that does not come is noticed."""
        return nullcontext()

    def watching_step(self) -> AbstractContextManager[None]:
        """Around a step of an engine that may replay such graphs and wait for them: the same, until what the step has launched is
        done."""
        return nullcontext()

    def raise_if_broken(self) -> None:
        """Raises what was found outside the calls, by a thread that watches them, say."""
        return

    def let_launched_end(self) -> None:
        """Waits until what this rank has launched on the device has ended, which a late peer puts off by the time-out at most.
        Raises nothing: what is broken is not waited for."""
        return

    @abstractmethod
    def abort(self) -> None:
        """Drops all connections at once, from any thread; one that waits for a message leaves with an error. Never waits for a
        peer."""


def leave_to_parent(backend: object, pid: int) -> None:
    """Called as the communicator goes that process `pid` made. A forked child keeps the backend for good: the threads that its
    destructor would wait for are in the parent alone, so that the child hung when it dropped the workspace or exited."""
    if os.getpid() != pid:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))
