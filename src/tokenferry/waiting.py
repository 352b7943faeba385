"""Where the ranks of a group wait, so that two that wait for one another in different workspaces are told so.

Each would blame the other for being late otherwise, though both are alive. Nothing is sent while all goes well. Where a group
serves several workspaces, a thread looks about twice a second whether a call has been inside one of them since the last look,
and posts that; on symmetric transports over CUDA the host does not wait inside a call, and posts only when it has given up.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from tokenferry.channel import RendezvousStore
from tokenferry.errors import PeerError

_LONGEST_TICK_S: Final = 0.5
"""Short enough for an error to come within 2 s of the time-out, with the watchdog's own looks before it."""
_TICKS_PER_TIMEOUT: Final = 8
_TICKS_OF_GRACE: Final = 2.5
_POLL_S: Final = 0.02


@dataclass(frozen=True)
class Position:
    """Where a workspace of this rank stands.

    Attributes:
        step: the last step whose counts are known.
        layer: of the dispatch under way, or -1.
        stage: in words.
        is_inside: whether a thread is inside a call on it.
    """

    step: int
    layer: int
    stage: str
    is_inside: bool


class WaitBoard:
    """The positions of this rank's workspaces, and on the failing path those of the other ranks. One for each group."""

    def __init__(self, store: RendezvousStore, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._lock = threading.Lock()
        self._looks: dict[str, Callable[[], Position | None]] = {}
        self._given_up: dict[str, dict[str, Position]] = {}
        """The workspaces in which this rank has given up a wait, and where all stood then."""
        self._tick_s = _LONGEST_TICK_S
        self._num_posted = 0
        self._thread: threading.Thread | None = None

    def join(self, name: str, look: Callable[[], Position | None], timeout_s: float) -> None:
        """A workspace is open. `look` tells where it stands; None once it is gone."""
        with self._lock:
            self._looks[name] = look
            self._tick_s = min(self._tick_s, timeout_s / _TICKS_PER_TIMEOUT)
            self._withdraw()
            if len(self._looks) > 1 and self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True, name="tokenferry-waiting")
                self._thread.start()

    def leave(self, name: str) -> None:
        """The workspace is closed. Takes no lock: a signal handler may close one while its own thread is in here."""
        self._looks.pop(name, None)

    def who_waits_elsewhere(self, late: int, name: str, *, grace: bool = True) -> str | None:
        """This rank has waited in vain in `name` for rank `late`: whether that one waits in another workspace, in words.

        None where it does not, or where this rank has passed the point at which the other one waits: it waits for a third then.

        Args:
            grace: look for some time, at most 1.25 seconds, since the other one posts once in a while.
        """
        try:
            return self._who_waits_elsewhere(late, name, grace)
        except PeerError:  # the store is gone too; the caller's own error says more
            return None

    def _who_waits_elsewhere(self, late: int, name: str, grace: bool) -> str | None:
        with self._lock:
            positions = self._positions()
            if len(positions) < 2 or name not in positions or late < 0 or late == self._rank:
                return None
            own = positions[name]
            # A call that is over, as this one soon is, changes the position: what counts is whether another one begins.
            self._given_up[name] = {each: replace(position, is_inside=False) for each, position in positions.items()}
            self._post(name, own, gave_up=True)
            give_up_s = time.monotonic() + (_TICKS_OF_GRACE * self._tick_s if grace else 0.0)
        first = self._read(late)
        while True:
            word = self._read(late)
            if word is not None and word["workspace"] != name and (word["gave up"] or word != first):
                break
            if time.monotonic() > give_up_s:
                return None
            time.sleep(_POLL_S)
        there = positions.get(word["workspace"])
        if there is None or there.step > word["step"]:
            return None
        if there.step == word["step"] and word["layer"] >= 0 and self._size > 2:
            return None  # it waits amid a step that this rank may be through with: then for a third one
        return (
            f"rank {late} is alive, but it waits in {word['workspace']} after step {word['step']}, while rank {self._rank} waits "
            f"in {name} after step {own.step} (numbered as they were opened); use the workspaces of a group, and the models on "
            "them, in the same order on every rank"
        )

    def _watch(self) -> None:
        """Posts calls that last."""
        positions: dict[str, Position] = {}
        while True:
            time.sleep(self._tick_s)
            with self._lock:
                before, positions = positions, self._positions()
                if len(positions) < 2:
                    self._thread = None
                    return
                try:
                    self._post_lasting(positions, before)
                except PeerError:  # the store is gone
                    self._thread = None
                    return

    def _post_lasting(self, positions: dict[str, Position], before: dict[str, Position]) -> None:
        went_on = any(
            name in positions and replace(positions[name], is_inside=False) != position
            for given_up in self._given_up.values()
            for name, position in given_up.items()
        )
        if went_on:
            self._withdraw()
        if not self._given_up:
            for name, position in positions.items():
                if position.is_inside and before.get(name) == position:
                    self._post(name, position)

    def _positions(self) -> dict[str, Position]:
        positions = {name: position for name, look in list(self._looks.items()) if (position := look()) is not None}
        self._looks = {name: self._looks[name] for name in positions}  # without those that are gone
        return positions

    def _post(self, name: str, position: Position, *, gave_up: bool = False) -> None:
        self._num_posted += 1
        word = {"workspace": name, "step": position.step, "layer": position.layer, "gave up": gave_up, "number": self._num_posted}
        self._store.set(str(self._rank), json.dumps(word))

    def _withdraw(self) -> None:
        """What was posted is true no longer."""
        self._given_up.clear()
        if self._num_posted:
            self._store.set(str(self._rank), json.dumps(None))

    def _read(self, rank: int) -> dict[str, Any] | None:
        key = str(rank)
        word: dict[str, Any] | None = json.loads(self._store.get(key)) if self._store.has(key) else None
        return word
