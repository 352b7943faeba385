"""How long this rank spends in communication, waiting for late peers included."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Final

import torch

_MOST_PENDING: Final = 2048
"""Pairs of CUDA events kept before they are read, which waits for the device: a few times a minute."""


class Stopwatch:
    """Adds up the time within `with stopwatch.running():`: wall time on the CPU, stream time on CUDA.

    Nothing is measured while a CUDA graph is captured, nor when it is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._total_s = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def total_s(self) -> float:
        """Seconds so far. On CUDA it waits for what was launched."""
        self._drain()
        return self._total_s

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Measures what is done, or launched, inside."""
        if self._device.type != "cuda":
            start_s = time.perf_counter()
            try:
                yield
            finally:
                self._total_s += time.perf_counter() - start_s
        elif torch.cuda.is_current_stream_capturing():
            yield
        else:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._pending.append((start, end))
            if len(self._pending) >= _MOST_PENDING:
                self._drain()

    def _drain(self) -> None:
        pending, self._pending = self._pending, []
        if pending:
            pending[-1][1].synchronize()
            self._total_s += sum(start.elapsed_time(end) for start, end in pending) / 1000
