"""Facts about this machine, as far as expert parallelism cares for them. No decisions: those are `transports/selection.py`'s."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import tokenferry
from tokenferry.gpu_links import Links, ManagementLibrary


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One CUDA device.

    Attributes:
        capability: compute capability, (9, 0) for Hopper.
        num_sms: streaming multiprocessors.
        memory_bytes: of device memory in all.
        peers: indices of the devices whose memory it can map.
        multicast: whether the driver reports NVLink multicast for it; that alone does not prove that it works.
        links: its NVLinks; None if unknown.
    """

    index: int
    name: str
    capability: tuple[int, int]
    num_sms: int
    memory_bytes: int
    peers: tuple[int, ...]
    multicast: bool
    links: Links | None = None


@dataclass(frozen=True, kw_only=True)
class Topology:
    """What this process sees of its machine.

    Attributes:
        num_cpus: CPU cores that this process may use.
        memory_bytes: of main memory in all, 0 if unknown.
        gpus: CUDA devices in the order of their indices.
        versions: (name, version) pairs; a package that is not there has the version "not installed".
    """

    platform: str
    num_cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    versions: tuple[tuple[str, str], ...]


BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Linux's number of this boot of this machine: the same in all of its containers, whatever host names they have."""


def machine_id(device_type: str) -> str:
    """Equal on processes alone that can map one another's memory, as far as can be known.

    These are of one boot (without Linux: of one host name), see the same processes, and on CUDA the same temporary folder,
    through which PyTorch passes descriptors of memory. Ranks that differ in these would wait for one another there without a
    time-out (read in PyTorch's source, not tried).
    """
    try:
        parts = [BOOT_ID.read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:  # not Linux, or /proc is not there
        parts = [platform.node()]
    if device_type == "cuda":
        with contextlib.suppress(OSError):
            folder = os.stat(tempfile.gettempdir())
            parts.append(f"{folder.st_dev}:{folder.st_ino}")
    return " ".join(parts)


def num_cpus() -> int:
    """CPU cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def topology() -> Topology:
    """Look at this machine now. Touches each GPU's driver, allocates nothing on it."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with ManagementLibrary() as library:
        driver = library.driver_version()
        gpus = tuple(replace(gpu(index), links=library.links(_uuid(index))) for index in range(count))
    return Topology(
        platform=platform.platform(),
        num_cpus=num_cpus(),
        memory_bytes=_memory_bytes(),
        gpus=gpus,
        versions=(*_versions(), ("NVIDIA driver", driver or "not found")),
    )


def _uuid(index: int) -> str:
    """As the driver writes it. Indices differ between torch and the driver where some GPUs are hidden."""
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # not every system knows these names
        return 0


def gpu(index: int) -> Gpu:
    """One CUDA device."""
    count = torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(index)
    return Gpu(
        index=index,
        name=properties.name,
        capability=(properties.major, properties.minor),
        num_sms=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        peers=tuple(peer for peer in range(count) if peer != index and torch.cuda.can_device_access_peer(index, peer)),
        multicast=_multicast(index),
    )


def _multicast(index: int) -> bool:
    try:
        from torch._C._autograd import DeviceType
        from torch._C._distributed_c10d import _SymmetricMemory
    except ImportError:  # a build of torch without torch.distributed
        return False
    return bool(_SymmetricMemory.has_multicast_support(DeviceType.CUDA, index))


def _versions() -> tuple[tuple[str, str], ...]:
    packages = ("torch", "triton", "transformers", "safetensors", "numpy", "megatron-core")
    versions = [("python", platform.python_version()), ("tokenferry", _own_version())]
    versions += [(name, _version(name)) for name in packages]
    versions.append(("CUDA", torch.version.cuda or "not in this build of torch"))
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    versions.append(("NCCL", ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "not in this build of torch"))
    return tuple(versions)


def _own_version() -> str:
    """Of the code that runs, which need not be what is installed: `PYTHONPATH` may name a clone."""
    installed = _version("tokenferry")
    return installed if installed == tokenferry.__version__ else f"{tokenferry.__version__}, run from a clone"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
