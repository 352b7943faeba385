"""Short soaks of interpreted ranks; `python tests/soak.py` runs longer ones."""

import pytest

from soak import Plan, run

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize(
    ("seconds", "ranks"), [(8, 2), pytest.param(60, 3, marks=[pytest.mark.long, pytest.mark.timeout(400)])], ids=["8s", "60s"]
)
def test_every_row_of_random_steps_is_right_and_memory_stays(seconds: float, ranks: int) -> None:
    reports = run(Plan("interpreter", seconds, seed=ranks, ranks=ranks))
    assert all(report.steps >= 20 for report in reports)
