"""Short soaks on GPUs; `python tests/soak.py --where gpu` runs longer ones."""

import pytest

from cases import ON_GPUS
from soak import Plan, run
from tokenferry import env


@pytest.mark.timeout(240)
@ON_GPUS
def test_every_row_of_random_steps_is_right_eager_and_in_graphs(world_size: int) -> None:
    reports = run(Plan("gpu", 10, seed=world_size, ranks=world_size))
    assert all(report.graph >= 2_000 and report.eager > 0 for report in reports)


@pytest.mark.timeout(240)
@pytest.mark.gpu(count=2)
@pytest.mark.parametrize(("dispatch_format", "combine"), [("fp8_block128", "fp8"), ("bytes", "same"), ("same", "fp8")])
def test_every_row_of_other_formats_is_right_eager_and_in_graphs(dispatch_format: str, combine: str) -> None:
    reports = run(Plan("gpu", 10, seed=2, ranks=2, dispatch_format=dispatch_format, combine=combine))
    assert all(report.graph >= 1_000 and report.eager > 0 for report in reports)


@pytest.mark.timeout(240)
@pytest.mark.gpu(count=1)
def test_every_row_of_random_steps_is_right_on_virtual_ranks() -> None:
    reports = run(Plan("virtual", 8, seed=3, ranks=3))
    assert all(report.steps >= 20 for report in reports)


@pytest.mark.long
@pytest.mark.skipif(env.read(env.DebugSettings).enabled, reason="debug mode's checks take longer than a round trip")
@pytest.mark.timeout(640)
@pytest.mark.gpu(count=2)
def test_eight_minutes_on_two_gpus_are_a_million_right_round_trips() -> None:
    reports = run(Plan("gpu", 480, seed=1, ranks=2))
    assert all(report.eager + report.graph >= 1_000_000 for report in reports)
