"""One thread at a time uses a model: the steps of two would mix, and the other ranks would have to follow."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

from tokenferry.errors import StateError

_LOOK_AGAIN_S: Final = 1.0


class OneThread:
    """Belongs to one thread from its first `enter` to its last `leave`. Another thread gets a StateError, or waits.

    Args:
        waits: another thread waits until the first is through.
    """

    def __init__(self, *, waits: bool) -> None:
        self._waits = waits
        self._changed = threading.Condition()
        self._owner: threading.Thread | None = None
        self._depth = 0
        self._takes_guest = False
        self._guest: threading.Thread | None = None

    def is_mine(self) -> bool:
        """Whether the calling thread is inside."""
        return threading.current_thread() in (self._owner, self._guest)

    def enter(self, what: str, *, as_guest: bool = False) -> None:
        """The calling thread is inside, or once more.

        Args:
            what: the call, for the message.
            as_guest: it may be the thread for which the owner waits in `hosting`.

        Raises:
            StateError: another thread is inside, and this one shall not wait.
        """
        me = threading.current_thread()
        with self._changed:
            while not self._admits(me, as_guest):
                if not self._waits:
                    name = "" if self._owner is None else f" ({self._owner.name})"
                    raise StateError(
                        f"{what}: another thread{name} is in the middle of a call on this model; let one thread at a time use "
                        "the model, or load it with serialize=True, and the second waits for the first"
                    )
                self._changed.wait(_LOOK_AGAIN_S)
            self._depth += 1

    def try_enter(self) -> bool:
        """`enter` for a thread that has nothing urgent to do: False where another one is inside, also one that hosts this one."""
        me = threading.current_thread()
        with self._changed:
            if me is self._guest or not self._admits(me, as_guest=False):
                return False
            self._depth += 1
            return True

    def leave(self) -> None:
        """Undoes one `enter` of the calling thread."""
        with self._changed:
            if not self.is_mine():  # a guest that its host did not wait for
                return
            self._depth -= 1
            if self._depth == 0:
                self._owner = None
                self._changed.notify_all()

    @contextlib.contextmanager
    def inside(self, what: str) -> Iterator[None]:
        """`enter` and `leave`."""
        self.enter(what)
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def hosting(self, what: str) -> Iterator[None]:
        """As `inside`; within it the calling thread only waits for another one, which runs the model as its guest."""
        with self.inside(what):
            depth, self._takes_guest = self._depth, True
            try:
                yield
            finally:
                with self._changed:
                    self._depth, self._takes_guest, self._guest = depth, False, None

    def _admits(self, thread: threading.Thread, as_guest: bool) -> bool:
        """Makes `thread` the owner or the guest if nobody else is."""
        if thread in (self._owner, self._guest):
            return True
        if self._owner is None or not self._owner.is_alive():  # a thread that ended in mid-step does not come back
            self._owner, self._depth = thread, 0
            return True
        if as_guest and self._takes_guest and self._guest is None:
            self._guest = thread
            return True
        return False
