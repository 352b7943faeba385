"""A busy rank and its peers on interpreted symmetric transports."""

import pytest

from busy_work import OF_THREE, SCENARIOS, Scenario
from rank_pool import RankPools

from .test_symmetric import INTERPRETER

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("scenario", (*OF_THREE, *SCENARIOS), ids=lambda each: each.name)
def test_a_busy_rank_is_waited_for_as_long_as_it_gives_signs_of_life(on_ranks: RankPools, scenario: Scenario) -> None:
    scenario.check(on_ranks(scenario.worker, scenario.world_size, "p2p", *scenario.args, env=INTERPRETER))
