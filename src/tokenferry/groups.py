"""The expert-parallel group: who takes part, and a small channel for the words exchanged outside the data path.

The channel carries JSON over a `torch.distributed` store (never pickles: a peer's bytes are data, not code). A store names
the rank that is missing, which a collective call does not, and it still works when a communicator is broken.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, Protocol, SupportsIndex

import torch
import torch.distributed as dist

from tokenferry import env
from tokenferry.errors import ConfigError, PeerFailedError, PeerTimeoutError, Phase, StateError, UsageError, refuse_pickling
from tokenferry.waiting import WaitBoard

_POLL_FIRST_S = 0.0005
_POLL_LAST_S = 0.02


class Channel(Protocol):
    """Small objects between the ranks of a group. Values are what JSON can hold."""

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

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
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
        self._store.set(f"{name}/{self._rank}", json.dumps(value))
        start = time.monotonic()
        poll_s = _POLL_FIRST_S
        for rank in range(self._size):
            while not self._store.check([f"{name}/{rank}"]):
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
        return json.loads(self._store.compare_set(name, "", json.dumps(value)))

    def peek(self, name: str) -> Any | None:
        """See `Channel.peek`."""
        self.require_at_home()
        return json.loads(self._store.get(name)) if self._store.check([name]) else None


class ThreadRanks:
    """What threads of one process share as its virtual ranks: Python objects, handed over as they are.

    A group of virtual ranks is made with one. Nothing else makes ranks virtual: host names, process numbers and devices are
    equal in different containers, and a number that came from there was once taken for an object's address in this process.
    """

    def __init__(self) -> None:
        self._objects: dict[tuple[str, int], Any] = {}
        self._changed = threading.Condition()

    def share(self, name: str, rank: int, size: int, value: Any, timeout_s: float) -> list[Any]:
        """Every rank's `value` under `name`, in rank order; a name is used once.

        Raises:
            PeerTimeoutError: a rank did not come.
        """
        start = time.monotonic()
        keys = [(name, each) for each in range(size)]
        with self._changed:
            self._objects[name, rank] = value
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: all(key in self._objects for key in keys), timeout_s):
                late = next(each for each, key in enumerate(keys) if key not in self._objects)
                raise PeerTimeoutError(late, "open", 0, -1, time.monotonic() - start, detail=f"nothing under {name!r}")
            return [self._objects[key] for key in keys]

    def forget(self, name: str, rank: int) -> None:
        """Lets go of this rank's value, once every rank has it."""
        with self._changed:
            self._objects.pop((name, rank), None)


