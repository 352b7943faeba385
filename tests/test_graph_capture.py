"""`graph_capture.captured` with a stand-in for torch's capture that fails as torch 2.11 does: what leaves, and what is put back.
Real captures are in tests/gpu/test_failed_capture.py."""

import types
from typing import Any

import pytest
import torch

from tokenferry import graph_capture
from tokenferry.graph_capture import captured

POOL = (0, 7)


class OwnError(Exception):
    """Of the block."""


class Torch:
    """What `captured` uses of `torch.cuda`. `begins` and `ends`: what entering and leaving a capture raise.

    As torch does, it goes to the stream of the capture, and comes back only where the capture ends well.
    """

    def __init__(self) -> None:
        self.begins: Exception | None = None
        self.ends: Exception | None = None
        self.device = types.SimpleNamespace(index=3)
        self.before, self.side = (types.SimpleNamespace(device=self.device, wait_stream=lambda _: None) for _ in range(2))
        self.current: Any = self.before
        self.recording_to: set[Any] = set()
        self.ended = 0

    def current_stream(self, device: Any) -> Any:
        return self.current

    def set_stream(self, stream: Any) -> None:
        self.current = stream

    def graph_pool_handle(self) -> Any:
        return POOL

    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local"
        outer = self

        class Context:
            def __enter__(self) -> None:
                outer.current = stream
                outer.recording_to.add(pool)
                if outer.begins:
                    raise outer.begins

            def __exit__(self, *_: object) -> None:
                outer.ended += 1
                if outer.ends:
                    raise outer.ends
                outer.recording_to.discard(pool)
                outer.current = outer.before

        return Context()

    def end_allocate(self, index: int, pool: Any) -> None:
        assert index == self.device.index
        if pool not in self.recording_to:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording_to.discard(pool)


class Graph:
    def __init__(self) -> None:
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Torch:
    stand_in = Torch()
    for name in ("current_stream", "set_stream", "graph_pool_handle", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", stand_in.end_allocate, raising=False)
    monkeypatch.setattr(graph_capture, "_capture_something", lambda stream: None)
    return stand_in


def capture(cuda: Torch, graph: Graph, error: Exception | None = None) -> None:
    with captured(graph, stream=cuda.side, pool=POOL):  # type: ignore[arg-type]
        assert cuda.current is cuda.side
        if error is not None:
            raise error


def is_as_before(cuda: Torch) -> bool:
    return cuda.current is cuda.before and not cuda.recording_to


@pytest.mark.parametrize("ends", [None, RuntimeError("capture invalidated")], ids=["valid", "invalidated"])
def test_the_blocks_own_error_leaves_and_all_is_as_before(ends: Exception | None, cuda: Torch) -> None:
    cuda.ends, graph = ends, Graph()
    with pytest.raises(OwnError):
        capture(cuda, graph, OwnError())
    assert cuda.ended == 1
    assert is_as_before(cuda)
    assert graph.resets == 1


def test_an_error_that_only_the_end_finds_leaves_and_all_is_as_before(cuda: Torch) -> None:
    cuda.ends, graph = RuntimeError("unjoined work"), Graph()
    with pytest.raises(RuntimeError, match="unjoined work"):
        capture(cuda, graph)
    assert is_as_before(cuda)


def test_a_capture_that_does_not_begin_leaves_all_as_before(cuda: Torch) -> None:
    cuda.begins, graph = RuntimeError("another thread captures"), Graph()
    with pytest.raises(RuntimeError, match="another thread captures"):
        capture(cuda, graph)
    assert cuda.ended == 0
    assert is_as_before(cuda)


def test_where_torch_ends_well_nothing_is_put_back(cuda: Torch) -> None:
    graph = Graph()
    capture(cuda, graph)
    assert is_as_before(cuda)
    assert graph.resets == 0


def test_an_interrupt_leaves_as_it_is(cuda: Torch) -> None:
    cuda.ends = RuntimeError("capture invalidated")
    with pytest.raises(KeyboardInterrupt), captured(Graph(), stream=cuda.side, pool=POOL):  # type: ignore[arg-type]
        raise KeyboardInterrupt
    assert is_as_before(cuda)


def test_what_putting_back_raises_does_not_hide_the_error(cuda: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(graph_capture, "_capture_something", fails)
    with pytest.raises(OwnError):
        capture(cuda, Graph(), OwnError())
