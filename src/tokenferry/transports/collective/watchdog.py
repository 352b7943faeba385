"""The thread that looks after NCCL calls that do not end.

NCCL calls return before they have run, and one that waits for a dead peer never ends. The watchdog looks at the oldest unfinished
call; after the time-out it aborts the communicator, which ends the kernel, and the next call of the workspace raises. Ranks that
wait post in the store where they stand, so that the one that does not is known by number.

In an engine's step graphs may be replayed, in which no call is seen. The watchdog then puts events of its own on the engine's
stream, one after the other: one that is not reached within the time-out stands behind a kernel that waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tokenferry.errors import PeerFailedError
from tokenferry.transports.busy import WaitClock
from tokenferry.transports.collective.messages import CommunicationError

_log = logging.getLogger(__name__)

_LONGEST_TICK_S = 0.25
"""Between two looks: an engine's step is given up two of them after the time-out, at most."""
_QUICK_S = 0.1
"""A call that is under way for less is no reason to ask the store what the peers say."""
_CAPTURE_MODE_THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL of cuda.h."""


class _Watched(Protocol):
    """The communicator, as the watchdog knows it."""

    rank: int
    device: torch.device
    timeout_s: float
    """May change at any moment."""

    def post_position(self, number: int) -> None: ...
    def positions(self, number: int) -> list[bool]: ...
    def what_peers_said(self, waited_s: float) -> CommunicationError | None: ...
    def abort_backend(self) -> None: ...


@dataclass
class Call:
    """An operation that may not have finished: its launch has not returned, or the stream has not reached `event` behind it.
    Calls are numbered from 0 on, in the same order on all ranks, engine's steps from -1 downwards."""

    number: int
    started_s: float
    event: torch.cuda.Event | None = None
    ended: bool = False

    def finished(self) -> bool:
        """Whether it is over. Raises what CUDA says, a failed kernel's error too."""
        return self.ended or (self.event is not None and self.event.query())


