"""Ranks that are busy elsewhere for minutes (they compile, or capture graphs), and are waited for all the same.

A busy rank gives a sign of life several times a second, from a thread of its own. Where a peer waits, its time-out begins anew
with each sign, whichever rank gave it: a rank that waits for a busy one is itself waited for. Kernels find the signs in the
control block; hosts, and whoever writes an error, in the group's store.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tokenferry.errors import PeerError
from tokenferry.transports.base import TransportSettings

_log = logging.getLogger(__name__)

LONGEST_PERIOD_S: Final = 0.25
"""Between two signs. A compiler that holds Python's interpreter lock for seconds delays them, which time-outs of 30 s allow."""
_PERIODS_PER_TIMEOUT: Final = 8
_FAREWELL_S: Final = 1.0


class BusyBoard:
    """What the ranks of a workspace say in the group's store about being busy. Its calls raise PeerFailedError where the store is
    lost."""

    def __init__(self, settings: TransportSettings) -> None:
        self._store = settings.group.rendezvous.under(f"{settings.name}/busy")
        self._rank, self._size = settings.group.rank, settings.group.size

    def sign(self, reason: str, busy_s: float) -> None:
        """A sign of life of this rank, which has been busy with `reason` for so long."""
        self._store.set(str(self._rank), json.dumps([reason, busy_s]))
        self._store.add(f"signs/{self._rank}", 1)
        self._store.add("signs", 1)

    def withdraw(self) -> None:
        """This rank is busy no longer."""
        self._store.set(str(self._rank), json.dumps(None))

    def num_peers_signs(self) -> int:
        """How many signs the other ranks have given. It may fall short of one that this rank gives at the moment, never count it:
        a rank that waits within its own block would wait for itself otherwise."""
        of_all = self._store.add("signs", 0)  # first: `sign` counts this one last
        return of_all - self._store.add(f"signs/{self._rank}", 0)

    def in_words(self, reporter: int) -> str:
        """Who has been busy up to now, or until its signs ended, beside the rank that reports a late one; empty if nobody, or the
        store is lost. For errors."""
        try:
            words = {rank: self._word(str(rank)) for rank in range(self._size) if rank != reporter}
        except PeerError:
            return ""
        return "; ".join(
            f"rank {rank} was busy with {word[0]!r} for {word[1]:.1f} s when it last gave a sign of life"
            for rank, word in words.items()
            if word is not None
        )

    def _word(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.has(key) else None


@dataclass
class _Reason:
    text: str
    since_s: float


class Busy(Protocol):
    """A workspace that can be busy."""

    @property
    def timeout_s(self) -> float:
        """As it is at the moment."""

    def give_sign_of_life(self, reason: str, busy_s: float) -> None:
        """Gives one sign: this rank has been busy with `reason` for so long."""

    def withdraw_signs_of_life(self) -> None:
        """This rank is busy no longer."""


class SignsOfLife:
    """Gives the signs of a workspace for as long as it is busy. It holds nothing between blocks: a workspace that is dropped
    goes at once, with its memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reasons: list[_Reason] = []
        """The innermost last."""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def during(self, text: str, workspace: Busy) -> Iterator[None]:
        """Signs are given within the block. Blocks may be nested, and entered by several threads."""
        reason = _Reason(text, time.monotonic())
        with self._lock:
            self._reasons.append(reason)
            if self._thread is None:
                self._stopped = threading.Event()
                arguments = (workspace, self._stopped)
                self._thread = threading.Thread(target=self._run, args=arguments, daemon=True, name="tokenferry-busy")
                self._thread.start()
        try:
            yield
        finally:
            self._end(reason, workspace)

    def _end(self, reason: _Reason, workspace: Busy) -> None:
        with self._lock:
            self._reasons.remove(reason)
            if self._reasons:
                return
            thread, self._thread = self._thread, None
            self._stopped.set()
        if thread is not None:
            thread.join(_FAREWELL_S)  # a sign that is being given would otherwise come after the word that withdraws it
        try:
            workspace.withdraw_signs_of_life()
        except PeerError as problem:
            _log.warning("the peers could not be told that this rank is busy no longer: %s", problem)

    def _run(self, workspace: Busy, stopped: threading.Event) -> None:
        told = False
        while True:
            with self._lock:
                reason = self._reasons[-1] if self._reasons and not stopped.is_set() else None
            if reason is None:
                return
            try:
                workspace.give_sign_of_life(reason.text, time.monotonic() - reason.since_s)
            except Exception as problem:  # noqa: BLE001 - a lost store, say: the next sign may come through
                if not told:
                    _log.warning("a sign of life could not be given: %s: %s", type(problem).__name__, problem)
                told = True
            stopped.wait(min(LONGEST_PERIOD_S, workspace.timeout_s / _PERIODS_PER_TIMEOUT))


class WaitClock:
    """Whether a wait of this host is in vain. Half a time-out passes before the store is asked: ordinary waits ask nothing.

    Args:
        num_signs: `BusyBoard.num_peers_signs`.
        longest_s: what signs of life can make of a time-out.
    """

    def __init__(self, num_signs: Callable[[], int], longest_s: float) -> None:
        self._num_signs, self._longest_s = num_signs, longest_s
        self._started_s: float | None = None
        self._since_s = 0.0
        self._seen: int | None = None

    def is_over(self, started_s: float, timeout_s: float) -> bool:
        """Whether the wait that began at `started_s` (of `time.monotonic`) has had no sign for `timeout_s`, or takes too long in
        any case. To be asked several times in a time-out, about one wait after the other. The first answer after half of it is
        no: a process that was stopped for long, and is woken, has what came meanwhile still to receive."""
        now_s = time.monotonic()
        if started_s != self._started_s:
            self._started_s, self._since_s, self._seen = started_s, started_s, None
        if now_s - self._since_s <= timeout_s / 2:
            return False
        with contextlib.suppress(PeerError):  # without the store there are no signs
            num_signs = self._num_signs()
            if self._seen is None:
                self._seen = num_signs
                return False
            if num_signs > self._seen:
                self._seen, self._since_s = num_signs, now_s
        return now_s - self._since_s > timeout_s or now_s - started_s > max(timeout_s, self._longest_s)
