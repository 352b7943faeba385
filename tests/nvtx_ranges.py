"""The NVTX ranges that a process pushes, as a profiler gets them: through CUPTI, which Nsight Systems stands on too.

NVTX hands its calls to the library that `NVTX_INJECTION64_PATH` names when the process starts. Layouts and numbers are those of
cupti_activity.h.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

_MARKER = 12
_START = 1 << 1
_BUFFER_BYTES = 1 << 16


class _Marker(ctypes.Structure):
    """CUpti_ActivityMarker2."""

    _fields_ = (
        ("kind", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("timestamp", ctypes.c_uint64), ("id", ctypes.c_uint32),
        ("object_kind", ctypes.c_uint32), ("object_id", ctypes.c_uint32 * 3), ("pad", ctypes.c_uint32),
        ("name", ctypes.c_char_p), ("domain", ctypes.c_char_p),
    )  # fmt: skip


_Requested = ctypes.CFUNCTYPE(
    None, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)
)
_Completed = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


def cupti_path() -> str | None:
    """The library that torch has loaded for its own profiler, if it has."""
    found = re.search(r"/\S*libcupti\.so\S*", Path("/proc/self/maps").read_text())
    return None if found is None else found[0]


def ranges_of(path: str, call: Callable[[], object]) -> list[str]:
    """Names of the ranges that begin in `call`, in their order."""
    cupti = ctypes.CDLL(path)
    buffers: list[ctypes.Array[ctypes.c_char]] = []
    seen: list[tuple[int, str]] = []
    failures: list[int] = []

    @_Requested
    def requested(buffer: ctypes._Pointer, size: ctypes._Pointer, most_records: ctypes._Pointer) -> None:
        kept = ctypes.create_string_buffer(_BUFFER_BYTES + 8)
        buffers.append(kept)
        buffer[0], size[0], most_records[0] = (ctypes.addressof(kept) + 7) // 8 * 8, _BUFFER_BYTES, 0

    @_Completed
    def completed(context: int, stream: int, buffer: int, size: int, valid: int) -> None:
        record = ctypes.c_void_p()
        while valid and cupti.cuptiActivityGetNextRecord(
            ctypes.c_void_p(buffer), ctypes.c_size_t(valid), ctypes.byref(record)
        ) == 0:  # fmt: skip
            marker = _Marker.from_address(record.value)
            if marker.kind == _MARKER and marker.flags & _START and marker.name:
                seen.append((marker.timestamp, marker.name.decode()))

    def checked(code: int) -> None:
        if code:
            failures.append(code)

    checked(cupti.cuptiActivityRegisterCallbacks(requested, completed))
    checked(cupti.cuptiActivityEnable(_MARKER))
    call()
    checked(cupti.cuptiActivityFlushAll(1))
    checked(cupti.cuptiActivityDisable(_MARKER))
    assert not failures, f"CUPTI's error codes: {failures}"
    return [name for _, name in sorted(seen)]
