"""The collective transport's messages over NCCL: grouped sends and receives, one launch for all peers and tensors.

NCCL calls return before they have run, and one that waits for a dead peer never ends. A watchman thread looks at the
oldest unfinished call; after the time-out it aborts this communicator alone, which ends the kernel, and the next call of the
workspace raises. Ranks that wait post where they stand, so that the one that does not is known by number.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections import deque
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from tokenferry import env
from tokenferry.groups import EPGroup
from tokenferry.transports.communicator import HEADER_WORDS, CommunicationError, Header, Rows

_NO_TORCH_TIMEOUT = datetime.timedelta(days=30)
_POLL_S = 0.00002


@dataclass(frozen=True)
class _Call:
    """An operation on the stream that may not have finished."""

    number: int
    started_s: float
    event: torch.cuda.Event


class NcclCommunicator:
    """The same methods as `GlooCommunicator`."""

    def __init__(self, store: dist.Store, group: EPGroup, timeout_s: float, open_timeout_s: float) -> None:
        self.rank, self.size, self.device, self.timeout_s = group.rank, group.size, group.device, timeout_s
        self._store = store
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NO_TORCH_TIMEOUT
        with env.nccl_errors_stay_ours():
            self._backend: Any = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), self.rank, self.size, options)
        self._pinned = torch.zeros(self.size * HEADER_WORDS, dtype=torch.int64).pin_memory()
        self._watchman = _Watchman(self)
        # The first call makes the connections: it belongs to opening, not to the first step.
        first = Header(operation=-1, step=0, layer=-1, generation=0)
        self._exchange(first, open_timeout_s)
        self._watchman.start()

    def exchange_headers(self, header: Header) -> list[Header]:
        """See `GlooCommunicator`. The one place where the host waits for the device, once a step."""
        return self._exchange(header, self.timeout_s)

    def _exchange(self, header: Header, timeout_s: float) -> list[Header]:
        self.raise_if_broken()
        words = torch.tensor(astuple(header), dtype=torch.int64).to(self.device, non_blocking=True)
        gathered = words.new_empty(self.size * HEADER_WORDS)
        self._backend._allgather_base(gathered, words).wait()
        self._pinned.copy_(gathered, non_blocking=True)
        call = self._watchman.watch()
        while not call.event.query():
            self.raise_if_broken()
            waited_s = time.monotonic() - call.started_s
            if waited_s > timeout_s:
                raise self._watchman.late_rank(call, waited_s)
            time.sleep(_POLL_S if waited_s < 0.01 else 0.001)
        return [Header(*words) for words in self._pinned.view(self.size, HEADER_WORDS).tolist()]

    def start(self, header: Header, outgoing: Rows, incoming: Rows) -> NcclPending:
        """See `GlooCommunicator`. Capturable: during capture nothing is watched, the replay's caller checks."""
        self.raise_if_broken()
        backend, works = self._backend, []
        peers = [(self.rank + shift) % self.size for shift in range(1, self.size)]
        if any(tensor.numel() for peer in peers for tensor in (*outgoing[peer], *incoming[peer])):
            backend._start_coalescing()
            for peer in peers:
                for tensor in outgoing[peer]:
                    if tensor.numel():
                        backend.send([tensor], peer, 0)
                for tensor in incoming[peer]:
                    if tensor.numel():
                        backend.recv([tensor], peer, 0)
            works.append(backend._end_coalescing())
        return NcclPending(self, works)

    def reduce_scatter(self, out: torch.Tensor, rows: torch.Tensor) -> NcclPending:
        """The library's own reduce-scatter, for equal counts and `combine_order="any"`."""
        self.raise_if_broken()
        return NcclPending(self, [self._backend._reduce_scatter_base(out, rows)])

    def finished_call(self) -> None:
        """Has the watchman look at what was just put on the stream."""
        if not torch.cuda.is_current_stream_capturing():
            self._watchman.watch()

    def raise_if_broken(self) -> None:
        """Raises what the watchman found."""
        error = self._watchman.error
        if error is not None:
            raise error

    def post_position(self, number: int) -> None:
        """Tells the peers that this rank waits in call `number`."""
        self._store.set(f"waits/{number}/{self.rank}", json.dumps(True))

    def positions(self, number: int) -> list[bool]:
        """Which ranks have said that they wait in call `number`."""
        return [self._store.check([f"waits/{number}/{rank}"]) for rank in range(self.size)]

    def abort(self) -> None:
        """Drops the connections at once; never waits."""
        self._watchman.stop()
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.abort()

    def abort_backend(self) -> None:
        """Ends the kernels that wait; called by the watchman."""
        if self._backend is not None:
            self._backend.abort()


class NcclPending:
    """See `Pending`. Waiting is the stream's, not the host's."""

    def __init__(self, communicator: NcclCommunicator, works: list[Any]) -> None:
        self._communicator, self._works = communicator, works

    def headers(self) -> None:
        """NCCL carries headers in `begin_step` only."""
        return

    def finish(self) -> None:
        """See `Pending`."""
        for work in self._works:
            work.wait()
        if self._works:
            self._communicator.finished_call()


class _Watchman(threading.Thread):
    """Looks after calls that do not end."""

    def __init__(self, communicator: NcclCommunicator) -> None:
        super().__init__(daemon=True, name="tokenferry-nccl-watchman")
        self._communicator = communicator
        self._calls: deque[_Call] = deque()
        self._lock = threading.Lock()  # the calling thread and this one both drop finished calls
        self._number = 0
        self._ended = threading.Event()
        self.error: CommunicationError | None = None

    def watch(self) -> _Call:
        """Registers what stands on the current stream."""
        event = torch.cuda.Event()
        event.record()
        call = _Call(self._number, time.monotonic(), event)
        self._number += 1
        with self._lock:
            self._calls.append(call)
        self._oldest_unfinished()
        return call

    def _oldest_unfinished(self) -> _Call | None:
        with self._lock:
            while self._calls and self._calls[0].event.query():
                self._calls.popleft()
            return self._calls[0] if self._calls else None

    def run(self) -> None:
        torch.cuda.set_device(self._communicator.device)
        timeout_s, posted = self._communicator.timeout_s, -1
        while not self._ended.wait(min(1.0, timeout_s / 20)):
            call = self._oldest_unfinished()
            if call is None:
                continue
            waited_s = time.monotonic() - call.started_s
            if waited_s > timeout_s / 2 and posted != call.number:
                self._communicator.post_position(call.number)
                posted = call.number
            if waited_s > timeout_s:
                self.error = self.late_rank(call, waited_s)
                self._communicator.abort_backend()
                return

    def late_rank(self, call: _Call, waited_s: float) -> CommunicationError:
        """Names the first rank that does not wait in the same call; its own silence would have been broken by now."""
        present = self._communicator.positions(call.number)
        present[self._communicator.rank] = True
        late = present.index(False) if False in present else -1
        return CommunicationError(late, False, waited_s)

    def stop(self) -> None:
        """Ends the thread soon; does not wait for it."""
        self._ended.set()