class EPGroup:
    """The ranks that share a model's experts. All ranks make their groups on a process group in the same order.

    Args:
        process_group: a `torch.distributed` process group (`torch.distributed.group.WORLD` for all ranks). None makes a
            group of one; the default group is never taken without being asked for. Under torchrun a group of one is made by
            `EPGroup.alone()`, since there None is mostly a WORLD that was read before `init_process_group()`.
        device: where this rank's tensors live. Default: the current CUDA device if the process group speaks NCCL (or, for a
            group of one, if there is CUDA), else the CPU.

    Attributes:
        rank, size: this rank's number and how many there are.
        device: a `torch.device` with an index if it is CUDA.
        channel: the `Channel` between the ranks.
        waiting: where its ranks wait, for the error of one that waits in vain.
        process_group: as given, or None.
        threads: what the ranks share if they are threads of one process, or None.

    Raises:
        ConfigError: this process is not a member of `process_group`.
        UsageError: None, where the environment variable WORLD_SIZE says that there are several processes.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, device: torch.device | str | None = None) -> None:
        if process_group is None:
            _refuse_one_of_many()
            self._setup(dist.HashStore(), 0, 1, _device(device, prefer_cuda=torch.cuda.is_available()), None)
            return
        if not isinstance(process_group, dist.ProcessGroup) and process_group != dist.GroupMember.NON_GROUP_MEMBER:
            raise ConfigError(
                f"process_group must be a torch.distributed process group, got {type(process_group).__name__}; for all ranks "
                "give torch.distributed.group.WORLD, after init_process_group()"
            )
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise ConfigError("this process is not a member of process_group; open the workspace on its members only")
        prefer_cuda = "nccl" in str(dist.get_backend(process_group))
        store = dist.distributed_c10d._get_process_group_store(process_group)
        self._setup(
            dist.PrefixStore("tokenferry", store),
            rank,
            dist.get_world_size(process_group),
            _device(device, prefer_cuda=prefer_cuda),
            process_group,
        )

    @classmethod
    def alone(cls, device: torch.device | str | None = None) -> EPGroup:
        """A group of one, under torchrun too. `device` defaults to the current CUDA device if there is one, else the CPU."""
        group = cls.__new__(cls)
        group._setup(dist.HashStore(), 0, 1, _device(device, prefer_cuda=torch.cuda.is_available()), None)
        return group

    @classmethod
    def from_store(
        cls,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device | str | None = None,
        *,
        threads: ThreadRanks | None = None,
    ) -> EPGroup:
        """A group of `size` ranks that meet in `store` (no process group needed). `device` defaults to the CPU. Ranks that are
        threads of one process share `threads` too; `testing.virtual_ranks` makes such groups."""
        if not isinstance(store, dist.Store):
            raise ConfigError(f"store must be a torch.distributed store, got {type(store).__name__}")
        if not _are_ints(rank, size) or not 0 <= rank < size:
            raise ConfigError(f"rank must lie in [0, {size!r}), got {rank!r}")
        group = cls.__new__(cls)
        group._setup(store, rank, size, _device(device, prefer_cuda=False), None, threads)
        return group

    def _setup(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device,
        process_group: dist.ProcessGroup | None,
        threads: ThreadRanks | None = None,
        path: str = "",
    ) -> None:
        self.rank, self.size, self.device, self.process_group, self.threads = rank, size, device, process_group, threads
        # A second group on the same store must not find the first one's words: each rank counts the groups that it has made.
        number = store.add(f"groups made by rank {rank}", 1)
        self.store = dist.PrefixStore(f"group.{number}", store)
        self._path = f"{path}/group.{number}"
        self.channel = StoreChannel(self.store, rank, size)
        self.waiting = WaitBoard(dist.PrefixStore("waiting", self.store), rank, size)
        self._names_given: dict[str, int] = {}

    def subset(self, ranks: Sequence[int]) -> EPGroup:
        """The group of those `ranks` (numbered in this group), for `Workspace.reset(group=...)`. Called by its members only,
        with the same list; a second call with the same list is another group."""
        if isinstance(ranks, str) or not isinstance(ranks, Iterable) or not _are_ints(*(ranks := list(ranks))):
            raise ConfigError(f"ranks must be a list of ints, got {ranks!r}")
        chosen = sorted(set(ranks))
        if self.rank not in chosen or chosen[0] < 0 or chosen[-1] >= self.size:
            raise ConfigError(f"ranks must be a part of 0..{self.size - 1} that holds this rank, {self.rank}; got {list(ranks)}")
        self.channel.require_at_home()
        name = self.unique_name("subset/" + "-".join(map(str, chosen)))
        group = EPGroup.__new__(EPGroup)
        store, path = dist.PrefixStore(name, self.store), f"{self._path}/{name}"
        group._setup(store, chosen.index(self.rank), len(chosen), self.device, None, self.threads, path)
        return group

    def share(self, name: str, value: Any, timeout_s: float) -> list[Any]:
        """Every virtual rank's own `value`, in rank order; a name is used once.

        Raises:
            StateError: the ranks are no threads of one process.
            PeerTimeoutError: a rank did not come.
        """
        if self.threads is None:
            raise StateError("share: the ranks of this group are processes; only those of testing.virtual_ranks() share objects")
        key = f"{self._path}/{name}"
        try:
            values = self.threads.share(key, self.rank, self.size, value, timeout_s)
            self.channel.barrier(f"{name}/shared", timeout_s)
            return values
        finally:
            self.threads.forget(key, self.rank)

    def unique_name(self, kind: str) -> str:
        """`kind` and a running number, equal on all ranks if they ask in the same order."""
        number = self._names_given.get(kind, 0)
        self._names_given[kind] = number + 1
        return f"{kind}.{number}"

    def expert_range(self, num_experts: int, rank: int | None = None) -> range:
        """The experts of `rank` (this rank by default): contiguous blocks, the first `num_experts % size` ranks hold one more.

        Raises:
            ConfigError: fewer experts than ranks, or no such rank.
        """
        if not _are_ints(num_experts):
            raise ConfigError(f"num_experts must be an int, got {num_experts!r}")
        if num_experts < self.size:
            raise ConfigError(f"{num_experts} experts cannot be spread over {self.size} ranks; use at most {num_experts} ranks")
        rank = self.rank if rank is None else rank
        if not _are_ints(rank) or not 0 <= rank < self.size:
            raise ConfigError(f"rank must lie in [0, {self.size}), got {rank!r}")
        share, extra = divmod(num_experts, self.size)
        start = rank * share + min(rank, extra)
        return range(start, start + share + (rank < extra))

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        refuse_pickling(self, "it stands on connections of this process: make one in each process, on a process group or a store")

    def __repr__(self) -> str:
        return f"EPGroup(rank={self.rank}, size={self.size}, device={str(self.device)!r})"


def _refuse_one_of_many() -> None:
    """`EPGroup(dist.group.WORLD)` before `init_process_group()` is `EPGroup(None)`: under torchrun it made a group of one on each
    rank, and all of them went on with themselves alone."""
    try:
        world_size = env.read(env.TorchrunSettings).world_size
    except ConfigError:  # other programs have other uses for these names
        return
    if world_size is not None and world_size > 1:
        raise UsageError(
            f"process_group is None but WORLD_SIZE is {world_size}: call torch.distributed.init_process_group() first, then "
            "EPGroup(torch.distributed.group.WORLD); for a group of one on purpose call EPGroup.alone()"
        )


def _are_ints(*values: object) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _device(device: torch.device | str | None, *, prefer_cuda: bool) -> torch.device:
    try:
        chosen = torch.device(device if device is not None else ("cuda" if prefer_cuda else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be a torch.device or its name, got {device!r}") from error
    if chosen.type == "meta":
        raise ConfigError("device is 'meta', where no rows can lie; give 'cuda' or 'cpu'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {str(chosen)!r} but this process has no CUDA device; give device='cpu'")
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen
