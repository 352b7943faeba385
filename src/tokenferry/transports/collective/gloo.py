"""Messages between ranks for the collective transport, over gloo or NCCL, on a communicator of our own.

The communicator is made over exactly the group's ranks and never shared: after a failure it is aborted alone, and the
application's own process groups stay as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

Rows = Sequence[Sequence[torch.Tensor]]
"""For each peer the tensors that go to it or come from it; this rank's own entry is ignored, empty tensors do not travel."""


class CommunicationError(Exception):
    """Peer `rank` (-1: not known which) is late, or its connection is gone (`closed`)."""

    def __init__(self, rank: int, closed: bool, waited_s: float, detail: str = "") -> None:
        super().__init__(detail)
        self.rank, self.closed, self.waited_s, self.detail = rank, closed, waited_s, detail


@dataclass(frozen=True)
class Header:
    """The packet at the head of every operation. Equal on all ranks but for `num_tokens` and `flags`, or a rank is off."""

    operation: int
    step: int
    layer: int
    generation: int
    num_tokens: int = 0
    flags: int = 0

    def position(self) -> tuple[int, int, int, int]:
        """What must agree, in the order in which ranks advance."""
        return (self.generation, self.step, self.operation, self.layer)


class Pending(Protocol):
    """A started exchange."""

    def headers(self) -> list[Header] | None:
        """Every rank's header, or None where the backend sends none outside `begin_step`. Waits, at most the time-out."""

    def finish(self) -> None:
        """Waits until the incoming rows are there (on CUDA: makes the current stream wait)."""


HEADER_WORDS = 6

_NO_TAG = 999_999
"""Of messages that nobody sends."""
_WAKE = datetime.timedelta(milliseconds=1)


def leave_to_parent(backend: object, pid: int) -> None:
    """Called as the communicator goes that process `pid` made. A forked child keeps the backend for good: the threads that its
    destructor would wait for are in the parent alone, so that the child hung when it dropped the workspace or exited."""
    if os.getpid() != pid:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))


class GlooCommunicator:
    """Point-to-point messages over gloo's TCP pairs, so that the rank that is late is known by name.

    Every operation begins with a header. Rows are received only after the headers agreed: gloo ends the process when a
    message is larger than the buffer that was posted for it.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float, open_timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._pid = os.getpid()
        # Half the time for connecting: the ranks must still be able to tell one another why it failed.
        self._backend: Any = dist.ProcessGroupGloo(store, rank, size, datetime.timedelta(seconds=open_timeout_s / 2))

    @property
    def peers(self) -> list[int]:
        """The other ranks, the next one first, so that not all ranks begin with rank 0."""
        return [(self.rank + shift) % self.size for shift in range(1, self.size)]

    def exchange_headers(self, header: Header) -> list[Header]:
        """Every rank's header, known to the host on return."""
        pending = self.start(header, [()] * self.size, [()] * self.size)
        pending.finish()
        return pending.headers()

    def start(self, header: Header, outgoing: Rows, incoming: Rows) -> GlooPending:
        """Starts to send `outgoing[r]` to rank r and to receive `incoming[r]` from it. Finish it before the next start."""
        return GlooPending(self, header, outgoing, incoming)

    def send(self, tensor: torch.Tensor, peer: int, tag: int) -> Any:
        """Posts a send; a dead connection shows here already."""
        return self._post(self._backend.send, tensor, peer, tag)

    def receive(self, tensor: torch.Tensor, peer: int, tag: int) -> Any:
        """Posts a receive."""
        return self._post(self._backend.recv, tensor, peer, tag)

    def _post(self, call: Any, tensor: torch.Tensor, peer: int, tag: int) -> Any:
        try:
            return call([tensor], peer, tag)
        except RuntimeError as error:
            raise CommunicationError(peer, True, 0.0, str(error)) from error

    @contextlib.contextmanager
    def watching_replay(self) -> Iterator[None]:
        """Nothing is captured over gloo."""
        yield

    def raise_if_broken(self) -> None:
        """gloo's calls raise by themselves."""

    def abort(self) -> None:
        """Drops all connections at once, from any thread; one that waits for a message leaves with an error. Waits for no peer.

        To let go of the backend is not enough: the call of a thread that is blocked keeps it, and with it the connections, so
        that the thread stayed until the peer acted. gloo's own `abort` and `shutdown` leave it there too (torch 2.13), but gloo
        closes all connections of a backend when any receive on it times out: so one is posted here that can only time out.
        """
        backend, self._backend = self._backend, _Closed()
        if isinstance(backend, _Closed) or self.size == 1 or os.getpid() != self._pid:
            return
        with contextlib.suppress(RuntimeError):  # a connection that is gone already says so at once
            backend.recv([torch.zeros(1, device="cpu")], self.peers[0], _NO_TAG).wait(_WAKE)

    def __del__(self) -> None:
        leave_to_parent(getattr(self, "_backend", None), self._pid)


class _Closed:
    """Stands for a dropped backend."""

    def send(self, *_: object) -> None:
        raise RuntimeError("the communicator was closed")

    recv = send


class GlooPending:
    """See `Pending`."""

    def __init__(self, communicator: GlooCommunicator, header: Header, outgoing: Rows, incoming: Rows) -> None:
        self._communicator, self._incoming = communicator, incoming
        self._start = time.monotonic()
        words = torch.tensor(astuple(header), dtype=torch.int64, device="cpu")
        self._words = [words.clone() for _ in range(communicator.size)]
        self._header_receives, self._sends = [], []
        for peer in communicator.peers:
            self._header_receives.append((peer, communicator.receive(self._words[peer], peer, 0)))
            self._sends.append((peer, communicator.send(words, peer, 0)))
        # Kept alive until the sends are done: gloo holds bare pointers.
        self._kept = (words, [list(tensors) for tensors in outgoing])
        for peer in communicator.peers:
            for tag, tensor in enumerate(outgoing[peer], start=1):
                if tensor.numel():
                    self._sends.append((peer, communicator.send(tensor, peer, tag)))
        self._headers: list[Header] | None = None

    def headers(self) -> list[Header]:
        """See `Pending`."""
        if self._headers is None:
            self._wait(self._header_receives)
            self._headers = [Header(*words.tolist()) for words in self._words]
        return self._headers

    def finish(self) -> None:
        """See `Pending`."""
        self.headers()
        receives = [
            (peer, self._communicator.receive(tensor, peer, tag))
            for peer in self._communicator.peers
            for tag, tensor in enumerate(self._incoming[peer], start=1)
            if tensor.numel()
        ]
        self._wait(receives)
        self._wait(self._sends)

    def _wait(self, works: list[tuple[int, Any]]) -> None:
        for peer, work in works:
            waited_s = time.monotonic() - self._start
            left_s = max(self._communicator.timeout_s - waited_s, 0.001)
            try:
                work.wait(datetime.timedelta(seconds=left_s))
            except RuntimeError as error:
                waited_s = time.monotonic() - self._start
                late = "imed out" in str(error) or "timeout" in str(error)
                raise CommunicationError(peer, not late, waited_s, str(error)) from error
