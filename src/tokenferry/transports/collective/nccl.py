"""The collective transport's messages over NCCL: grouped sends and receives, one launch for all peers and tensors.

NCCL calls return before they have run, and one that waits for a dead peer never ends. A watchman thread looks at the
oldest unfinished call; after the time-out it aborts this communicator alone, which ends the kernel, and the next call of the
workspace raises. Ranks that wait post where they stand, so that the one that does not is known by number.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from tokenferry import env
from tokenferry.groups import EPGroup
from tokenferry.transports.collective.gloo import HEADER_WORDS, CommunicationError, Header, Rows, leave_to_parent

_NO_TORCH_TIMEOUT = datetime.timedelta(days=30)
_POLL_S = 0.00002


@dataclass
class _Call:
    """An operation that may not have finished: its launch has not returned, or the stream has not reached `event` behind it."""

    number: int
    started_s: float
    event: torch.cuda.Event | None = None
    ended: bool = False

    def finished(self) -> bool:
        return self.ended or (self.event is not None and self.event.query())


class NcclCommunicator:
    """The same methods as `GlooCommunicator`."""

    def __init__(self, store: dist.Store, group: EPGroup, timeout_s: float, open_timeout_s: float) -> None:
        self.rank, self.size, self.device, self.timeout_s = group.rank, group.size, group.device, timeout_s
        self._store = store
        self._pid = os.getpid()
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NO_TORCH_TIMEOUT
        with env.nccl_errors_stay_ours():
            self._backend: Any = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), self.rank, self.size, options)
        self._pinned = torch.zeros(self.size * HEADER_WORDS, dtype=torch.int64, device="cpu").pin_memory()
        self._captured = False
        self._watchman = _Watchman(self, open_timeout_s)
        self._watchman.start()
        self._connect()
        self._watchman.timeout_s = timeout_s

    def _connect(self) -> None:
        """NCCL connects a pair of ranks at the first message between them, with the host waiting: that belongs to opening."""
        first = Header(operation=-1, step=0, layer=-1, generation=0)
        self.exchange_headers(first)
        word = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.start(first, [(word,)] * self.size, [(torch.empty_like(word),) for _ in range(self.size)]).finish()
        self.exchange_headers(first)

    def exchange_headers(self, header: Header) -> list[Header]:
        """See `GlooCommunicator`. The one place where the host waits for the device, once a step."""
        self.raise_if_broken()
        call = self._watchman.watch()
        words = torch.tensor(astuple(header), dtype=torch.int64, device="cpu").to(self.device, non_blocking=True)
        gathered = words.new_empty(self.size * HEADER_WORDS)
        self._backend._allgather_base(gathered, words).wait()
        self._pinned.copy_(gathered, non_blocking=True)
        self._watchman.launched(call)
        while not call.finished():
            self.raise_if_broken()
            time.sleep(_POLL_S if time.monotonic() - call.started_s < 0.01 else 0.001)
        self.raise_if_broken()
        return [Header(*words) for words in self._pinned.view(self.size, HEADER_WORDS).tolist()]

    def start(self, header: Header, outgoing: Rows, incoming: Rows) -> NcclPending:
        """See `GlooCommunicator`. Capturable: during capture nothing is watched, the replay's caller checks."""
        self.raise_if_broken()
        call, backend, works = self._watch(), self._backend, []
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
        self._launched(call)
        return NcclPending(self, works)

    def reduce_scatter(self, out: torch.Tensor, rows: torch.Tensor) -> NcclPending:
        """The library's own reduce-scatter, for equal counts and `combine_order="any"`."""
        self.raise_if_broken()
        call = self._watch()
        work = self._backend._reduce_scatter_base(out, rows)
        self._launched(call)
        return NcclPending(self, [work])

    def finish(self, works: list[Any]) -> None:
        """Makes the current stream wait for `works`, under the watchman's eyes."""
        call = self._watch()
        for work in works:
            work.wait()
        if call is not None:
            self._watchman.launched(call, on_stream=bool(works))

    @contextlib.contextmanager
    def watching_replay(self) -> Iterator[None]:
        """A captured call is nobody's to watch; its replay, launched in the block, is watched as one call."""
        self.raise_if_broken()
        call = self._watchman.watch()
        try:
            yield
        finally:
            self._watchman.launched(call)

    def _watch(self) -> _Call | None:
        if torch.cuda.is_current_stream_capturing():
            self._captured = True
            return None
        return self._watchman.watch()

    def _launched(self, call: _Call | None) -> None:
        if call is not None:
            self._watchman.launched(call, on_stream=False)

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
        if self._watchman.error is None:  # for a thread that is inside: what its calls leave behind is nobody's rows
            self._watchman.error = CommunicationError(-1, True, 0.0, "the communicator was closed")
        self._watchman.stop()
        backend, self._backend = self._backend, None
        if backend is None:
            return
        # NCCL's abort waits for the graphs that were captured with the communicator (seen with torch 2.11, 2026-11-22),
        # and those are the caller's: it ends in the background when they are gone.
        thread = threading.Thread(target=backend.abort, daemon=True, name="tokenferry-nccl-abort")
        thread.start()
        if not self._captured:
            thread.join(self.timeout_s)

    def __del__(self) -> None:
        leave_to_parent(getattr(self, "_backend", None), self._pid)

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
        self._communicator.finish(self._works)


class _Watchman(threading.Thread):
    """Looks after calls that do not end."""

    def __init__(self, communicator: NcclCommunicator, timeout_s: float) -> None:
        super().__init__(daemon=True, name="tokenferry-nccl-watchman")
        self._communicator, self.timeout_s = communicator, timeout_s
        self._calls: deque[_Call] = deque()
        self._lock = threading.Lock()  # the calling thread and this one both drop finished calls
        self._number = 0
        self._ended = threading.Event()
        self.error: CommunicationError | None = None

    def watch(self) -> _Call:
        """Registers a call that is about to be launched: the launch itself may wait for a peer."""
        call = _Call(self._number, time.monotonic())
        self._number += 1
        with self._lock:
            self._calls.append(call)
        return call

    def launched(self, call: _Call, *, on_stream: bool = True) -> None:
        """The launch of `call` returned; what stands on the current stream now belongs to it, or nothing does."""
        if on_stream:
            event = torch.cuda.Event()
            event.record()
            call.event = event
        else:
            call.ended = True
        self._oldest_unfinished()

    def _oldest_unfinished(self) -> _Call | None:
        with self._lock:
            while self._calls and self._calls[0].finished():
                self._calls.popleft()
            return self._calls[0] if self._calls else None

    def run(self) -> None:
        torch.cuda.set_device(self._communicator.device)
        posted = -1
        while not self._ended.wait(min(1.0, self._communicator.timeout_s / 20)):
            timeout_s = self.timeout_s
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
