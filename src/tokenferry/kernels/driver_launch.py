"""Launches a compiled kernel through the CUDA driver, its constant arguments packed once.

Triton's launcher parses every argument at every call, constants included. Here they lie in memory of our own, and a call writes
the few that change. Whether a kernel takes its arguments as expected is read from its PTX; if not, Triton's launcher stays.
This file needs `ctypes` alone: `launch` decides which kernels come here.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""`CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION` of cuda.h: the kernel may begin before the one before it ends."""

FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}
"""By type of argument, as `struct` names them."""
POINTER_FORMAT = "Q"
MAX_HIDDEN = 2


class Config(ctypes.Structure):
    """`CUlaunchConfig` of cuda.h."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class Attribute(ctypes.Structure):
    """`CUlaunchAttribute` of cuda.h: a number, and a value of 64 bytes."""

    _fields_ = (("number", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


@dataclass(frozen=True, kw_only=True)
class LaunchShape:
    """What a launch needs besides arguments. `num_hidden`: pointers that Triton appends to the parameters, null here."""

    num_threads: int
    shared_bytes: int
    pdl: bool
    num_hidden: int


@dataclass(frozen=True, kw_only=True)
class DriverKernel:
    """A loaded kernel as the driver sees it.

    Attributes:
        driver: what `find_driver` gave.
        function: handle of the kernel.
        types: of its arguments, by name, in the order of its signature.
        current_stream: of the device that the kernel is loaded on.
    """

    driver: Callable[..., int]
    function: int
    shape: LaunchShape
    types: Mapping[str, str]
    current_stream: Callable[[], int]


def find_driver() -> Any | None:
    """`cuLaunchKernelEx`, or None where the driver has none. The interpreter lock is let go meanwhile: a full queue blocks."""
    try:
        launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    launch.restype = ctypes.c_int
    return launch


def argument_format(kind: str) -> str:
    """How `struct` packs an argument of this type; "" if it is not known here (a tensor descriptor, for one)."""
    return POINTER_FORMAT if kind.startswith("*") else FORMATS.get(kind, "")


def argument_size(kind: str) -> int:
    """Bytes of an argument of this type; 0 if it is not known here."""
    return struct.calcsize(argument_format(kind))


def launch_shape(compiled: Any, types: Mapping[str, str]) -> LaunchShape | None:
    """How `compiled` is launched, or None if it wants anything that is not known here."""
    metadata = compiled.metadata
    if getattr(metadata, "num_ctas", 1) != 1 or getattr(metadata, "launch_cooperative_grid", False):
        return None
    if any(getattr(metadata, name, 0) for name in ("global_scratch_size", "profile_scratch_size")):
        return None
    sizes = [argument_size(kind) for kind in types.values()]
    widths = parameter_widths(compiled.asm.get("ptx", ""))
    known, hidden = widths[: len(sizes)], widths[len(sizes) :]
    if known != [8 * size for size in sizes] or any(width != 64 for width in hidden) or len(hidden) > MAX_HIDDEN:
        return None
    threads = metadata.num_warps * getattr(metadata, "warp_size", 32)
    return LaunchShape(num_threads=threads, shared_bytes=metadata.shared, pdl=bool(metadata.launch_pdl), num_hidden=len(hidden))


def parameter_widths(ptx: str) -> list[int]:
    """Bits of each parameter of the one entry point.

    Example:
        ".visible .entry f(.param .u64 f_param_0, .param .u32 f_param_1) .reqntid 32 {": [64, 32]
    """
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)\s*[.{]", ptx, re.DOTALL)
    if entry is None:
        return []
    return [int(width) for width in re.findall(r"\.param\s+\.[a-z](\d+)\b", entry.group(1))]


def bind(
    kernel: DriverKernel,
    grid: int | None,
    fixed: Mapping[str, float],
    varying: Sequence[str],
    fallback: Callable[..., None],
) -> Callable[..., None]:
    """A function of the `varying` arguments, in that order, that launches on the current stream. `fixed` and `varying` together
    are all arguments of the kernel. With `grid` None the function takes the number of programs before them.

    `fallback` takes the same arguments; it launches again where the driver refuses, e.g. in a thread that has no context yet, and
    raises what there is to raise.
    """
    driver, types, current_stream = kernel.driver, kernel.types, kernel.current_stream
    offsets, size = _offsets([(name, types[name]) for name in (*varying, *fixed)])
    null = -(-size // 8) * 8
    values = ctypes.create_string_buffer(null + 8)
    for name, value in fixed.items():
        struct.pack_into(argument_format(types[name]), values, offsets[name], value)
    base = ctypes.addressof(values)
    addresses = [base + offsets[name] for name in types] + [base + null] * kernel.shape.num_hidden
    parameters = (ctypes.c_void_p * len(addresses))(*addresses)
    attribute = Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
    config = _config(kernel.shape, grid or 0, attribute)
    pack = struct.Struct("".join(argument_format(types[name]) for name in varying)).pack_into
    config_at, parameters_at = ctypes.c_void_p(ctypes.addressof(config)), ctypes.c_void_p(ctypes.addressof(parameters))
    handle = ctypes.c_void_p(kernel.function)

    def launch(*args: float) -> None:
        pack(values, 0, *args)
        config.stream = current_stream()
        if driver(config_at, handle, parameters_at, None):
            fallback(*args)

    def launch_grid(num_programs: int, *args: float) -> None:
        config.grid_x = num_programs
        pack(values, 0, *args)
        config.stream = current_stream()
        if driver(config_at, handle, parameters_at, None):
            fallback(num_programs, *args)

    bound = launch if grid is not None else launch_grid
    bound.__dict__["kept"] = (attribute, parameters)  # the driver reads them by address
    return bound


def _offsets(arguments: Sequence[tuple[str, str]]) -> tuple[dict[str, int], int]:
    """Where each argument lies, one after another as `struct` lays them out, and the end of the last.

    Example:
        (("a", "i32"), ("b", "i64")): a at 0, b at 8, 16 bytes.
    """
    offsets: dict[str, int] = {}
    end = 0
    for name, kind in arguments:
        size = argument_size(kind)
        begin = -(-end // size) * size
        offsets[name], end = begin, begin + size
    return offsets, end


def _config(shape: LaunchShape, grid: int, attribute: Attribute) -> Config:
    """`attribute` must outlive what is returned."""
    return Config(grid, 1, 1, shape.num_threads, 1, 1, shape.shared_bytes, 0, ctypes.addressof(attribute), int(shape.pdl))
