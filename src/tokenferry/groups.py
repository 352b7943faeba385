"""The expert-parallel group: who takes part, and what the ranks meet in."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, SupportsIndex

import torch
import torch.distributed as dist

from tokenferry import env
from tokenferry.channel import RendezvousStore, StoreChannel, host_of
from tokenferry.errors import ConfigError, PeerTimeoutError, StateError, UsageError, refuse_pickling
from tokenferry.waiting import WaitBoard


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
        process_group: a `torch.distributed` process group (`torch.distributed.group.WORLD` for all ranks), of any backend: the
            ranks meet in its store, and no row travels through it. None makes a group of one; the default group is never taken
            without being asked for. Under torchrun a group of one is made by `EPGroup.alone()`, since there None is mostly a
            WORLD that was read before `init_process_group()`.
        device: where this rank's tensors live, `cuda:1` for a gloo group too. Default: the current CUDA device if the process
            group speaks NCCL (or, for a group of one, if there is CUDA), else the CPU.

    Attributes:
        rank, size: this rank's number and how many there are.
        device: a `torch.device` with an index if it is CUDA.
        channel: the `Channel` between the ranks.
        rendezvous: the `RendezvousStore` in which they meet; its keys are this group's alone.
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
            self._setup(_own_store(), 0, 1, _device(device, prefer_cuda=torch.cuda.is_available()), None)
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
            RendezvousStore(store, _host_within(process_group, host_of(store), rank)).under("tokenferry"),
            rank,
            dist.get_world_size(process_group),
            _device(device, prefer_cuda=prefer_cuda),
            process_group,
        )

    @classmethod
    def alone(cls, device: torch.device | str | None = None) -> EPGroup:
        """A group of one, under torchrun too. `device` defaults to the current CUDA device if there is one, else the CPU."""
        group = cls.__new__(cls)
        group._setup(_own_store(), 0, 1, _device(device, prefer_cuda=torch.cuda.is_available()), None)
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
        """A group of `size` ranks that meet in `store` (no process group needed). `device` defaults to the CPU.

        Rank 0 is taken for the host of a `TCPStore`, and named when the store is lost. Ranks that are threads of a process share
        `threads` too; `testing.virtual_ranks` makes such groups.
        """
        if not isinstance(store, dist.Store):
            raise ConfigError(f"store must be a torch.distributed store, got {type(store).__name__}")
        if not _are_ints(rank, size) or not 0 <= rank < size:
            raise ConfigError(f"rank must lie in [0, {size!r}), got {rank!r}")
        group = cls.__new__(cls)
        group._setup(
            RendezvousStore(store, host_of(store) if rank > 0 else None),
            rank,
            size,
            _device(device, prefer_cuda=False),
            None,
            threads,
        )
        return group

    def _setup(
        self,
        store: RendezvousStore,
        rank: int,
        size: int,
        device: torch.device,
        process_group: dist.ProcessGroup | None,
        threads: ThreadRanks | None = None,
        path: str = "",
        members: Sequence[int] | None = None,
    ) -> None:
        """`members`: this group's ranks, as the larger group numbers them whose rank `store.host` is."""
        self.rank, self.size, self.device, self.process_group, self.threads = rank, size, device, process_group, threads
        # A second group on the same store must not find the first one's words: each rank counts the groups that it has made.
        number = store.add(f"groups made by rank {rank}", 1)
        self.rendezvous = store.under(f"group.{number}")
        if members is not None:
            host = self.rendezvous.host
            self.rendezvous.host = members.index(host) if host in members else None
        self._path = f"{path}/group.{number}"
        self.channel = StoreChannel(self.rendezvous, rank, size)
        self.waiting = WaitBoard(self.rendezvous.under("waiting"), rank, size)
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
        store, path = self.rendezvous.under(name), f"{self._path}/{name}"
        group._setup(store, chosen.index(self.rank), len(chosen), self.device, None, self.threads, path, chosen)
        return group

    @property
    def store(self) -> dist.Store:
        """The bare store, for what meets in it by itself; its errors are torch's."""
        return self.rendezvous.store

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


def _own_store() -> RendezvousStore:
    return RendezvousStore(dist.HashStore(), None)


def _host_within(process_group: dist.ProcessGroup, host: int | None, rank: int) -> int | None:
    """The number in `process_group` of the global rank `host`. None if it is not in it, or is this `rank` itself: a process that
    hosts a store does not lose it, so if this one does, another process hosts it."""
    if host is None or host not in dist.get_process_group_ranks(process_group):
        return None
    number = dist.get_group_rank(process_group, host)
    return None if number == rank else number


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
