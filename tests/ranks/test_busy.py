"""A busy rank and its peers over gloo."""

import pytest

from busy_work import ON_CPUS, TIMEOUT_S, Scenario, goes_on, is_gone_once_dropped, waits_after_a_reset, wrong_use
from rank_pool import RankPools

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("scenario", ON_CPUS)
def test_a_busy_rank_is_waited_for_as_long_as_it_gives_signs_of_life(on_ranks: RankPools, scenario: Scenario) -> None:
    scenario.check(on_ranks(scenario.worker, scenario.world_size, "collective", *scenario.args))


def test_a_reset_with_a_short_limit_of_its_own_does_not_shorten_the_patience_with_busy_ranks(on_ranks: RankPools) -> None:
    goes_on(on_ranks(waits_after_a_reset, 2, "collective", 5 * TIMEOUT_S))


def test_a_workspace_that_was_busy_goes_as_soon_as_it_is_dropped(on_ranks: RankPools) -> None:
    """A cycle with the thread's object kept its connections, and on GPUs its memory, until Python looked for cycles."""
    assert on_ranks(is_gone_once_dropped, 2, "collective") == [True, True]


def test_wrong_use_is_refused_and_changes_nothing(on_ranks: RankPools) -> None:
    on_ranks(wrong_use, 1)
