"""A CUDA stream that nobody else has, for small kernels beside whatever runs, waits or is captured."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch

_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING of cuda.h: nothing on the legacy default stream waits for it, nor it for that."""
_HIGHEST_PRIORITY = -1000
"""The driver takes the highest that there is."""
_CAPTURE_MODE_RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED of cuda.h."""


class SideStream:
    """The driver makes it. torch's streams come from a pool of 32 and are given out again and again: one of them may be the
    stream on which a caller captures a graph, which would then hold what was launched here.

    Made by a thread in which the device is in use. Where there is no driver library it is one of torch's streams after all.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle = ctypes.c_void_p()
        self._driver = _driver()
        with torch.cuda.device(device):
            if self._driver is not None and self._create() == 0:
                self._stream: Any = torch.cuda.ExternalStream(self._handle.value, device)
            else:
                self._handle, self._stream = ctypes.c_void_p(), torch.cuda.Stream(device, priority=-1)

    def _create(self) -> int:
        """Before the large kernels of a busy rank, which is why its priority is the highest."""
        assert self._driver is not None, "the caller has looked"
        return int(self._driver.cuStreamCreateWithPriority(ctypes.byref(self._handle), _NON_BLOCKING, _HIGHEST_PRIORITY))

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """What the thread launches within goes here. It may, whatever is captured meanwhile and in whichever mode."""
        with self.relaxed(), torch.cuda.stream(self._stream):
            yield

    @contextlib.contextmanager
    def relaxed(self) -> Iterator[None]:
        """Within it the thread may do what would spoil a capture elsewhere: wait for this stream, ask events."""
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        if self._driver is not None:
            self._driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            yield
        finally:
            if self._driver is not None:  # `mode` holds the thread's own now
                self._driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def close(self) -> None:
        """Waits for what was launched here. The stream is gone then."""
        self._stream.synchronize()
        if self._driver is not None and self._handle:
            self._driver.cuStreamDestroy_v2(self._handle)
        self._handle = ctypes.c_void_p()


def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
