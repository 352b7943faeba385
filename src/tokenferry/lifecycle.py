"""What a workspace may be asked next, by whom, and when what it holds is given back: shared by every transport."""

from __future__ import annotations

import contextlib
import copy
import enum
import logging
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, SupportsIndex, TypeVar

from tokenferry.errors import PeerError, StateError, TokenferryError

_log = logging.getLogger(__name__)

PROGRESS = "tokenferry.progress"
"""The logger, of level INFO, that is told what a rank begins to do while it starts up: the command line shows it."""

_MADV_WIPEONFORK = 18
"""Linux's number; Python's mmap module has no name for it before 3.13."""


class Stage(enum.Enum):
    """Where an open workspace stands."""

    NO_STEP = "without a step"
    READY = "ready for a dispatch"
    DISPATCHING = "between dispatch_begin and dispatch_end"
    DISPATCHED = "between a dispatch and its combine"
    COMBINING = "between combine_begin and combine_end"


_NEXT = {
    "dispatch_begin": (Stage.READY, Stage.DISPATCHING),
    "dispatch_end": (Stage.DISPATCHING, Stage.DISPATCHED),
    "combine_input": (Stage.DISPATCHED, Stage.DISPATCHED),
    "combine_begin": (Stage.DISPATCHED, Stage.COMBINING),
    "combine_end": (Stage.COMBINING, Stage.READY),
}
_REMEDY = {
    Stage.NO_STEP: "call begin_step() once per model forward, first",
    Stage.READY: "call dispatch_begin() or dispatch() first",
    Stage.DISPATCHING: "call dispatch_end() of the same dispatcher",
    Stage.DISPATCHED: "call combine() of the same dispatcher, on every rank",
    Stage.COMBINING: "call combine_end() of the same dispatcher",
}


class WrongCallerError(StateError):
    """The call comes from a second thread or a forked child. It is raised to that caller alone; the peers never hear of it."""


class DispatchHandle:
    """Identifies one dispatch; compared by identity."""

    __slots__ = ("layer",)

    def __init__(self, layer: int) -> None:
        self.layer = layer


@contextlib.contextmanager
def logged(what: str) -> Iterator[None]:
    """An exception inside, such as a store's or a driver's, is logged and goes no further: another one is on its way to the
    caller, who must see that one."""
    try:
        yield
    except Exception as problem:  # noqa: BLE001
        _log.warning("%s: %s: %s", what, type(problem).__name__, problem)


class _Closable(Protocol):
    def close(self) -> None: ...


class _Transport(_Closable, Protocol):
    def fail(self, reason: str) -> None: ...
    def abort(self) -> None: ...


Held = TypeVar("Held", bound=_Closable)
HeldTransport = TypeVar("HeldTransport", bound=_Transport)


class Lease(Generic[Held]):
    """An open transport, say. Threads use it inside `with`; it is closed once `end` was called and the last of them has left.

    Each user registers before it looks at `_ended`, and `end` sets that before it looks for users, so that one of the two sees
    the other, without a lock: a signal handler may close what its own thread is using.
    """

    def __init__(self, held: Held) -> None:
        self.held = held
        self._users: deque[None] = deque()
        self._ended = False
        self._closing = threading.Lock()  # taken by whoever closes, and kept

    @property
    def is_used(self) -> bool:
        """Whether a thread is inside `with`."""
        return bool(self._users)

    @property
    def is_over(self) -> bool:
        """Whether `end` was called."""
        return self._ended

    def __enter__(self) -> Held:
        self._users.append(None)
        if self._ended:
            self.__exit__()
            raise WrongCallerError("the workspace is being closed or reset, by another thread; wait for that thread")
        return self.held

    def __exit__(self, *_: object) -> None:
        self._users.pop()
        if self._ended:
            self._close_if_unused()

    def end(self) -> None:
        """Nobody may enter any more. Calling it again does nothing."""
        self._ended = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if not self._users and self._closing.acquire(False):
            self.held.close()


