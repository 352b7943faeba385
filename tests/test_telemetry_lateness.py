"""Whom a rank names as late, from its waits for the steps' counts."""

import random

import pytest

from tokenferry.telemetry import StepRecord, last_to_enter
from tokenferry.telemetry.lateness import LATE_NS, LATE_SHARE

MS = 1_000_000
Waits = tuple[int | None, ...]


def steps_of(waits: list[Waits], every_ns: int = 10 * MS) -> list[StepRecord]:
    return [StepRecord(number, number * every_ns, each, ()) for number, each in enumerate(waits, start=1)]


def in_ms(waits: list[tuple[float | None, ...]]) -> list[Waits]:
    return [tuple(None if wait is None else round(wait * MS) for wait in each) for each in waits]


@pytest.mark.parametrize(
    ("waits_ms", "reading"),
    [
        ([(None, 1, 5)] * 4, "rank 2 was last to enter in 4 of the last 4 steps, by 4.0 ms"),
        ([(None, 0, 0)] * 3, "no rank stood out as late in the last 3 steps"),
        ([(None, 3, 0)] * 97 + [(None, 0, 3)] * 3, "rank 1 was last to enter in 97 of the last 100 steps, by 3.0 ms"),
        ([(None, 4.1)] * 150, "rank 1 was last to enter in 100 of the last 100 steps, by 4.1 ms"),
        ([(None, 5)] + [(None, 0)] * 9, "no rank stood out as late in the last 10 steps"),
        ([], ""),
    ],
    ids=["third", "this-rank-alone", "of-a-hundred", "the-last-hundred", "once", "none"],
)
def test_the_reading_of_the_last_steps(waits_ms: list[tuple[float | None, ...]], reading: str) -> None:
    assert last_to_enter(steps_of(in_ms(waits_ms)), 0) == reading


@pytest.mark.parametrize("size", [2, 4, 8])
def test_an_even_run_names_nobody(size: int) -> None:
    """Hosts that launch eagerly enter some tens of microseconds apart, each as often last as the others."""
    draw = random.Random(1)
    entered = [[draw.gauss(0, 40_000) for _ in range(size)] for _ in range(100)]
    waits = [(None, *(max(0, round(each - moments[0])) for each in moments[1:])) for moments in entered]
    assert last_to_enter(steps_of(waits), 0) == "no rank stood out as late in the last 100 steps"


def test_tiny_spans_name_nobody() -> None:
    """A peer whose packet takes a microsecond longer than the others' in every step."""
    assert "no rank" in last_to_enter(steps_of([(None, 900, 2_000, 800)] * 100, every_ns=60_000), 0)


@pytest.mark.parametrize(("lead_ns", "is_named"), [(LATE_NS, True), (LATE_NS - 1, False)], ids=["as-much", "less"])
def test_a_late_rank_is_so_by_an_absolute_span(lead_ns: int, is_named: bool) -> None:
    steps = steps_of([(None, 1_000, 1_000 + lead_ns)] * 100, every_ns=MS)
    assert ("rank 2 was last" in last_to_enter(steps, 0)) == is_named


@pytest.mark.parametrize(("share", "is_named"), [(LATE_SHARE, True), (0.9 * LATE_SHARE, False)], ids=["as-much", "less"])
def test_a_late_rank_is_so_by_a_share_of_the_step(share: float, is_named: bool) -> None:
    steps = steps_of([(None, 0, round(share * 100 * MS))] * 100, every_ns=100 * MS)
    assert ("rank 2 was last" in last_to_enter(steps, 0)) == is_named


@pytest.mark.parametrize(
    ("size", "often", "is_named"),
    [(2, 63, True), (2, 62, False), (8, 35, True), (8, 34, False)],
    ids=["of-two", "of-two-too-few", "of-eight", "of-eight-too-few"],
)
def test_a_late_rank_is_so_in_clearly_more_steps_than_its_turn(size: int, often: int, is_named: bool) -> None:
    late, even = (None, *(0 for _ in range(size - 2)), MS), (None, *(0 for _ in range(size - 1)))
    steps = steps_of([late] * often + [even] * (100 - often))
    assert (f"rank {size - 1} was last to enter in {often} of" in last_to_enter(steps, 0)) == is_named
