"""A busy rank and its peers over gloo."""

import pytest

from busy_work import OF_THREE, SCENARIOS, Scenario, is_gone_once_dropped, wrong_use
from rank_pool import RankPools
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("scenario", (*SCENARIOS, *OF_THREE), ids=lambda each: each.name)
def test_a_busy_rank_is_waited_for_as_long_as_it_gives_signs_of_life(scenario: Scenario) -> None:
    scenario.check(run_ranks(scenario.worker, scenario.world_size, "collective", *scenario.args))


def test_a_workspace_that_was_busy_goes_as_soon_as_it_is_dropped(on_ranks: RankPools) -> None:
    """A cycle with the thread's object kept its connections, and on GPUs its memory, until Python looked for cycles."""
    assert on_ranks(is_gone_once_dropped, 2, "collective") == [True, True]


def test_wrong_use_is_refused_and_changes_nothing(on_ranks: RankPools) -> None:
    on_ranks(wrong_use, 1)
