"""The collective transport's messages over NCCL, one launch each: grouped sends and receives, and for equal counts all-gathers
and the reduce-scatter."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, ReduceScatterOptions

from tokenferry import env
from tokenferry.channel import RendezvousStore
from tokenferry.errors import PeerFailedError
from tokenferry.groups import EPGroup
from tokenferry.transports.base import AbortRecord
from tokenferry.transports.busy import WaitClock
from tokenferry.transports.collective.messages import (
    HEADER_WORDS,
    CommunicationError,
    Communicator,
    Header,
    Rows,
    leave_to_parent,
)
from tokenferry.transports.collective.watchdog import Call, Watchdog

_NO_TORCH_TIMEOUT = datetime.timedelta(days=30)
_POLL_S = 0.00002
_GRACE_S = 1.0
"""For the watchdog's own looks, after the time-out."""
_AT_EXIT_S = 2.0
"""How long the interpreter's end waits for an abort in the background. It waits in vain where captured graphs are still alive."""


class NcclCommunicator(Communicator):
    """See `Communicator`. A watchdog looks after the calls. `peers_record`: the abort record of the workspace, if a peer has
    written one; the watchdog asks while a call waits, so that a peer that has given up is not waited for."""

    def __init__(
        self,
        store: RendezvousStore,
        group: EPGroup,
        timeout_s: float,
        open_timeout_s: float,
        peers_record: Callable[[], AbortRecord | None] = lambda: None,
        clock: WaitClock | None = None,
    ) -> None:
        self.rank, self.size, self.device, self.timeout_s = group.rank, group.size, group.device, open_timeout_s
        self._store, self._peers_record = store, peers_record
        self._pid = os.getpid()
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NO_TORCH_TIMEOUT
        with env.nccl_errors_stay_ours():
            self._backend: Any = dist.ProcessGroupNCCL(store.under("nccl").store, self.rank, self.size, options)
        self._pinned = torch.zeros(self.size * HEADER_WORDS, dtype=torch.int64, device="cpu").pin_memory()
        self._captured = False
        # Without these calls run on a stream of the backend's, which costs the host two events and two waits.
        self._gathers_here, self._reduces_here = AllgatherOptions(), ReduceScatterOptions()
        self._gathers_here.asyncOp = self._reduces_here.asyncOp = False
        self._watchdog = Watchdog(self, clock or WaitClock(lambda: 0, open_timeout_s))
        self._watchdog.start()
        self._connect()
        self.timeout_s = timeout_s

    def _connect(self) -> None:
        """NCCL connects a pair of ranks at the first message between them, with the host waiting: that belongs to opening."""
        first = Header(operation=-1, step=0, layer=-1, generation=0)
        self.exchange_headers(first)
        word = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.start(first, [(word,)] * self.size, [(torch.empty_like(word),) for _ in range(self.size)]).finish()
        self.exchange_headers(first)

    def exchange_headers(self, header: Header) -> list[Header]:
        """See `Communicator`. The one place where the host waits for the device, once a step."""
        self.raise_if_broken()
        call = self._watchdog.watch()
        words = header.words().to(self.device, non_blocking=True)
        gathered = words.new_empty(self.size * HEADER_WORDS)
        self._backend._allgather_base(gathered, words).wait()
        self._pinned.copy_(gathered, non_blocking=True)
        self._watchdog.launched(call)
        while not call.finished():
            self.raise_if_broken()
            time.sleep(_POLL_S if time.monotonic() - call.started_s < 0.01 else 0.001)
        self.raise_if_broken()
        return [Header(*words) for words in self._pinned.view(self.size, HEADER_WORDS).tolist()]

    def start(self, header: Header, outgoing: Rows, incoming: Rows) -> NcclPending:
        """See `Communicator`. Capturable: during capture nothing is watched, the replay's caller checks."""
        self.raise_if_broken()
        call, backend, works = self._watch(), self._backend, []
        peers = self.peers
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

    def all_gather(self, gathered: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], *, overlaps: bool) -> NcclPending:
        """See `Communicator`."""
        options = () if overlaps else (self._gathers_here,)

        def gather() -> Any:
            backend = self._backend
            backend._start_coalescing()
            for out, own in zip(gathered, rows, strict=True):
                backend._allgather_base(out, own, *options)
            return backend._end_coalescing()

        return self._collectively(gather, overlaps=overlaps)

    def reduce_scatter(self, out: torch.Tensor, rows: torch.Tensor, *, overlaps: bool) -> NcclPending:
        """See `Communicator`."""
        options = () if overlaps else (self._reduces_here,)
        return self._collectively(lambda: self._backend._reduce_scatter_base(out, rows, *options), overlaps=overlaps)

    def _collectively(self, launch: Callable[[], Any], *, overlaps: bool) -> NcclPending:
        """Launches under the watchdog's eyes. What does not overlap stands on the current stream: nothing is left to finish."""
        self.raise_if_broken()
        call = self._watch()
        work = launch()
        if call is not None:
            self._watchdog.launched(call, on_stream=not overlaps)
        return NcclPending(self, [work] if overlaps else None)

    def finish(self, works: list[Any]) -> None:
        """Makes the current stream wait for `works`, under the watchdog's eyes."""
        call = self._watch()
        for work in works:
            work.wait()
        if call is not None:
            self._watchdog.launched(call, on_stream=bool(works))

    @contextlib.contextmanager
    def watching_replay(self) -> Iterator[None]:
        """A captured call is nobody's to watch; its replay, launched in the block, is watched as one call."""
        self.raise_if_broken()
        call = self._watchdog.watch()
        try:
            yield
        finally:
            self._watchdog.launched(call)

    @contextlib.contextmanager
    def watching_step(self) -> Iterator[None]:
        """See `Communicator`."""
        self._watchdog.enter_step()
        try:
            yield
        finally:
            self._watchdog.leave_step()

    def _watch(self) -> Call | None:
        if torch.cuda.is_current_stream_capturing():
            self._captured = True
            return None
        return self._watchdog.watch()

    def _launched(self, call: Call | None) -> None:
        if call is not None:
            self._watchdog.launched(call, on_stream=False)

    def raise_if_broken(self) -> None:
        """Raises what the watchdog found."""
        error = self._watchdog.error
        if error is not None:
            raise error

    def post_position(self, number: int) -> None:
        """Tells the peers that this rank waits in call `number`."""
        self._store.set(f"waits/{number}/{self.rank}", json.dumps(True))

    def positions(self, number: int) -> list[bool]:
        """Which ranks have said that they wait in call `number`."""
        return [self._store.has(f"waits/{number}/{rank}") for rank in range(self.size)]

    def what_peers_said(self, waited_s: float) -> CommunicationError | None:
        """Why a peer gave up, if it has said so."""
        try:
            record = self._peers_record()
        except PeerFailedError:  # the store is lost; after the time-out that is said
            return None
        if record is None:
            return None
        return CommunicationError(record.rank, waited_s, record.reason or f"rank {record.reporter} gave up ({record.phase})")

    def let_launched_end(self) -> None:
        """See `Communicator`. Aborting amid a reduce-scatter left rows in the caller's tensor that nobody had summed, and a peer
        that waited for ours. The watchdog bounds the wait: it aborts for a peer that does not come. The limit here is for a
        watchdog that waits itself, for a store whose host is stopped."""
        started_s = time.monotonic()
        with contextlib.suppress(RuntimeError):  # a device that has failed says so in the caller's own next call
            while self._backend is not None and self._watchdog.error is None and not self._watchdog.is_idle():
                waited_s = time.monotonic() - started_s
                if waited_s > self.timeout_s + _GRACE_S:
                    return
                time.sleep(_POLL_S if waited_s < 0.01 else 0.001)

    def abort(self) -> None:
        if self._watchdog.error is None:  # for a thread that is inside: what its calls leave behind is nobody's rows
            self._watchdog.error = CommunicationError(-1, 0.0, "the communicator was closed")
        self._watchdog.stop()
        backend, self._backend = self._backend, None
        if backend is None:
            return
        # NCCL's abort waits for the graphs that were captured with the communicator (seen with torch 2.11, 2026-11-22),
        # and those are the caller's: it ends in the background when they are gone.
        thread = threading.Thread(target=backend.abort, daemon=True, name="tokenferry-nccl-abort")
        thread.start()
        if not self._captured:
            thread.join(self.timeout_s)
        else:
            # A thread that returns from C++ while Python is torn down is ended in the middle of a destructor, and with it the
            # process: "terminate called without an active exception" in a rank that dropped its graphs, closed and left at
            # once (torch 2.11, Python 3.12, 2026-11-26).
            atexit.register(thread.join, _AT_EXIT_S)

    def __del__(self) -> None:
        leave_to_parent(getattr(self, "_backend", None), self._pid)

    def abort_backend(self) -> None:
        """Ends the kernels that wait; called by the watchdog."""
        if self._backend is not None:
            self._backend.abort()


class NcclPending:
    """See `Pending`. Waiting is the stream's, not the host's. `works` is None for what stands on the current stream."""

    def __init__(self, communicator: NcclCommunicator, works: list[Any] | None) -> None:
        self._communicator, self._works = communicator, works

    def headers(self) -> None:
        """NCCL carries headers in `begin_step` only."""
        return

    def finish(self) -> None:
        """See `Pending`."""
        if self._works is None:
            self._communicator.raise_if_broken()
        else:
            self._communicator.finish(self._works)
