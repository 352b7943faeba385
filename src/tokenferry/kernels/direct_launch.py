"""Launches a compiled kernel through the CUDA driver, its constant arguments packed once.

Triton's launcher parses every argument at every call, constants included. Here they lie in memory of our own, and a call writes
the few that change. Whether a kernel takes its arguments as expected is read from its PTX; if not, Triton's launcher stays.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""`CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION` of cuda.h: the kernel may begin before the one before it ends."""

FORMATS = {"i32": "i", "i64": "q"}
WIDTHS = {"i32": 32, "i64": 64}


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


def find_driver() -> Any | None:
    """`cuLaunchKernelEx`, or None where the driver has none. The interpreter lock is let go meanwhile: a full queue blocks."""
    try:
        launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    launch.restype = ctypes.c_int
    return launch


def launch_shape(compiled: Any, types: Mapping[str, str]) -> LaunchShape | None:
    """How `compiled` is launched, or None if it wants anything that is not known here."""
    metadata = compiled.metadata
    if getattr(metadata, "num_ctas", 1) != 1 or getattr(metadata, "launch_cooperative_grid", False):
        return None
    if any(getattr(metadata, name, 0) for name in ("global_scratch_size", "profile_scratch_size")):
        return None
    widths = parameter_widths(compiled.asm.get("ptx", ""))
    wanted = [WIDTHS.get(kind, 0) for kind in types.values()]
    hidden = widths[len(wanted) :]
    if widths[: len(wanted)] != wanted or any(width != 64 for width in hidden) or len(hidden) > 2:
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
    driver: Any,
    function: int,
    shape: LaunchShape,
    grid: int,
    types: Mapping[str, str],
    fixed: Mapping[str, int],
    current_stream: Callable[[], int],
    fallback: Callable[..., None],
) -> Callable[..., None]:
    """A function of the arguments that are not `fixed`, in the order of `types`, that launches on the current stream.

    `fallback` takes the same arguments; it launches again where the driver refuses, e.g. in a thread that has no context yet, and
    raises what there is to raise.
    """
    varying = [name for name in types if name not in fixed]
    ordered = [*varying, *(name for name in types if name in fixed)]
    places: dict[str, int] = {}
    offset = 0
    for name in ordered:  # as struct lays them out: the varying ones first, in one piece
        size = WIDTHS[types[name]] // 8
        offset = -(-offset // size) * size
        places[name], offset = offset, offset + size
    null = -(-offset // 8) * 8
    values = ctypes.create_string_buffer(null + 8)
    for name, value in fixed.items():
        struct.pack_into(FORMATS[types[name]], values, places[name], value)
    base = ctypes.addressof(values)
    addresses = [base + places[name] for name in types] + [base + null] * shape.num_hidden
    parameters = (ctypes.c_void_p * len(addresses))(*addresses)
    attribute = Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
    config = Config(grid, 1, 1, shape.num_threads, 1, 1, shape.shared_bytes, 0, ctypes.addressof(attribute), int(shape.pdl))
    pack = struct.Struct("".join(FORMATS[types[name]] for name in varying)).pack_into
    config_at, parameters_at = ctypes.c_void_p(ctypes.addressof(config)), ctypes.c_void_p(ctypes.addressof(parameters))
    handle = ctypes.c_void_p(function)
    kept = (attribute, parameters)

    def launch(*args: int) -> None:
        pack(values, 0, *args)
        config.stream = current_stream()
        if driver(config_at, handle, parameters_at, None):
            fallback(*args)

    launch.__dict__["kept"] = kept  # the driver reads them by address
    return launch
