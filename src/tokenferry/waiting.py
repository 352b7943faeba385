"""Where the ranks of a group wait, so that two that wait for one another in different workspaces are told so.

Each would blame the other for being late otherwise, though both are alive. Nothing is sent while all goes well. Where a group
serves several workspaces, a thread looks about once a second whether a call has been inside one of them since the last look,
and posts that; on symmetric transports over CUDA the host does not wait inside a call, and posts only when it has given up.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch.distributed as dist

_LONGEST_TICK_S: Final = 1.0
_TICKS_PER_TIMEOUT: Final = 8
_TICKS_OF_GRACE: Final = 2.5
_POLL_S: Final = 0.02


@dataclass(frozen=True)
class Place:
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
    """The places of this rank's workspaces, and on the failing path those of the other ranks. One for each group."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._lock = threading.Lock()
        self._looks: dict[str, Callable[[], Place | None]] = {}
        self._given_up: dict[str, dict[str, Place]] = {}
        """The workspaces in which this rank has given up a wait, and where all stood then."""
        self._tick_s = _LONGEST_TICK_S
        self._num_posted = 0
        self._thread: threading.Thread | None = None

    def join(self, name: str, look: Callable[[], Place | None], timeout_s: float) -> None:
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

        None where it does not, or where this rank has passed the place at which the other one waits: it waits for a third then.

        Args:
            grace: look for some time, at most 2.5 seconds, since the other one posts once in a while.
        """
        try:
            return self._who_waits_elsewhere(late, name, grace)
        except RuntimeError:  # the store is gone too; the caller's own error says more
            return None

    def _who_waits_elsewhere(self, late: int, name: str, grace: bool) -> str | None:
        with self._lock:
            places = self._places()
            if len(places) < 2 or name not in places or late < 0 or late == self._rank:
                return None
            own = places[name]
            # A call that is over, as this one soon is, changes the place: what counts is whether another one begins.
            self._given_up[name] = {each: replace(place, is_inside=False) for each, place in places.items()}
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
        there = places.get(word["workspace"])
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
        places: dict[str, Place] = {}
        while True:
            time.sleep(self._tick_s)
            with self._lock:
                before, places = places, self._places()
                if len(places) < 2:
                    self._thread = None
                    return
                try:
                    self._post_lasting(places, before)
                except RuntimeError:  # the store is gone
                    self._thread = None
                    return

    def _post_lasting(self, places: dict[str, Place], before: dict[str, Place]) -> None:
        went_on = any(
            name in places and replace(places[name], is_inside=False) != place
            for given_up in self._given_up.values()
            for name, place in given_up.items()
        )
        if went_on:
            self._withdraw()
        if not self._given_up:
            for name, place in places.items():
                if place.is_inside and before.get(name) == place:
                    self._post(name, place)

    def _places(self) -> dict[str, Place]:
        places = {name: place for name, look in list(self._looks.items()) if (place := look()) is not None}
        self._looks = {name: self._looks[name] for name in places}  # without those that are gone
        return places

    def _post(self, name: str, place: Place, *, gave_up: bool = False) -> None:
        self._num_posted += 1
        word = {"workspace": name, "step": place.step, "layer": place.layer, "gave up": gave_up, "number": self._num_posted}
        self._store.set(str(self._rank), json.dumps(word))

    def _withdraw(self) -> None:
        """What was posted is true no longer."""
        self._given_up.clear()
        if self._num_posted:
            self._store.set(str(self._rank), json.dumps(None))

    def _read(self, rank: int) -> dict[str, Any] | None:
        key = str(rank)
        word: dict[str, Any] | None = json.loads(self._store.get(key)) if self._store.check([key]) else None
        return word
