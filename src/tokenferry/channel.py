"""Words that the ranks of a group leave for one another outside the data path, over a `torch.distributed` store.

They are JSON, never pickles: a peer's bytes are data, not code. A store names the rank that is missing, which a collective call
does not, and it still works when a communicator is broken. Every call on a store stands in `RendezvousStore`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from tokenferry import env
from tokenferry.errors import ConfigError, PeerFailedError, PeerTimeoutError, Phase, StateError

_POLL_FIRST_S = 0.0005
_POLL_LAST_S = 0.02
_Answer = TypeVar("_Answer")


class RendezvousStore:
    """The store in which the ranks meet, and the one place that calls it.

    A TCP store dies with the process that hosts it. torch then raises `DistNetworkError` in every other process, which named
    nobody; here it becomes a `PeerFailedError` for the rank that hosts the store, where this rank knows which one that is.

    Attributes:
        store: what `torch.distributed` takes, for communicators that meet in it by themselves.
        host: the peer whose process hosts the store, by its rank in the group. None where none does: it is a file, torchrun's
            agent hosts it, or a process that is not in the group.
    """

    def __init__(self, store: dist.Store, host: int | None) -> None:
        self.store, self.host = store, host

    def under(self, prefix: str) -> RendezvousStore:
        """The same store, where every key begins with `prefix`."""
        return RendezvousStore(dist.PrefixStore(prefix, self.store), self.host)

    def set(self, key: str, text: str) -> None:
        """Writes `text` under `key`."""
        self._call(lambda: self.store.set(key, text))

    def has(self, key: str) -> bool:
        """Whether something stands under `key`."""
        return self._call(lambda: self.store.check([key]))

    def get(self, key: str) -> bytes:
        """What stands under `key`. Look with `has` first: this waits otherwise."""
        return self._call(lambda: self.store.get(key))

    def add(self, key: str, amount: int) -> int:
        """Adds to the number under `key` and returns the sum."""
        return self._call(lambda: self.store.add(key, amount))

    def set_if_absent(self, key: str, text: str) -> bytes:
        """Writes `text` under `key` unless something stands there; returns what stands there now."""
        return self._call(lambda: self.store.compare_set(key, "", text))

    def delete(self, key: str) -> None:
        """Takes `key` away."""
        self._call(lambda: self.store.delete_key(key))

    def _call(self, call: Callable[[], _Answer]) -> _Answer:
        try:
            return call()
        except RuntimeError as error:  # torch's store errors are RuntimeErrors, and not all of them are of one class
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> PeerFailedError:
        said = (str(error).strip().splitlines() or [""])[0]
        whose = "whose host this rank does not know" if self.host is None else f"which rank {self.host} hosts"
        reason = (
            f"the rendezvous store, {whose}, cannot be reached any more ({type(error).__name__}: {said}); without it the ranks "
            "cannot meet, so give reset() a group on another store"
        )
        return PeerFailedError(-1 if self.host is None else self.host, reason, 0, "open")


def host_of(store: dist.Store) -> int | None:
    """The rank that hosts `store`, among those that were counted when it was made. By convention that is rank 0 of a TCP store,
    unless torchrun's agent hosts it, a process of its own. A file or a store within this process has no host."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return 0 if isinstance(store, dist.TCPStore) and not _agent_hosts_store() else None


def _agent_hosts_store() -> bool:
    try:
        return env.read(env.TorchrunSettings).agent_hosts_store
    except ConfigError:  # other programs have other uses for torchrun's names
        return False


class Channel(Protocol):
    """Small objects between the ranks of a group. Values are what JSON can hold.

    Where the store behind it is lost, every call raises `PeerFailedError` for the rank that hosts it, if that is known (else for
    rank -1).
    """

    def exchange(self, name: str, value: Any, timeout_s: float, *, phase: Phase = "open", step: int = 0) -> list[Any]:
        """Every rank's value under `name`, in rank order. Raises `PeerTimeoutError` naming the first rank that is missing, and
        `PeerFailedError` if a rank has given up to come."""

    def barrier(self, name: str, timeout_s: float, *, phase: Phase = "open", step: int = 0) -> None:
        """Returns when every rank has come."""

    def give_up(self, name: str, reason: str) -> None:
        """This rank will not come to the exchange `name`: those who wait there raise `PeerFailedError` at once. Never waits."""

    def claim(self, name: str, value: Any) -> Any:
        """Writes `value` under `name` unless somebody has; returns what stands there now."""

    def peek(self, name: str) -> Any | None:
        """What stands under `name`, or None, without waiting."""


class StoreChannel:
    """A channel over any c10d store: TCPStore and FileStore between processes, HashStore between threads."""

    def __init__(self, store: RendezvousStore, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._pid = os.getpid()

    def require_at_home(self) -> None:
        """Raises StateError in a forked child: its words would go over its parent's connection to the store."""
        if os.getpid() != self._pid:
            raise StateError(
                f"the group was made in another process (pid {self._pid}, this is {os.getpid()}); a forked child must leave its "
                "parent's alone and make its own, on a store or process group of its own"
            )

    def exchange(self, name: str, value: Any, timeout_s: float, *, phase: Phase = "open", step: int = 0) -> list[Any]:
        """See `Channel.exchange`. A name is used once."""
        self.require_at_home()
        try:
            return self._exchange(name, value, timeout_s, phase, step)
        except PeerFailedError as error:  # this function knows during what; the store did not
            raise PeerFailedError(error.rank, error.reason, step, phase) from error.__cause__

    def _exchange(self, name: str, value: Any, timeout_s: float, phase: Phase, step: int) -> list[Any]:
        self._store.set(f"{name}/{self._rank}", json.dumps(value))
        start = time.monotonic()
        poll_s = _POLL_FIRST_S
        for rank in range(self._size):
            while not self._store.has(f"{name}/{rank}"):
                given_up = self.peek(f"{name}/given up")
                if given_up is not None:
                    by, reason = given_up
                    raise PeerFailedError(by, reason, step, phase)
                waited_s = time.monotonic() - start
                if waited_s > timeout_s:
                    raise PeerTimeoutError(rank, phase, step, -1, waited_s, detail=f"nothing under {name!r}")
                time.sleep(poll_s)
                poll_s = min(poll_s * 1.5, _POLL_LAST_S)
        return [json.loads(self._store.get(f"{name}/{rank}")) for rank in range(self._size)]

    def barrier(self, name: str, timeout_s: float, *, phase: Phase = "open", step: int = 0) -> None:
        """See `Channel.barrier`."""
        self.exchange(name, None, timeout_s, phase=phase, step=step)

    def give_up(self, name: str, reason: str) -> None:
        """See `Channel.give_up`. Of several ranks the first is named."""
        self.claim(f"{name}/given up", [self._rank, reason])

    def claim(self, name: str, value: Any) -> Any:
        """See `Channel.claim`."""
        self.require_at_home()
        return json.loads(self._store.set_if_absent(name, json.dumps(value)))

    def peek(self, name: str) -> Any | None:
        """See `Channel.peek`."""
        self.require_at_home()
        return json.loads(self._store.get(name)) if self._store.has(name) else None
