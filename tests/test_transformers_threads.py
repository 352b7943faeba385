"""One thread at a time uses a model; and the time that it spends in communication is added up."""

import threading
from collections.abc import Callable

import pytest
import torch

from tokenferry.errors import StateError
from tokenferry.integrations.transformers.one_thread import OneThread
from tokenferry.integrations.transformers.stopwatch import Stopwatch

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs

CPU = torch.device("cpu")


def in_another_thread(call: Callable[[], object]) -> BaseException | None:
    """What `call` raises there."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10.0)
    assert not thread.is_alive()
    return raised[0] if raised else None


def test_a_second_thread_is_refused_and_the_first_goes_on() -> None:
    turn = OneThread(waits=False)
    with turn.inside("generate"), turn.inside("forward"):
        error = in_another_thread(lambda: turn.enter("generate"))
        assert isinstance(error, StateError)
        assert "generate: another thread (MainThread) is in the middle of a call" in str(error)
        assert turn.is_mine()
    assert in_another_thread(turn.inside("generate").__enter__) is None


def test_a_second_thread_waits_if_it_is_asked_to() -> None:
    turn, came = OneThread(waits=True), []
    thread = threading.Thread(target=lambda: (turn.enter("generate"), came.append(None), turn.leave()))
    with turn.inside("generate"):
        thread.start()
        thread.join(0.2)
        assert not came
    thread.join(10.0)
    assert came


def test_the_thread_for_which_the_owner_waits_is_let_in_and_no_third() -> None:
    """As continuous batching has it."""
    turn = OneThread(waits=False)

    def guest() -> None:
        turn.enter("forward", as_guest=True)
        turn.leave()
        assert isinstance(in_another_thread(lambda: turn.enter("forward", as_guest=True)), StateError)
        turn.enter("forward", as_guest=True)
        turn.leave()

    with turn.hosting("generate_batch"):
        assert isinstance(in_another_thread(lambda: turn.enter("generate")), StateError)
        assert in_another_thread(guest) is None
    assert in_another_thread(lambda: turn.enter("generate")) is None


def test_a_thread_that_ended_amid_a_call_blocks_nobody() -> None:
    turn = OneThread(waits=False)
    assert in_another_thread(lambda: turn.enter("forward")) is None
    turn.enter("forward")
    assert turn.is_mine()


def test_stopwatch_adds_up() -> None:
    stopwatch = Stopwatch(CPU)
    assert stopwatch.total_s == 0.0
    for _ in range(2):
        before_s = stopwatch.total_s
        with stopwatch.running():
            sum(range(1000))
        assert stopwatch.total_s > before_s
