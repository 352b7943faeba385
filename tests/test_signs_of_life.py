"""The thread that gives a busy rank's signs of life: blocks of several threads, and a thread that cannot be started."""

import threading
from collections.abc import Callable

import pytest

from patience import PATIENT_S
from tokenferry.transports import busy
from tokenferry.transports.busy import SignsOfLife


class Rank:
    """Notes what it is told to say."""

    timeout_s = 0.4

    def __init__(self, as_sign: Callable[[str], None] = lambda reason: None) -> None:
        self.said: list[str] = []
        self._as_sign = as_sign
        self.gave_sign = threading.Event()

    def give_sign_of_life(self, reason: str, busy_s: float) -> None:
        self._as_sign(reason)
        self.said.append(reason)
        self.gave_sign.set()

    def withdraw_signs_of_life(self) -> None:
        self.said.append("")


def test_a_block_that_ends_does_not_withdraw_the_signs_of_one_that_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "_FAREWELL_S", PATIENT_S)  # so long may the end of the first block take
    signs = SignsOfLife()
    held_up, entered, may_go_on = threading.Event(), threading.Event(), threading.Event()

    def hold_up(reason: str) -> None:
        if reason == "first":
            held_up.set()
            assert entered.wait(PATIENT_S)  # the first block's end waits for this sign; the second block begins meanwhile

    rank = Rank(hold_up)

    def second() -> None:
        with signs.during("second", rank):
            entered.set()
            assert may_go_on.wait(PATIENT_S)

    other = threading.Thread(target=second)
    with signs.during("first", rank):
        assert held_up.wait(PATIENT_S)
        threading.Timer(0.2, other.start).start()
    assert entered.is_set()
    assert "" not in rank.said
    may_go_on.set()
    other.join(PATIENT_S)
    assert rank.said[-1] == ""


def test_a_thread_that_cannot_be_started_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    signs, rank = SignsOfLife(), Rank()

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError, match="can't start new thread"), signs.during("compiling", rank):
            pass
    with signs.during("compiling again", rank):
        assert rank.gave_sign.wait(PATIENT_S)
    assert rank.said[-2:] == ["compiling again", ""]
