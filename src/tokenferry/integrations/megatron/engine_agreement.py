"""The engine's own agreement on a batch's shape, with an end: who waits in it for a peer that is gone would wait for ever.

Megatron's ranks agree on the largest batch before a step that may be a graph of equal counts, over ZMQ or over the device.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from tokenferry.errors import PeerTimeoutError
from tokenferry.integrations.megatron.process_groups import rank_of, size_of
from tokenferry.workspace import Workspace

_WHAT = "in Megatron's own agreement on the batch"
_POLL_S = 0.00002
_ON_ITS_WAY_MS = 100
"""After which a word that a peer sent before has come."""


def with_limit(communicator: Any, group: Any, workspaces: Sequence[Workspace]) -> Any:
    """What stands for `communicator`, Megatron's `AsyncZMQCommunicator` or None, in an agreement of `group`: it has the limit of
    the open workspaces, which break when that is over."""
    if size_of(group) == 1:
        return communicator
    return _OverDevice(group, workspaces) if communicator is None else _OverZmq(communicator, group, workspaces)


def drop_words(communicator: Any) -> None:
    """Takes out what peers have sent to a ZMQ communicator in an agreement that this rank left. Nobody sends meanwhile."""
    if communicator is None or communicator.world_size == 1:
        return
    socket = _receiving_end(communicator)
    while socket.poll(_ON_ITS_WAY_MS):
        socket.recv()


def _receiving_end(communicator: Any) -> Any:
    return communicator.gather_sock if communicator.is_leader else communicator.bcast_sock


class _Limited:
    def __init__(self, group: Any, workspaces: Sequence[Workspace]) -> None:
        self._group, self._workspaces = group, workspaces
        self._limit_s = min(workspace.timeout_s for workspace in workspaces)

    def _give_up(self, waited_s: float) -> NoReturn:
        """This rank's workspaces raise the time-out from now on, and the peers that come late hear of it.

        Raises:
            PeerTimeoutError, or the PeerFailedError of a peer that has given this rank up: then it is this one that came late.
        """
        for workspace in self._workspaces:
            workspace.check()
        late = 1 - rank_of(self._group) if size_of(self._group) == 2 else -1
        error = PeerTimeoutError(late, "not-entered", self._workspaces[0].last_step, -1, waited_s, _WHAT)
        for workspace in self._workspaces:
            workspace.give_up(error)
        raise error


class _OverZmq(_Limited):
    """A receive that lasts longer than the limit ends. What was sent is still on its way then: `drop_words` is for that."""

    def __init__(self, communicator: Any, group: Any, workspaces: Sequence[Workspace]) -> None:
        super().__init__(group, workspaces)
        self._communicator = communicator

    def sync_all_reduce_max(self, *values: int) -> Any:
        start_s = time.monotonic()
        too_long = importlib.import_module("zmq").Again
        try:
            with _receiving_for(self._limit_s, self._communicator):
                return self._communicator.sync_all_reduce_max(*values)
        except too_long:
            self._give_up(time.monotonic() - start_s)


@contextlib.contextmanager
def _receiving_for(limit_s: float, communicator: Any) -> Iterator[None]:
    socket = _receiving_end(communicator)
    before, socket.rcvtimeo = socket.rcvtimeo, max(1, int(limit_s * 1000))
    try:
        yield
    finally:
        socket.rcvtimeo = before


class _OverDevice(_Limited):
    """Megatron's own all-reduce, of which the host asks whether it has ended. If it does not, the group's communicator is of no
    use any more and is aborted, which lets the stream go on."""

    def sync_all_reduce_max(self, *values: int) -> tuple[int, ...]:
        start_s = time.monotonic()
        largest = torch.tensor(values, dtype=torch.int32, device=torch.cuda.current_device())
        work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None, "this rank is in the group"
        if not largest.is_cuda:
            try:
                work.wait(datetime.timedelta(seconds=self._limit_s))
            except RuntimeError:
                self._give_up(time.monotonic() - start_s)
            return tuple(largest.tolist())
        work.wait()
        on_host = torch.empty(len(values), dtype=torch.int32, device="cpu", pin_memory=True)
        on_host.copy_(largest, non_blocking=True)
        reached = torch.cuda.Event()
        reached.record()
        while not reached.query():
            waited_s = time.monotonic() - start_s
            if waited_s > self._limit_s:
                threading.Thread(target=self._abort, daemon=True, name="tokenferry-abort-ep-group").start()
                self._give_up(waited_s)
            if waited_s > 0.01:  # the step before it may still run
                time.sleep(_POLL_S)
        return tuple(on_host.tolist())

    def _abort(self) -> None:
        """May wait for graphs that were captured with the communicator, after its kernels have ended."""
        self._group._get_backend(torch.device("cuda")).abort()
