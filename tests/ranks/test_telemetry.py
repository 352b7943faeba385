"""Telemetry over gloo, and with one rank: what a delayed rank costs, counts by hand, the error that says so, a trace."""

import json
from pathlib import Path
from typing import Any

import pytest

import telemetry_work as work
from rank_pool import RankPools

pytestmark = pytest.mark.ranks


@pytest.mark.alone
@pytest.mark.parametrize("within", [False, True], ids=["entering", "within"])
@pytest.mark.parametrize("late", [0, 2])
def test_a_delayed_rank_is_found_by_its_waits(on_ranks: RankPools, late: int, within: bool) -> None:
    work.check_delayed(on_ranks(work.delayed, 3, "collective", late, within), late, within)


@pytest.mark.parametrize(("transport", "world_size"), [("local", 1), ("collective", 1), ("collective", 2)])
def test_loads_and_rows_are_those_counted_by_hand(on_ranks: RankPools, transport: str, world_size: int) -> None:
    for told in on_ranks(work.counts_by_hand, world_size, transport):
        work.check_counts_by_hand(told)


@pytest.mark.parametrize("formats", work.BYTES_OF_ROUNDS.values(), ids=work.BYTES_OF_ROUNDS)
@pytest.mark.parametrize(("transport", "world_size"), [("local", 1), ("collective", 2)])
def test_bytes_of_rows_and_terms(
    on_ranks: RankPools, transport: str, world_size: int, formats: tuple[dict[str, Any], int, int]
) -> None:
    settings, *sizes = formats
    tokens = [of_ranks[:world_size] for of_ranks in work.TOKENS_OF_ROUNDS]
    work.check_bytes_of_rounds(on_ranks(work.bytes_of_rounds, world_size, transport, tokens, settings), tokens, *sizes)


def test_compiled_code_is_counted(on_ranks: RankPools) -> None:
    work.check_counts_of_compiled_code(on_ranks(work.counts_of_compiled_code, 2, "collective"))


@pytest.mark.parametrize(("transport", "world_size"), [("local", 1), ("collective", 2)])
def test_nothing_is_counted_while_it_is_stopped(on_ranks: RankPools, transport: str, world_size: int) -> None:
    assert on_ranks(work.stops_and_starts, world_size, transport) == [[1, 1, 2]] * world_size


def test_a_workspace_without_telemetry_says_how_to_get_it(on_ranks: RankPools) -> None:
    assert on_ranks(work.is_refused_without, 2, "collective") == [True, True]


@pytest.mark.parametrize("transport", ["auto", "collective"])
def test_telemetry_that_differs_is_an_error_on_every_rank(on_ranks: RankPools, transport: str) -> None:
    work.check_differing(on_ranks(work.differing, 3, transport))


def test_the_environment_turns_it_on(on_ranks: RankPools) -> None:
    [told] = on_ranks(counts_as_the_environment_says, 1, env={"TOKENFERRY_TELEMETRY": "1"})
    assert told


def counts_as_the_environment_says(group) -> bool:
    with work.opened(group, "local") as ws:
        return ws.telemetry.is_on


@pytest.mark.parametrize("fails", [False, True], ids=["times-out", "fails"])
def test_the_error_of_a_late_rank_says_who_was_late_before(on_ranks: RankPools, fails: bool) -> None:
    message, reading, num_steps = on_ranks(work.error_of_a_late_rank, 2, "collective", fails)[0]
    assert reading.startswith("rank 1 was last to enter in")
    assert message.endswith(reading)
    assert num_steps >= 3


def test_a_trace_has_the_steps_of_all_ranks_on_one_time_line(on_ranks: RankPools, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    error_ns = on_ranks(work.traced, 2, "collective", str(path))[0]
    work.check_traced(json.loads(path.read_text()), error_ns, "collective")