class Lifecycle:
    """Stages NO_STEP -> READY -> DISPATCHING -> DISPATCHED -> COMBINING -> READY ..., and beside them two facts that every call
    looks at first: an error that stays until a reset, and `closed`, which stays for ever.

    One thread at a time is inside a call; between calls a workspace may go from thread to thread, as servers' steps do. Closing
    may come from any thread while another one is inside: what the workspace holds is given back as that one leaves.
    """

    def __init__(self) -> None:
        self.stage = Stage.NO_STEP
        self.layer = -1
        self.gathered_rows = 0  # R of the dispatch under way
        self.handle: DispatchHandle | None = None
        self.error: TokenferryError | None = None
        self.closed = False
        self._give_back: Callable[[], None] | None = None
        self._inside = threading.Lock()  # taken without waiting: 0.1 microseconds a call
        self._pid = os.getpid()
        self._home = _wiped_by_fork()  # [0] is 0 in a forked child

    # --- who may call -----------------------------------------------------------------------------------------------

    def enter(self, operation: str) -> None:
        """The calling thread is inside until `leave`. Raises WrongCallerError if another one is (its rows would mix with these),
        or in a forked child; StateError if the workspace was closed."""
        if not self._home[0] or not self._inside.acquire(False):
            self.require_open(operation)
            raise WrongCallerError(
                f"{operation}: another thread is inside a call on this workspace; let one thread at a time use it, or open a "
                "second workspace for the other"
            )

    def try_enter(self) -> bool:
        """`enter` without an error: False where it would raise."""
        return self._home[0] != 0 and self._inside.acquire(False)

    def leave(self) -> None:
        """The call that `enter` began is over."""
        self._inside.release()
        if self.closed:
            self.give_back_if_free()

    @property
    def is_occupied(self) -> bool:
        """Whether a thread is inside."""
        return self._inside.locked()

    @property
    def is_at_home(self) -> bool:
        """False in a forked child of the process that opened the workspace."""
        return self._home[0] != 0

    def require_at_home(self, what: str) -> None:
        """Raises WrongCallerError in a forked child: connections and memory are its parent's."""
        if not self._home[0]:
            raise WrongCallerError(
                f"{what}: the workspace was opened in another process (pid {self._pid}, this is {os.getpid()}); a forked child "
                "must leave its parent's alone and open its own, on a group of its own"
            )

    def require_open(self, what: str) -> None:
        """Raises StateError if closed, or in a forked child."""
        self.require_at_home(what)
        if self.closed:
            raise StateError(f"{what}: the workspace is closed; open a new Workspace")

    def require_usable(self, what: str) -> None:
        """`require_open`, and raises the error that broke the workspace."""
        self.require_open(what)
        if self.error is not None:
            raise copy.copy(self.error)  # an exception that is raised again keeps the frames, and so the tensors, of both times

    # --- closing ----------------------------------------------------------------------------------------------------

    def close(self, lease: Lease[HeldTransport], give_back: Callable[[], None]) -> None:
        """From here on every call says "closed". Does nothing if that was so before, nor in a forked child.

        Whoever is inside is woken. `give_back` runs once: here, or as the thread that is inside leaves.
        """
        if self.closed or not self._home[0]:
            return
        self._give_back = give_back
        self.closed = True
        if self._inside.locked() or lease.is_used:
            with contextlib.suppress(WrongCallerError), lease as transport:  # suppressed: they have left, and it is closed
                transport.abort()
        self.give_back_if_free()

    def give_back_if_free(self) -> None:
        """Gives back what a closed workspace holds, unless a thread is inside. Nobody comes in any more after that."""
        if self._inside.acquire(False):
            give_back, self._give_back = self._give_back, None
            if give_back is not None:
                give_back()

    # --- failing ----------------------------------------------------------------------------------------------------

    def fail(self, error: PeerError) -> None:
        """Every call raises `error` from now on, until the workspace is reset."""
        if self.error is None:
            self.error = copy.copy(error)

    def break_off(self, operation: str, error: BaseException) -> None:
        """`error` came out of `operation` when it had changed what cannot be changed back: every call says so until a reset."""
        if isinstance(error, PeerError):
            self.fail(error)
        elif self.error is None:
            self.error = StateError(
                f"the workspace is broken since {operation} raised {type(error).__name__}: {error}; call reset() on every rank "
                "that goes on, or close()"
            )

    def settle(self, operation: str, error: BaseException, lease: Lease[HeldTransport], launched: Callable[[], bool]) -> None:
        """Called as `error` leaves `operation`: see `Workspace.settle_failure`. Where another thread has closed or broken the
        workspace meanwhile, raises that in the place of what a library says whose connections are gone."""
        if isinstance(error, PeerError):
            self.fail(error)
        elif self.closed or self.error is not None:
            if isinstance(error, TokenferryError) or not isinstance(error, Exception):
                return
            if self.error is None:
                raise StateError(f"{operation}: the workspace was closed by another thread meanwhile") from error
            raise copy.copy(self.error) from error
        elif not isinstance(error, WrongCallerError) and launched():
            self.break_off(operation, error)
            with logged("the peers could not be told why this rank gives up"), lease as transport:
                transport.fail(f"{operation} raised {type(error).__name__}: {error}")

    def restart(self) -> None:
        """As after opening. A closed workspace stays closed."""
        self.error, self.gathered_rows = None, 0
        self.leave_step()

    # --- order ------------------------------------------------------------------------------------------------------

    def begin_step(self, called: str) -> None:
        """Whether a step may begin; changes nothing. `called`: what the caller called, for messages."""
        self.require_usable(called)
        if self.stage not in (Stage.NO_STEP, Stage.READY):
            raise StateError(f"{called}: the workspace is {self.stage.value} in layer {self.layer}; {_REMEDY[self.stage]}")

    def enter_ready(self) -> None:
        """A step's counts are known."""
        self.stage, self.layer, self.handle = Stage.READY, -1, None

    def leave_step(self) -> None:
        """The step's counts are gone."""
        self.stage, self.layer, self.handle = Stage.NO_STEP, -1, None

    def require(self, operation: str, layer: int, called: str = "") -> None:
        """Whether `operation` of dispatcher `layer` may come now; changes nothing.

        `called`: what the caller called, for messages.
        """
        called = called or operation
        self.require_usable(called)
        expected, _ = _NEXT[operation]
        if self.stage is not expected:
            owner = f" in layer {self.layer}" if self.layer >= 0 else ""
            raise StateError(f"{called} in layer {layer}: the workspace is {self.stage.value}{owner}; {_REMEDY[self.stage]}")
        if operation != "dispatch_begin" and layer != self.layer:
            raise StateError(
                f"{called} was called on the dispatcher of layer {layer}, but the dispatch under way is layer {self.layer}'s; "
                "use one dispatcher for a layer's dispatch and combine, or a second workspace for two layers in flight"
            )

    def advance(self, operation: str, layer: int) -> None:
        """Takes the step that `require` allowed, after the transport has done its part: until then nothing needs undoing."""
        _, self.stage = _NEXT[operation]
        if operation == "dispatch_begin":
            self.layer, self.handle = layer, DispatchHandle(layer)
        elif operation == "combine_begin":
            self.handle = None
        elif operation == "combine_end":
            self.layer = -1

    def allows(self, stage: Stage) -> bool:
        """Whether the workspace stands at `stage` and works. The quick form of `require`, which says what is wrong."""
        return self.stage is stage and self.error is None and not self.closed


class _Home(Protocol):
    def __getitem__(self, index: SupportsIndex, /) -> int: ...


class _ByPid:
    """`_wiped_by_fork` for systems that cannot wipe a page."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def __getitem__(self, _: SupportsIndex, /) -> int:
        return int(os.getpid() == self._pid)


def _wiped_by_fork() -> _Home:
    """Its byte 0 is 1 here, and 0 in every forked child, where Linux wipes the page. To read it takes 0.02 to 0.04 microseconds;
    to ask for the process's number, 0.05 to 0.26, which every call would pay."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_MADV_WIPEONFORK)
    except (OSError, AttributeError, TypeError, ValueError):
        return _ByPid()
    page[0] = 1
    return page
