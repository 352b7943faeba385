"""What the NCCL communicator asks of PyTorch's backend, and when, without a GPU: a stub stands for the backend, and notes its
calls. tests/gpu has the real one."""

import atexit
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from patience import SLACK_S
from tokenferry.transports.collective.messages import CommunicationError, Pending
from tokenferry.transports.collective.nccl import NcclCommunicator

WHOLE = ["start", "all_gather here", "all_gather here", "end"]
HALVES = ["start", "all_gather", "all_gather", "end"]


class Backend:
    """Of two ranks, whose peer brings what this one brings. `calls` is shared, so that a test finds it."""

    Options = SimpleNamespace

    def __init__(self, *_: object) -> None:
        self.calls: list[str] = []

    def _work(self, call: str, options: tuple[Any, ...]) -> SimpleNamespace | None:
        self.calls.append(call + ("" if all(each.asyncOp for each in options) else " here"))
        return SimpleNamespace(wait=lambda: self.calls.append("wait")) if all(each.asyncOp for each in options) else None

    def _start_coalescing(self) -> None:
        self.calls.append("start")

    def _end_coalescing(self) -> SimpleNamespace | None:
        is_here = self.calls[-1].endswith("here")
        self.calls.append("end")
        return None if is_here else SimpleNamespace(wait=lambda: self.calls.append("wait"))

    def _allgather_base(self, out: torch.Tensor, rows: torch.Tensor, *options: Any) -> SimpleNamespace | None:
        out.view(2, -1).copy_(rows.reshape(1, -1).expand(2, -1).clone())
        return self._work("all_gather", options)

    def _reduce_scatter_base(self, out: torch.Tensor, rows: torch.Tensor, *options: Any) -> SimpleNamespace | None:
        out.copy_(2 * rows.chunk(2)[0])
        return self._work("reduce_scatter", options)

    def send(self, *_: object) -> None:
        self.calls.append("send")

    def recv(self, *_: object) -> None:
        self.calls.append("recv")

    def abort(self) -> None:
        self.calls.append("abort")


class Event:
    recorded = 0

    def record(self) -> None:
        Event.recorded += 1

    def query(self) -> bool:
        return True


@pytest.fixture
def communicator(monkeypatch: pytest.MonkeyPatch) -> Iterator[NcclCommunicator]:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Backend, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    store = SimpleNamespace(under=lambda _: SimpleNamespace(store=None), set=lambda *_: None, has=lambda _: False)
    made = NcclCommunicator(store, SimpleNamespace(rank=0, size=2, device=torch.device("cpu")), 5.0, 5.0)
    made._backend.calls.clear()
    monkeypatch.setattr(Event, "recorded", 0)
    yield made
    made.abort()


def gather(communicator: NcclCommunicator, *, overlaps: bool) -> tuple[Pending, list[torch.Tensor]]:
    rows = torch.tensor([[1.5, -0.0]]), torch.tensor([[7]])
    gathered = [torch.zeros(2, 2), torch.zeros(2, 1, dtype=torch.int64)]
    return communicator.all_gather(gathered, rows, overlaps=overlaps), gathered


def reduce(communicator: NcclCommunicator, *, overlaps: bool) -> tuple[Pending, list[torch.Tensor]]:
    out = torch.zeros(1, 2)
    return communicator.reduce_scatter(out, torch.ones(2, 2), overlaps=overlaps), [out]


Start = Callable[..., tuple[Pending, list[torch.Tensor]]]


@pytest.mark.parametrize(
    ("start", "calls"), [(gather, WHOLE), (reduce, ["reduce_scatter here"])], ids=["all-gather", "reduce-scatter"]
)
def test_a_whole_call_is_one_launch_on_the_current_stream(communicator: NcclCommunicator, start: Start, calls: list[str]) -> None:
    """Expected: nothing is left to wait for, and the watchdog has one event behind the call."""
    pending, _ = start(communicator, overlaps=False)
    pending.finish()
    assert pending.headers() is None
    assert communicator._backend.calls == calls
    assert Event.recorded == 1


