"""Capturing a CUDA graph so that a failure harms nothing: the error is the block's own, and the process can capture again.

Within a capture nothing runs, so no peer waits for what is captured, and none is told when it fails. Waiting for the device is
what must not be done there: CUDA refuses, and gives up the whole capture.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterator
from typing import Any

import torch

_log = logging.getLogger(__name__)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph, also into one whose capture has failed and has yet to end."""
    with contextlib.suppress(RuntimeError):  # of a device whose last kernel failed: that one was no captured one
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return False


@contextlib.contextmanager
def captured(graph: torch.cuda.CUDAGraph, *, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """Launches inside go into `graph`, on `stream`; nothing runs. The device is synchronised before.

    As `torch.cuda.graph(graph, pool, stream, "thread_local")`, and where the block raises, its error is what leaves. torch 2.11
    raises the one of the broken capture in its place, and leaves the thread on `stream`, the allocator in the middle of a capture
    ("already recording to mempool_id", says the next one), and the random generators too. All of this is put back. What the
    failed capture had allocated stays reserved in the pool.

    Args:
        pool: as `torch.cuda.graph_pool_handle()` gives; None: one of its own. After a failure, take another one.
    """
    before = torch.cuda.current_stream(stream.device)
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    context = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    try:
        context.__enter__()
    except BaseException:
        _put_back(graph, stream, before, pool)
        raise
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):  # `error` says what happened, and this only that something did
            context.__exit__(type(error), error, error.__traceback__)
        _put_back(graph, stream, before, pool)
        raise
    try:
        context.__exit__(None, None, None)
    except BaseException:
        _put_back(graph, stream, before, pool)
        raise


def _put_back(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, before: torch.cuda.Stream, pool: Any) -> None:
    """What torch leaves behind where a capture did not end well. Nothing here raises: an error is on its way to the caller."""
    torch.cuda.set_stream(before)
    with contextlib.suppress(RuntimeError):  # as a rule: "not recording", which is what we want
        torch._C._cuda_endAllocateToPool(stream.device.index, pool)
    # torch's allocator of host memory may go on asking the graph whether it captures: it must not ask freed memory.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph))
    try:
        graph.reset()
        _capture_something(stream)
    except Exception as problem:  # noqa: BLE001
        _log.warning("after the failed capture of a CUDA graph, another one fails too: %s: %s", type(problem).__name__, problem)


def _capture_something(stream: torch.cuda.Stream) -> None:
    """A capture that ends well takes the random generators out of the state in which the failed one has left them."""
    something = torch.zeros(1, dtype=torch.int32, device=stream.device)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        something.fill_(1)
        graph.capture_end()
