"""A busy rank and its peers over gloo."""

import pytest

from busy_work import OF_THREE, SCENARIOS, Scenario, wrong_use
from rank_pool import RankPools
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("scenario", (*SCENARIOS, *OF_THREE), ids=lambda each: each.name)
def test_a_busy_rank_is_waited_for_as_long_as_it_gives_signs_of_life(scenario: Scenario) -> None:
    scenario.check(run_ranks(scenario.worker, scenario.world_size, "collective", *scenario.args))


def test_wrong_use_is_refused_and_changes_nothing(on_ranks: RankPools) -> None:
    on_ranks(wrong_use, 1)
