"""What passes between a workspace and its peers beside rows: checks, failures, and leaving."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import torch

from tokenferry.errors import PeerError, PeerFailedError, StateError, TokenferryError, check_kind
from tokenferry.graph_capture import is_capturing
from tokenferry.lifecycle import Lease, Lifecycle, Stage, WrongCallerError, logged
from tokenferry.operators import Operators
from tokenferry.step import Step, StepTensors
from tokenferry.transports.base import Transport, TransportSettings
from tokenferry.transports.busy import BusyBoard, SignsOfLife
from tokenferry.transports.settings import check_seconds
from tokenferry.waiting import Position

COUNTED_IN = "counted in"
"""Name in `attached` of the tensors that `count_in` was given."""


class PeerCalls:
    """The part of a `Workspace` that checks, fails, closes, and is a context manager. The workspace sets the attributes when it
    opens, and anew in `reset()`.

    Attributes:
        lifecycle: what may be called next.
        operators: the same calls for compiled code.
        attached: what the layers of this workspace share beside it, by name: the experts' scratch.
    """

    lifecycle: Lifecycle
    operators: Operators
    attached: dict[str, Any]
    _settings: TransportSettings
    _lease: Lease[Transport]
    _stand_in: Transport | None
    _step_tensors: StepTensors
    _step: Step | None
    _step_index: int
    _num_step_writes: int | None
    _captures = False

    def __init__(self) -> None:
        self._telling = threading.RLock()
        """Held while a thread beside the workspace's own uses the transport for `busy` and `set_timeout`, while it is closed, and
        while the settings are replaced. The lease would do, but a close that finds the lease used tells the peers that this rank
        is gone. `set_timeout` takes the lease too: a signal handler may close the workspace amid it, in its own thread."""
        self._signs = SignsOfLife()

    @property
    def timeout_s(self) -> float:
        """How long a peer may be late."""
        return self._settings.timeout_s

    @property
    def last_step(self) -> int:
        """The number of the last step that was begun by a call, 0 before the first. Replayed ones are counted on the device."""
        return self._step_index

    @property
    def is_capturing(self) -> bool:
        """Whether calls now go into a CUDA graph, so that nothing runs and no peer waits: inside `capturing()`, or while the
        current stream is captured."""
        return self._captures or is_capturing(self._settings.group.device)

    def count_in(self, *buffers: torch.Tensor) -> None:
        """Adds to `nbytes` what the code around the workspace keeps for its rows: buffers at fixed addresses, say, on a transport
        that has none. They are let go of when the workspace closes or is reset."""
        self.attached.setdefault(COUNTED_IN, []).extend(buffers)

    # --- what moves the rows ----------------------------------------------------------------------------------------

    @property
    def _transport(self) -> Transport:
        return self._lease.held

    @property
    def active_transport(self) -> Transport:
        """What dispatchers use: the transport, or its stand-in under `solo()`."""
        return self._lease.held if self._stand_in is None else self._stand_in

    # --- checks -----------------------------------------------------------------------------------------------------

    def check(self, *, wait: bool = True) -> None:
        """Raises what a peer, or this rank, has failed with. Call it after your own synchronisation, before trusting results.
        From any thread, also while another one is inside a call.

        Args:
            wait: ask the device and the peers' store too, which a call inside a capture never does. False: look at what lies in
                this host's memory alone, which waits for nothing and takes microseconds. That is everything that has failed in
                work with which the caller has synchronised before. It may lack what fails in work that still runs, and a failure
                that a peer has only just told of; the next call or step of this rank that meets the peer finds that.
        """
        self.lifecycle.require_usable("check")
        wait = wait and not self.is_capturing
        with self._lease as transport:
            if wait and self._settings.debug:
                self._check_step_unwritten()
            try:
                if wait:
                    transport.check()
                else:
                    transport.check_known()
            except PeerError as error:
                if transport is self._transport:  # another thread may have reset the workspace meanwhile
                    self.record_failure(error)
                raise

    def forget_step_writes(self) -> None:
        """Compiled code counts as a write to the counts where it begins a step; debug mode does not look at such a step."""
        self._num_step_writes = None

    def _check_step_unwritten(self) -> None:
        step, before = self._step, self._num_step_writes  # read once: `check` may come while another thread begins a step
        if self.lifecycle.stage is Stage.READY and before is not None and step is not None:
            self._step_tensors.check_unwritten(step, before)

    # --- patience ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def busy(self, reason: str) -> Iterator[None]:
        """Around what keeps this rank from its peers for long: compiling, capturing graphs, loading weights.

        Peers that wait for this rank within the block, in kernels and replayed graphs too, do not give it up: a thread gives
        signs of life, about four a second, with each of which their time-outs begin anew. They wait `open_timeout_s` in all at
        most (on symmetric transports half an hour). If the signs end, for this process has died or is stopped, they raise
        PeerTimeoutError as ever after `timeout_s`, with `reason` and for how long it was busy. A time-out should be a few seconds
        at least, since a compiler may hold up the thread.

        The block should not wait for peers itself: several ranks that do so, for a dead one, would put off one another's
        time-outs, up to `open_timeout_s`.

        From any thread, also within a capture; blocks may be nested. It waits for nobody and launches nothing on the caller's
        streams. To enter and leave takes a fraction of a millisecond: put it around a whole warm-up, not around a step.

        Example:
            with ws.busy("capturing 12 graphs"):
                runner.capture(forward, inputs)
        """
        check_kind("reason", reason, str)
        self.lifecycle.require_open("busy")
        if self._settings.group.size == 1:
            yield
            return
        with self._signs.during(reason, self):
            yield

    def give_sign_of_life(self, reason: str, busy_s: float) -> None:
        """One of those that `busy` gives."""
        with self._telling:
            if not self._lease.is_over:
                self._transport.give_sign_of_life()
        BusyBoard(self._settings).sign(reason, busy_s)

    def withdraw_signs_of_life(self) -> None:
        """As a block of `busy` ends."""
        BusyBoard(self._settings).withdraw()

    def set_timeout(self, timeout_s: float) -> None:
        """How long a peer may be late from now on, as seen by this rank: it counts in waits that are under way, in captured
        graphs, and after a reset. From any thread, within captures too. Ranks may have different ones.

        Raises:
            ConfigError: it is no number of seconds, or more than the transport can wait. Nothing has changed.
        """
        self.lifecycle.require_open("set_timeout")
        check_seconds("timeout_s", timeout_s)
        with self._telling:
            if not self._lease.is_over:
                with self._lease as transport:
                    transport.set_timeout(timeout_s)
            self._settings = dataclasses.replace(self._settings, timeout_s=timeout_s)

    # --- failures ---------------------------------------------------------------------------------------------------

    def fail(self, reason: str) -> None:
        """Tells the peers that this rank gives up: they, and from now on this rank, raise `PeerFailedError(rank, reason)`.
        From any thread, also while another one is inside a call, which then raises it too."""
        self.lifecycle.require_at_home("fail")
        if self.lifecycle.closed or self.lifecycle.error is not None:
            return
        with self._lease as transport:
            try:
                transport.fail(reason)
            finally:
                self.record_failure(PeerFailedError(self._settings.group.rank, reason, self._step_index))

    def give_up(self, error: PeerError) -> None:
        """`fail` for a peer that was missed outside of this workspace's calls: this rank raises `error` from now on, and the
        peers raise PeerFailedError for this rank, with the text of `error`."""
        if self.lifecycle.closed or self.lifecycle.error is not None:
            return
        self.record_failure(error)
        with logged("the peers could not be told why this rank gives up"), self._lease as transport:
            transport.fail(str(error))

    def tell_peers(self, error: BaseException) -> None:
        """`fail` for an exception that is on its way to the caller: never raises one of its own in its place. A peer's error is
        known to the peers, and the misuse by a second thread or a forked child is none of their business.

        Nor is a capture that failed: what it had captured of a step is forgotten, and the next step may begin."""
        if isinstance(error, PeerError | WrongCallerError) or not self.lifecycle.is_at_home:
            return
        if self.is_capturing:
            self.lifecycle.leave_step()
            return
        with logged("the peers could not be told why this rank gives up"):
            self.fail(f"{type(error).__name__}: {error}")

    def settle_engine_step(self, error: BaseException) -> None:
        """Called as `error` leaves an engine's step. A peer's failure that lies behind it is raised in its place: rows that
        nobody filled can make an engine raise anything. Any other error is told to the peers, who would wait in vain.

        Neither happens in a forked child or a capture, nor where the step's task was cancelled: that is how servers stop.
        """
        if isinstance(error, CancelledError | GeneratorExit) or self.is_capturing:
            return
        if isinstance(error, Exception) and not isinstance(error, TokenferryError) and self.lifecycle.is_at_home:
            try:
                self.check(wait=False)
            except PeerError as cause:
                raise cause from error
            except StateError:  # closed or broken by another thread: `error` says more
                return
        self.tell_peers(error)

    def record_failure(self, error: PeerError) -> None:
        """Breaks the workspace: every later call raises `error`, until a reset."""
        self._add_waits(error)
        self.lifecycle.fail(error)

    def _add_waits(self, error: BaseException) -> None:
        """What telemetry has seen of the last steps, for a peer's error that does not carry it yet."""
        recorder = self._settings.recorder
        if recorder is not None and isinstance(error, PeerError) and not error.waits:
            with logged("the waits of the last steps could not be read"):
                error.waits, error.reading = recorder.last_waits()

    def settle_failure(self, operation: str, error: BaseException) -> None:
        """Called as `error` leaves `operation`. Where nothing was launched, the workspace stands where it stood (after
        `begin_step` without a step). Else it is broken, and the peers, who wait for what will not come, are told; in a capture,
        where nothing runs, neither: the step is forgotten."""
        self._add_waits(error)
        self.lifecycle.settle(operation, error, self._lease, self._left_in_doubt)

    def _left_in_doubt(self) -> bool:
        if not self.active_transport.launched:
            return False
        if self.is_capturing:
            self.lifecycle.leave_step()
            return False
        return True

    # --- leaving ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Releases everything. On GPUs what this rank has launched ends first, which a late peer puts off by `timeout_s` at
        most; nothing else waits for a peer. Calling it again does nothing, nor does it in a forked child.

        From any thread. A call that another thread is inside of ends, by StateError where it waited for a peer, and what it
        uses is released as it ends; the peers get PeerFailedError then.
        """
        self.lifecycle.close(self._lease, self._give_back)

    def _give_back(self) -> None:
        self._settings.group.waiting.leave(self._settings.name)
        try:
            self.operators.release()
        finally:
            self.attached.clear()
            with self._telling:
                self._lease.end()

    def __enter__(self) -> Self:
        self.lifecycle.require_open("with")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            self.tell_peers(error)
        finally:
            with logged("the workspace could not be closed"):
                self.close()


def position_of(workspace: PeerCalls) -> Callable[[], Position | None]:
    """Tells where the workspace stands, without keeping it alive."""
    reference = weakref.ref(workspace)

    def look() -> Position | None:
        workspace = reference()
        if workspace is None or workspace.lifecycle.closed:
            return None
        lifecycle = workspace.lifecycle
        return Position(workspace._step_index, lifecycle.layer, lifecycle.stage.value, lifecycle.is_occupied)

    return look
