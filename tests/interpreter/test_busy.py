"""A busy rank and its peers on interpreted symmetric transports."""

import pytest

from busy_work import OF_THREE, SCENARIOS, Scenario
from tokenferry.testing import run_ranks

from .test_symmetric import INTERPRETER

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("scenario", (*SCENARIOS, *OF_THREE), ids=lambda each: each.name)
def test_a_busy_rank_is_waited_for_as_long_as_it_gives_signs_of_life(scenario: Scenario) -> None:
    scenario.check(run_ranks(scenario.worker, scenario.world_size, "p2p", *scenario.args, env=INTERPRETER))