@pytest.mark.parametrize(
    ("start", "calls"), [(gather, HALVES), (reduce, ["reduce_scatter"])], ids=["all-gather", "reduce-scatter"]
)
def test_halves_run_beside_the_current_stream(communicator: NcclCommunicator, start: Start, calls: list[str]) -> None:
    """Expected: the current stream waits in the second half, and that is where the watchdog's event stands."""
    pending, _ = start(communicator, overlaps=True)
    assert (communicator._backend.calls, Event.recorded) == (calls, 0)
    pending.finish()
    assert (communicator._backend.calls, Event.recorded) == ([*calls, "wait"], 1)


def test_rows_come_to_their_tensors(communicator: NcclCommunicator) -> None:
    _, (rows, ids) = gather(communicator, overlaps=False)
    _, (total,) = reduce(communicator, overlaps=False)
    assert rows.tolist() == [[1.5, -0.0]] * 2
    assert ids.tolist() == [[7], [7]]
    assert total.tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("start", [gather, reduce], ids=["all-gather", "reduce-scatter"])
def test_nothing_is_watched_in_a_capture(communicator: NcclCommunicator, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for overlaps in (False, True):
        start(communicator, overlaps=overlaps)[0].finish()
    assert Event.recorded == 0


@pytest.mark.parametrize("start", [gather, reduce], ids=["all-gather", "reduce-scatter"])
@pytest.mark.parametrize("overlaps", [False, True], ids=["whole", "halves"])
def test_what_the_watchdog_found_is_raised(communicator: NcclCommunicator, start: Start, overlaps: bool) -> None:
    """Before anything is launched, and when a call that was launched is finished."""
    pending, _ = start(communicator, overlaps=overlaps)
    launched = list(communicator._backend.calls)
    communicator._watchdog.error = CommunicationError(1, 5.0)
    if not overlaps:
        with pytest.raises(CommunicationError):
            pending.finish()
    with pytest.raises(CommunicationError):
        start(communicator, overlaps=overlaps)
    assert communicator._backend.calls == launched


def test_closing_lets_what_was_launched_end(communicator: NcclCommunicator, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(Event, "query", lambda _: next(answers))
    gather(communicator, overlaps=False)
    communicator.let_launched_end()
    assert next(answers, "all asked") == "all asked"


def test_closing_does_not_wait_for_what_the_watchdog_gave_up(
    communicator: NcclCommunicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Event, "query", lambda _: False)
    gather(communicator, overlaps=False)
    communicator._watchdog.error = CommunicationError(1, 5.0)
    communicator.let_launched_end()  # the test's time limit is the assertion


def test_closing_ends_also_where_the_watchdog_itself_waits(
    communicator: NcclCommunicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a store whose host is stopped: nobody would say that the peer is late."""
    communicator._watchdog.stop()
    communicator._watchdog.join()
    monkeypatch.setattr(Event, "query", lambda _: False)
    gather(communicator, overlaps=False)
    communicator.timeout_s = 0.1
    start_s = time.monotonic()
    communicator.let_launched_end()
    assert time.monotonic() - start_s < SLACK_S


def test_closing_amid_the_watchdogs_work_does_not_wait_for_its_own_thread(communicator: NcclCommunicator) -> None:
    """A signal handler closes what its thread is using."""
    gather(communicator, overlaps=False)
    with communicator._watchdog._lock:
        communicator.let_launched_end()  # the test's time limit is the assertion


def test_the_interpreters_end_waits_for_an_abort_that_graphs_delay(
    communicator: NcclCommunicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that came back from NCCL while Python was torn down ended the process with SIGABRT."""
    at_exit: list[tuple[Any, ...]] = []
    monkeypatch.setattr(atexit, "register", lambda *given: at_exit.append(given))
    gone, calls = threading.Event(), communicator._backend.calls
    monkeypatch.setattr(Backend, "abort", lambda self: gone.wait(10.0) and self.calls.append("abort"))
    communicator._captured = True
    communicator.abort()
    assert calls == [], "closing waits for no graph"
    threading.Timer(0.2, gone.set).start()
    ((wait, limit_s),) = at_exit
    wait(limit_s)
    assert calls == ["abort"]
