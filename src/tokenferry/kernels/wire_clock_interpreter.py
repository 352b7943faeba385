"""The device functions of `wire_clock` in numpy, for Triton's interpreter. Those that wait stand in `wire_interpreter`."""

from __future__ import annotations

import time

import numpy as np
import triton.language as tl

from tokenferry.kernels.wire_interpreter import _int64, _scalar, _tensor
from tokenferry.kernels.wire_interpreter import await_count_timed as await_count
from tokenferry.kernels.wire_interpreter import await_signal_timed as await_signal

__all__ = ["await_count", "await_signal", "clock", "global_clock", "note_wait"]


def clock():
    return _tensor(np.array(time.monotonic_ns(), np.int64), tl.int64)


def global_clock():
    return _tensor(np.array(time.time_ns(), np.int64), tl.int64)


def note_wait(total_ptr, kept_ptr, since, stamp, is_noted):
    if _scalar(is_noted):
        span = time.monotonic_ns() - _scalar(since)
        _int64(_scalar(total_ptr))[0] += span
        _int64(_scalar(kept_ptr))[0] = span | _scalar(stamp)
