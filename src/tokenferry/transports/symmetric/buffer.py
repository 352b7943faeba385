"""Memory that every rank of a group can address: one buffer a rank, all of the same size.

On GPUs it comes from PyTorch's symmetric memory. Virtual ranks (threads of one process on one GPU) share plain device
memory. On CPUs it is a file in memory that never has a name, so that nothing is left whenever a rank is killed: peers open it
through the descriptor of its owner.
"""

from __future__ import annotations

import datetime
import mmap
import os
import re
import stat
import threading
from typing import Any

import torch
import torch.distributed as dist

from tokenferry.errors import TransportUnavailableError
from tokenferry.groups import EPGroup

SHARED_FOLDER = "/dev/shm"
DESCRIPTOR = re.compile(r"/proc/[0-9]+/fd/[0-9]+")
"""What a peer offers on CPUs: its descriptor of memory without a name, which only its own user can open."""


class PrivateFiles:
    """Within it, files that this process makes are its user's alone. The mask for new files belongs to the whole process, so that
    there is one such object: the first thread to enter sets the mask, the last to leave puts back what was there."""

    def __init__(self) -> None:
        self._lock, self._num_inside, self._mask = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._mask = os.umask(0o077)
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                os.umask(self._mask)


PRIVATE_FILES = PrivateFiles()


