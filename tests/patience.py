"""How much later than it should something may come before a test fails, and how to wait for it."""

import time
from collections.abc import Callable

SLACK_S = 20.0
"""What a test adds to the right time wherever it sets a limit from above.

Tests run two at a time on a busy machine, where a process may stand still for seconds: limits of two seconds above the right time
failed there while nothing was wrong. So a limit lies as far above the right time as the wrong behaviour allows, and a test is
written so that the wrong behaviour takes much longer than this: a time-out of 60 s, or for ever. What must come in an order is
tested by the order, with barriers between the ranks, and not by sleeping longer than another one waits.
"""
PATIENT_S = 60.0
"""The time-out of steps in which nobody is meant to be late."""


def once(look: Callable[[], object], limit_s: float = PATIENT_S) -> None:
    """Returns as soon as `look` says yes. Raises AssertionError after `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    while not look():
        assert time.monotonic() < deadline_s, f"not within {limit_s} s"
        time.sleep(0.01)
