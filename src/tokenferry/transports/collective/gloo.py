"""The collective transport's messages over gloo: point-to-point over TCP, so that the rank that is late is known by name."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
import weakref
from typing import Any

import torch
import torch.distributed as dist

from tokenferry.transports.busy import WaitClock
from tokenferry.transports.collective.messages import (
    CONNECTION_GONE,
    CommunicationError,
    Communicator,
    Header,
    Rows,
    leave_to_parent,
)

_NO_TAG = 999_999
"""Of messages that nobody sends."""
_WAKE = datetime.timedelta(milliseconds=1)
_NO_TORCH_TIMEOUT = datetime.timedelta(days=30)
_LONGEST_TICK_S = 0.25
_TICKS_PER_TIMEOUT = 20


class GlooCommunicator(Communicator):
    """See `Communicator`.

    A wait of gloo's that times out closes all connections, and cannot be prolonged. So the limit is a thread's, which knows what
    busy peers say, and closes them itself.

    Every operation begins with a header. Rows are received only after the headers agreed: gloo ends the process when a
    message is larger than the buffer that was posted for it.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout_s: float, open_timeout_s: float, clock: WaitClock
    ) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._clock = clock
        self._waiting_since_s: float | None = None
        self._given_up = False
        self._pid = os.getpid()
        # Half the time for connecting: the ranks must still be able to tell one another why it failed.
        self._backend: Any = dist.ProcessGroupGloo(store, rank, size, datetime.timedelta(seconds=open_timeout_s / 2))

        self._stopped = threading.Event()
        watcher = threading.Thread(target=_watch, args=(weakref.ref(self), self._stopped), daemon=True, name="tokenferry-gloo")
        watcher.start()

    def wait(self, peer: int, work: Any, started_s: float) -> None:
        """Waits for a message from or to `peer`. Its time-out began at `started_s`."""
        self._waiting_since_s = started_s
        before_ns = time.monotonic_ns() if self.on_wait is not None else 0
        try:
            work.wait(_NO_TORCH_TIMEOUT)
        except RuntimeError as error:
            waited_s = time.monotonic() - started_s
            raise CommunicationError(peer, waited_s, "" if self._given_up else CONNECTION_GONE) from error
        finally:
            self._waiting_since_s = None
            if self.on_wait is not None:
                self.on_wait(peer, time.monotonic_ns() - before_ns)

    def look_after_wait(self) -> float:
        """Ends a wait that is in vain. Returns after how many seconds to look again."""
        started_s, timeout_s = self._waiting_since_s, self.timeout_s
        if started_s is not None and self._clock.is_over(started_s, timeout_s) and self._waiting_since_s == started_s:
            self._given_up = True
            self.abort()
        return min(_LONGEST_TICK_S, timeout_s / _TICKS_PER_TIMEOUT)

    def exchange_headers(self, header: Header) -> list[Header]:
        pending = self.start(header, [()] * self.size, [()] * self.size)
        pending.finish()
        return pending.headers()

    def start(self, header: Header, outgoing: Rows, incoming: Rows) -> GlooPending:
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
            raise CommunicationError(peer, 0.0, CONNECTION_GONE) from error

    def abort(self) -> None:
        """See `Communicator`.

        To let go of the backend is not enough: the call of a thread that is blocked keeps it, and with it the connections, so
        that the thread stayed until the peer acted. gloo's own `abort` and `shutdown` leave it there too (torch 2.13), but gloo
        closes all connections of a backend when any receive on it times out: so one is posted here that can only time out. One
        from each peer, since a connection that is gone already says so at once instead, and wakes nobody: of two ranks that gave
        up one after the other, the second stayed until the late rank came.
        """
        self._stopped.set()
        backend, self._backend = self._backend, _Closed()
        if isinstance(backend, _Closed) or self.size == 1 or os.getpid() != self._pid:
            return
        for peer in self.peers:
            with contextlib.suppress(RuntimeError):
                backend.recv([torch.zeros(1, dtype=torch.uint8, device="cpu")], peer, _NO_TAG).wait(_WAKE)

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
        words = header.words()
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
            self._communicator.wait(peer, work, self._start)


def _watch(communicator: weakref.ref[GlooCommunicator], stopped: threading.Event) -> None:
    """The thread. It keeps nothing alive."""
    tick_s = 0.0
    while not stopped.wait(tick_s):
        watched = communicator()
        if watched is None:
            return
        tick_s = watched.look_after_wait()
        del watched