class SymmetricBuffer:
    """This rank's buffer, zeroed, and the addresses of all ranks' buffers. Opened by all ranks together; one owner.

    Args:
        name: unique to this buffer, equal on all ranks.
        timeout_s: how long to wait for the slowest rank.

    Attributes:
        tensor: uint8 [nbytes], this rank's own.
        address: of `tensor`, in this rank's address space.
        addresses: of every rank's buffer, in this rank's address space.
        table, table_address: int64 [size + 1] tensor on the device with the same, then `address`, and where it lies.
        own_table_address: where the last entry lies: the table of a rank that runs alone.
        multicast_address: of the mapping whose stores reach all buffers, or 0.
        is_virtual: whether the ranks share one GPU.

    Raises:
        TransportUnavailableError: on every rank, naming the rank that failed and why.
        PeerTimeoutError: a rank did not come.
    """

    def __init__(self, group: EPGroup, num_bytes: int, name: str, timeout_s: float) -> None:
        self._group, self._name, self._timeout_s = group, name, timeout_s
        self.multicast_address = 0
        self.is_virtual = False
        self._handle: Any = None
        self._tensors: list[torch.Tensor] = []
        if group.size == 1:
            self.tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=group.device)
            self._tensors = [self.tensor]
            self.addresses = [self.tensor.data_ptr()]
        elif group.device.type == "cpu":
            self._open_files(num_bytes)
        elif group.threads is not None:
            self._open_virtual(num_bytes)
        else:
            self._open_cuda(num_bytes)
        self.address = self.tensor.data_ptr()
        self.table = torch.tensor([*self.addresses, self.address], dtype=torch.int64, device=group.device)
        self.table_address = self.table.data_ptr()
        self.own_table_address = self.table_address + group.size * self.table.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer and the table."""
        return self.tensor.nbytes + self.table.nbytes

    def _exchange(self, what: str, value: Any) -> list[Any]:
        return self._group.channel.exchange(f"{self._name}/{what}", value, self._timeout_s)

    def _agree(self, what: str, error: BaseException | None) -> None:
        """Raises on every rank if one of them met an error."""
        answers = self._exchange(what, None if error is None else f"{type(error).__name__}: {error}")
        for rank, answer in enumerate(answers):
            if answer is not None:
                raise TransportUnavailableError(f"symmetric memory: rank {rank} failed to {what}: {answer}") from error

    # --- CPU --------------------------------------------------------------------------------------------------------

    def _open_files(self, num_bytes: int) -> None:
        opened: list[int] = []
        try:
            maps, error = self._map_files(opened, num_bytes)
        finally:
            for descriptor in opened:
                os.close(descriptor)
        self._agree("map the other ranks' memory", error)
        tensors = [torch.frombuffer(each, dtype=torch.uint8) for each in maps]
        self._tensors = tensors
        self.tensor = tensors[self._group.rank]
        self.addresses = [tensor.data_ptr() for tensor in tensors]

    def _map_files(self, opened: list[int], num_bytes: int) -> tuple[list[mmap.mmap], Exception | None]:
        """Every rank's file, mapped; returns when all ranks have mapped all. `opened`: out, the descriptor of this rank's."""
        error: Exception | None = None
        own: mmap.mmap | None = None
        offer: list[Any] = []
        try:
            opened.append(os.open(SHARED_FOLDER, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
            os.posix_fallocate(opened[0], 0, num_bytes)  # a full /dev/shm is an error here, not a SIGBUS later
            own = mmap.mmap(opened[0], num_bytes)
            offer = [f"/proc/{os.getpid()}/fd/{opened[0]}", *_identity(os.fstat(opened[0]))]
        except (OSError, AttributeError) as problem:  # O_TMPFILE is Linux's
            error = problem
        offers = self._exchange("file", offer)
        self._agree("allocate shared memory", error)
        maps: list[mmap.mmap] = []
        try:
            for rank, other in enumerate(offers):
                mapped = own if rank == self._group.rank else _map_of_peer(other[0], other[1:], num_bytes)
                assert mapped is not None, "an error was raised"
                maps.append(mapped)
        except (OSError, ValueError) as problem:
            error = problem
        self._exchange("mapped", None)
        return maps, error

    # --- CUDA -------------------------------------------------------------------------------------------------------

    def _open_virtual(self, num_bytes: int) -> None:
        error: Exception | None = None
        try:
            self.tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=self._group.device)
            torch.cuda.current_stream(self._group.device).synchronize()
        except RuntimeError as problem:
            error = problem
        self._agree("allocate device memory", error)
        self.is_virtual = True
        # A peer may store here after this rank has closed, as on real ranks: everyone keeps everyone's tensor alive.
        self._tensors = self._group.share(f"{self._name}/tensors", self.tensor, self._timeout_s)
        self.addresses = [tensor.data_ptr() for tensor in self._tensors]

    def _open_cuda(self, num_bytes: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory  # absent from some CPU builds

        error: Exception | None = None
        with torch.cuda.device(self._group.device):
            try:
                self.tensor = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self._group.device)
                self.tensor.zero_()
                torch.cuda.synchronize(self._group.device)
            except RuntimeError as problem:
                error = problem
            self._agree("allocate symmetric memory", error)
            handle: Any = None
            try:
                handle = self._rendezvous(symmetric_memory.rendezvous)
            except RuntimeError as problem:
                error = problem
            self._agree("map the other ranks' memory", error)
        self._handle = handle
        self.addresses = [int(address) for address in handle.buffer_ptrs]
        self.multicast_address = int(handle.multicast_ptr or 0)

    def _rendezvous(self, rendezvous: Any) -> Any:
        """PyTorch looks a group's store up by the name of a registered process group. This group need not have one (ranks may
        meet in a store alone), so a bare one, without any backend, stands under our name for the moment."""
        from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

        store = dist.PrefixStore(f"{self._name}/rendezvous", self._group.store)
        store.set_timeout(datetime.timedelta(seconds=self._timeout_s))
        bare = dist.ProcessGroup(store, self._group.rank, self._group.size)
        name: Any = self._name  # newer releases of PyTorch have a type of their own for it
        _register_process_group(name, bare)
        try:
            with PRIVATE_FILES:  # descriptors of memory travel through a socket file that PyTorch makes
                return rendezvous(self.tensor, name)
        finally:
            _unregister_process_group(name)

    def of_peer(self, rank: int) -> torch.Tensor:
        """A peer's buffer, uint8. For benchmarks and tests; kernels use the addresses."""
        if self._handle is not None:
            return self._handle.get_buffer(rank, (self.tensor.nbytes,), torch.uint8)  # type: ignore[no-any-return]
        return self._tensors[rank]

    def close(self) -> None:
        """Gives the memory back. The caller has seen to it that no kernel of this rank uses it any more."""
        self._handle = None
        self._tensors = []
        self.addresses = []
        self.tensor = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.table = torch.empty(0, dtype=torch.int64, device="cpu")


def _identity(status: os.stat_result) -> list[int]:
    """Of a file, whatever its name: two processes may give one descriptor's path to different files."""
    return [status.st_dev, status.st_ino]


def _map_of_peer(path: str, identity: list[int], num_bytes: int) -> mmap.mmap:
    """Maps a peer's memory: only what it offers, without a name, of the size that all agreed on, and of this user alone.

    Raises:
        ValueError, OSError: it is not.
    """
    if not DESCRIPTOR.fullmatch(path):
        raise ValueError(f"shared memory must be a descriptor of its owner, /proc/<process>/fd/<number>; a peer offers {path}")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if _identity(status) != identity:
            raise ValueError(f"{path} is other memory here than where the peer runs; all ranks must see the same processes")
        if not stat.S_ISREG(status.st_mode) or status.st_nlink:
            raise ValueError(f"{path} is not memory without a name")
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise ValueError(f"{path} is not this user's alone (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o})")
        if status.st_size != num_bytes:
            raise ValueError(f"{path} has {status.st_size} bytes, not {num_bytes}")
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)
