"""The NCCL watchdog without a GPU: stubs stand for CUDA's events and for NCCL. `tests/gpu/test_collective.py` has it on GPUs."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tokenferry.errors import PeerFailedError
from tokenferry.transports.collective.messages import CommunicationError
from tokenferry.transports.collective.watchdog import Watchdog

TIMEOUT_S, WITHIN_S = 0.4, 5.0
STORE_LOST = PeerFailedError(0, "the rendezvous store, which rank 0 hosts, cannot be reached any more", 0, "open")
IN_A_CAPTURE = RuntimeError("CUDA error: operation not permitted when stream is capturing")


class Event:
    """`answers` says what each query comes to, the last one for ever."""

    answers: tuple[bool | Exception, ...] = (False,)

    def __init__(self) -> None:
        self.num_queries = 0

    def record(self) -> None:
        return

    def query(self) -> bool:
        answer = self.answers[min(self.num_queries, len(self.answers) - 1)]
        self.num_queries += 1
        if isinstance(answer, Exception):
            raise answer
        return answer


class Communicator:
    """Rank 1 of 2, whose peer waits nowhere."""

    rank, device, timeout_s = 1, torch.device("cpu"), TIMEOUT_S

    def __init__(self, store_error: Exception | None = None, abort_error: Exception | None = None) -> None:
        self.store_error, self.abort_error, self.num_aborts = store_error, abort_error, 0

    def post_position(self, number: int) -> None:
        if self.store_error is not None:
            raise self.store_error

    def positions(self, number: int) -> list[bool]:
        self.post_position(number)
        return [False, True]

    def abort_backend(self) -> None:
        self.num_aborts += 1
        if self.abort_error is not None:
            raise self.abort_error


Watch = Callable[..., Watchdog]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Starts a watchdog with one call under way."""
    started: list[Watchdog] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)

    def start(communicator: Communicator, *answers: bool | Exception) -> Watchdog:
        # The thread that launches the call asks first, and is answered as in a stream that has not come so far.
        monkeypatch.setattr(torch.cuda, "Event", type("Event", (Event,), {"answers": (False, *answers)}))
        started.append(Watchdog(communicator, TIMEOUT_S))
        started[-1].launched(started[-1].watch())
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop()
        each.join(WITHIN_S)
        assert not each.is_alive()


def found_by(watchdog: Watchdog) -> CommunicationError:
    give_up_s = time.monotonic() + WITHIN_S
    while watchdog.error is None and time.monotonic() < give_up_s:
        time.sleep(0.01)
    assert watchdog.error is not None
    watchdog.join(WITHIN_S)
    return watchdog.error


def test_a_call_that_does_not_end_is_aborted_and_the_peer_that_waits_nowhere_is_late(watch: Watch) -> None:
    communicator = Communicator()
    error = found_by(watch(communicator, False))
    assert (error.rank, error.reason, communicator.num_aborts) == (0, "", 1)
    assert error.waited_s > TIMEOUT_S


@pytest.mark.parametrize(
    ("answer", "store_error"),
    [(RuntimeError("CUDA error: an illegal memory access"), None), (False, AttributeError("no such method"))],
    ids=["the-event-raises", "a-call-of-its-own-raises"],
)
def test_an_exception_of_its_own_aborts_and_is_told(
    watch: Watch, answer: bool | Exception, store_error: Exception | None
) -> None:
    """It ended the thread once, and nothing else: the host waited for ever."""
    communicator = Communicator(store_error)
    error = found_by(watch(communicator, answer))
    problem = store_error or answer
    assert error.rank == communicator.rank
    assert error.reason == f"its NCCL watchdog thread failed with {type(problem).__name__}: {problem}"
    assert communicator.num_aborts == 1


def test_what_it_found_stands_also_where_the_abort_fails(watch: Watch) -> None:
    communicator = Communicator(abort_error=RuntimeError("NCCL is gone"))
    assert found_by(watch(communicator, False)).rank == 0
    assert communicator.num_aborts == 1


def test_where_the_store_is_lost_its_host_is_blamed_once_the_call_is_late(watch: Watch) -> None:
    communicator = Communicator(STORE_LOST)
    error = found_by(watch(communicator, False))
    assert (error.rank, error.reason) == (0, STORE_LOST.reason)
    assert error.waited_s > TIMEOUT_S


def test_an_event_that_may_not_be_asked_during_a_capture_is_asked_again(watch: Watch) -> None:
    communicator = Communicator()
    watchdog = watch(communicator, *[IN_A_CAPTURE] * 5, True)
    time.sleep(2 * TIMEOUT_S)
    assert (watchdog.error, communicator.num_aborts, watchdog.is_alive()) == (None, 0, True)
