"""The NCCL watchdog without a GPU: stubs stand for CUDA's events and for NCCL. `tests/gpu/test_collective.py` has it on GPUs."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from patience import PATIENT_S, SLACK_S, once
from tokenferry.errors import PeerFailedError
from tokenferry.transports.busy import WaitClock
from tokenferry.transports.collective.messages import CommunicationError
from tokenferry.transports.collective.watchdog import Watchdog

TIMEOUT_S = 0.4
STORE_LOST = PeerFailedError(0, "the rendezvous store, which rank 0 hosts, cannot be reached any more", 0, "open")
IN_A_CAPTURE = RuntimeError("CUDA error: operation not permitted when stream is capturing")


class Event:
    """`answers` says what each query comes to, the last one for ever."""

    answers: tuple[bool | Exception, ...] = (False,)

    def __init__(self) -> None:
        self.num_queries = 0

    def record(self, stream: object = None) -> None:
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
        self.said: CommunicationError | None = None
        self.posted: list[int] = []
        self.signs_until_s = 0.0

    def post_position(self, number: int) -> None:
        self.posted.append(number)
        if self.store_error is not None:
            raise self.store_error

    def positions(self, number: int) -> list[bool]:
        if self.store_error is not None:
            raise self.store_error
        return [False, True]

    def what_peers_said(self, waited_s: float) -> CommunicationError | None:
        return self.said

    def num_signs(self) -> int:
        """A busy rank's, as long as `signs_until_s` says."""
        return int(min(time.monotonic(), self.signs_until_s) * 50)

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

    def start(communicator: Communicator, *answers: bool | Exception, longest_s: float = 2 * PATIENT_S) -> Watchdog:
        # The thread that launches the call asks first, and is answered as in a stream that has not come so far.
        monkeypatch.setattr(torch.cuda, "Event", type("Event", (Event,), {"answers": (False, *answers)}))
        started.append(Watchdog(communicator, WaitClock(communicator.num_signs, longest_s)))
        started[-1].launched(started[-1].watch())
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop()
        each.join(PATIENT_S)
        assert not each.is_alive()


def found_by(watchdog: Watchdog) -> CommunicationError:
    once(lambda: watchdog.error is not None)
    assert watchdog.error is not None
    watchdog.join(PATIENT_S)
    return watchdog.error


def test_a_call_is_given_up_a_time_out_after_the_last_sign_of_life(watch: Watch) -> None:
    communicator = Communicator()
    communicator.signs_until_s = time.monotonic() + 2 * TIMEOUT_S
    error = found_by(watch(communicator, False))
    assert 3 * TIMEOUT_S - 0.05 < error.waited_s < 3 * TIMEOUT_S + SLACK_S


def test_signs_of_life_do_not_put_off_the_end_for_ever(watch: Watch) -> None:
    communicator = Communicator()
    communicator.signs_until_s = time.monotonic() + PATIENT_S
    error = found_by(watch(communicator, False, longest_s=1.5))
    assert 1.5 < error.waited_s < 1.5 + SLACK_S


def test_the_limit_may_change_while_a_call_is_waited_for(watch: Watch) -> None:
    communicator = Communicator()
    communicator.timeout_s = PATIENT_S
    watchdog = watch(communicator, False)
    time.sleep(2 * TIMEOUT_S)
    assert watchdog.error is None
    communicator.timeout_s = TIMEOUT_S
    assert found_by(watchdog).rank == 0


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
    communicator.timeout_s = PATIENT_S
    watchdog = watch(communicator, *[IN_A_CAPTURE] * 5, True)
    once(lambda: not watchdog._calls)
    assert (watchdog.error, communicator.num_aborts, watchdog.is_alive()) == (None, 0, True)


# --- an engine's steps, in which no call is seen --------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> Callable[..., Watchdog]:
    """A watchdog beside an engine's step that has made no call. The stream answers to its events as `watch` says."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(query=lambda: False))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def start(communicator: Communicator, *answers: bool | Exception) -> Watchdog:
        watchdog = watch(communicator, *answers)
        watchdog._calls.clear()
        return watchdog

    return start


def test_a_stream_that_stands_still_within_an_engines_step_is_given_up(engine: Callable[..., Watchdog]) -> None:
    communicator = Communicator()
    watchdog = engine(communicator, False)
    start = time.monotonic()
    watchdog.enter_step()
    error = found_by(watchdog)
    assert (error.rank, error.reason, communicator.num_aborts, communicator.posted) == (0, "", 1, [-1])
    assert TIMEOUT_S < time.monotonic() - start < TIMEOUT_S + SLACK_S


def test_what_an_engines_step_has_launched_is_watched_after_it_too(engine: Callable[..., Watchdog]) -> None:
    communicator = Communicator()
    watchdog = engine(communicator, False)
    watchdog.enter_step()
    watchdog.leave_step()
    assert found_by(watchdog).rank == 0


def test_a_stream_that_goes_on_is_left_alone_however_long_the_step_takes(engine: Callable[..., Watchdog]) -> None:
    communicator = Communicator()
    watchdog = engine(communicator, True)
    watchdog.enter_step()
    time.sleep(3 * TIMEOUT_S)
    watchdog.leave_step()
    assert (watchdog.error, communicator.num_aborts, watchdog.is_alive()) == (None, 0, True)


def test_a_nested_step_is_the_same_step(engine: Callable[..., Watchdog]) -> None:
    watchdog = engine(Communicator(), True)
    for _ in range(2):
        watchdog.enter_step()
        watchdog.enter_step()
        watchdog.leave_step()
        watchdog.leave_step()
    assert (watchdog._step_number, watchdog._streams) == (-2, [])


def test_leaving_a_step_says_nothing_of_a_device_that_has_failed(
    engine: Callable[..., Watchdog], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error would stand in the place of the engine's own."""

    def failed() -> bool:
        raise RuntimeError("CUDA error: an illegal memory access")

    watchdog = engine(Communicator(), True)
    watchdog.enter_step()
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_current_stream_capturing", failed)
        watchdog.leave_step()
    assert watchdog._streams == []


def test_a_peer_that_has_said_why_it_gave_up_is_not_waited_for(watch: Watch) -> None:
    communicator = Communicator()
    communicator.said = CommunicationError(0, 0.1, "out of memory")
    communicator.timeout_s = PATIENT_S
    start = time.monotonic()
    error = found_by(watch(communicator, False))
    assert (error.rank, error.reason, communicator.num_aborts) == (0, "out of memory", 1)
    assert time.monotonic() - start < SLACK_S
