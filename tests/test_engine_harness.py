"""How the tests of Megatron's engine compare tokens."""

import pytest

from engine_harness import Outcome, first_differences
from engine_harness.cases import Run

WANTED = {0: [5, 6, 7, 8], 1: [1, 2]}


@pytest.mark.parametrize(
    ("got", "places"),
    [
        ({0: [5, 6, 7, 8], 1: [1, 2]}, {}),
        ({0: [5, 9, 7, 8], 1: [1, 2]}, {0: 1}),
        ({0: [5, 6, 7], 1: [1, 2]}, {0: 3}),
        ({0: [5, 6, 7, 8]}, {1: -1}),
        ({0: [5, 6, 7, 8], 1: [1, 2], 2: [3]}, {2: -1}),
    ],
    ids=["equal", "another-token", "too-few", "a-request-is-missing", "a-request-too-many"],
)
def test_first_differences(got: dict, places: dict) -> None:
    assert first_differences(WANTED, got) == places


def run_of(*got: dict[int, list[int]]) -> Run:
    """One load of two ranks, on "ours" and as it is wanted."""
    wanted = {("engine", "megatron"): {"load": Outcome(WANTED, [])}}
    return Run([{**wanted, ("engine", "ours"): {"load": Outcome(tokens, [])}} for tokens in got], "")


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [
        (WANTED, WANTED, 0.0),
        ({0: [5, 9, 7, 8], 1: [1, 2]}, WANTED, 1 / 10),  # of 12 tokens two came behind the other choice
        ({0: [9, 9, 9, 9], 1: [9, 9]}, {0: [9, 9, 9, 9], 1: [9, 9]}, 1.0),
        ({0: [5, 6, 7, 8]}, WANTED, 1 / 10),
    ],
    ids=["equal", "one-other-choice", "all-others", "a-request-is-missing"],
)
def test_share_of_other_choices(first: dict, second: dict, share: float) -> None:
    assert run_of(first, second).share_of_other_choices("engine", "ours", "load", ("engine", "megatron")) == pytest.approx(share)


def test_engine_that_was_not_run_fails_with_the_reason() -> None:
    run = Run([{}, {}], "rank 1 ended")
    with pytest.raises(AssertionError, match="engine on ours was not run: rank 1 ended"):
        run.differences("engine", "ours", "load", ("engine", "ours"))