class Watchdog(threading.Thread):
    """Looks after the calls of one communicator.

    A call is given up after the communicator's `timeout_s`, unless `clock` knows of signs of life.

    Attributes:
        error: what it found, for the next call of the workspace to raise. An exception of the thread's own stands here too: when
            it only ended the thread, nothing was aborted, and the host waited for ever.
    """

    def __init__(self, communicator: _Watched, clock: WaitClock) -> None:
        super().__init__(daemon=True, name="tokenferry-nccl-watchdog")
        self._communicator, self._clock = communicator, clock
        self._calls: deque[Call] = deque()
        self._lock = threading.Lock()  # the calling thread and this one both drop finished calls
        self._number = 0
        self._posted: int | None = None
        self._streams: list[torch.cuda.Stream] = []
        """Of the engine's steps that are under way, the innermost last."""
        self._step_number = 0
        self._mark: Call | None = None
        """The last event that the thread itself put on a step's stream."""
        self._stopped = threading.Event()
        self.error: CommunicationError | None = None

    # --- called by the thread that communicates ---------------------------------------------------------------------

    def watch(self) -> Call:
        """Registers a call that is about to be launched: the launch itself may wait for a peer."""
        call = Call(self._number, time.monotonic())
        self._number += 1
        with self._lock:
            self._calls.append(call)
        return call

    def launched(self, call: Call, *, on_stream: bool = True) -> None:
        """The launch of `call` returned; what stands on the current stream now belongs to it, or nothing does."""
        if on_stream:
            event = torch.cuda.Event()
            event.record()
            call.event = event
        else:
            call.ended = True
        self._oldest_unfinished()

    def enter_step(self) -> None:
        """An engine's step begins on the current stream."""
        if not self._streams:
            self._step_number -= 1
        self._streams.append(torch.cuda.current_stream(self._communicator.device))

    def leave_step(self) -> None:
        """It is over. What it has launched may still run, and is watched until it ends."""
        stream = self._streams.pop()
        if self._streams:
            return
        with contextlib.suppress(RuntimeError):  # a device that has failed says so in the engine's own next call
            if torch.cuda.is_current_stream_capturing() or stream.query():  # as a rule: the tokens are on the host
                return
            event = torch.cuda.Event()
            event.record(stream)
            with self._lock:
                self._calls.append(Call(self._step_number, time.monotonic(), event))
            self._oldest_unfinished()

    def is_idle(self) -> bool:
        """Whether all calls are over, on the device too. Raises what CUDA says. Takes no lock: a signal handler may close what
        its own thread is using."""
        return all(call.finished() for call in tuple(self._calls))

    def stop(self) -> None:
        """Ends the thread soon; does not wait for it."""
        self._stopped.set()

    # --- the thread -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Looks about until it is stopped, or has found something."""
        try:
            torch.cuda.set_device(self._communicator.device)
            _leave_captures_alone()
            while self.error is None and not self._stopped.wait(min(_LONGEST_TICK_S, self._communicator.timeout_s / 20)):
                self._look()
        except BaseException as problem:  # noqa: BLE001 - whatever it is, nobody would look after the calls any more
            told = f"its NCCL watchdog thread failed with {type(problem).__name__}: {problem}"
            _log.warning("rank %d: %s", self._communicator.rank, told, exc_info=True)
            self._give_up(CommunicationError(self._communicator.rank, 0.0, told))

    def _look(self) -> None:
        try:
            call = self._oldest_unfinished() or self._marked()
        except RuntimeError as problem:
            if "captur" in str(problem):  # another thread captures a graph in a way that forbids the question: asked again later
                return
            raise
        if call is None:
            return
        waited_s = time.monotonic() - call.started_s
        timeout_s = self._communicator.timeout_s
        if waited_s > timeout_s / 2 and self._posted != call.number:
            with contextlib.suppress(PeerFailedError):  # the store is lost; `_late_rank` says so if the call does not end
                self._communicator.post_position(call.number)
            self._posted = call.number
        if self._clock.is_over(call.started_s, timeout_s):
            self._give_up(self._late_rank(call, waited_s))
        elif waited_s > _QUICK_S and (said := self._communicator.what_peers_said(waited_s)) is not None:
            self._give_up(said)

    def _marked(self) -> Call | None:
        """What the stream of the engine's step has not done since an earlier look, with no call of ours under way. A new event is
        put there otherwise, which would be in the way of a capture and says nothing about it."""
        if self._mark is not None and not self._mark.finished():
            return self._mark
        self._mark = None
        for stream in self._streams[-1:]:
            with torch.cuda.stream(stream):
                if not torch.cuda.is_current_stream_capturing():
                    event = torch.cuda.Event()
                    event.record(stream)
                    self._mark = Call(self._step_number, time.monotonic(), event)
        return self._mark

    def _oldest_unfinished(self) -> Call | None:
        with self._lock:
            while self._calls and self._calls[0].finished():
                self._calls.popleft()
            return self._calls[0] if self._calls else None

    def _late_rank(self, call: Call, waited_s: float) -> CommunicationError:
        """Names the first rank that does not wait in the same call; its own silence would have been broken by now."""
        try:
            present = self._communicator.positions(call.number)
        except PeerFailedError as lost:
            return CommunicationError(lost.rank, waited_s, lost.reason)
        present[self._communicator.rank] = True
        late = present.index(False) if False in present else -1
        return CommunicationError(late, waited_s)

    def _give_up(self, error: CommunicationError) -> None:
        """Ends the kernels that wait. The error stands first: a thread that the abort wakes looks at it."""
        if self.error is None:
            self.error = error
        try:
            self._communicator.abort_backend()
        except Exception:  # noqa: BLE001 - the host raises `error` all the same
            _log.warning("rank %d: the NCCL communicator could not be aborted", self._communicator.rank, exc_info=True)


def _leave_captures_alone() -> None:
    """Lets the calling thread ask for events while another one captures a CUDA graph in mode "global", torch's default: that mode
    forbids it to every thread that has not said otherwise, and the question would fail and invalidate the user's capture. torch
    has no call for it."""
    driver: Any
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_CAPTURE_MODE_THREAD_LOCAL)))
    except (OSError, AttributeError):  # no such library or function here; `_look` asks again after the capture
        return
