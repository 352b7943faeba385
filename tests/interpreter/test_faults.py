"""Faults on ranks that run the symmetric kernels in the interpreter: processes over shared memory."""

from pathlib import Path

import pytest

from faults import (
    FAULTS,
    KILLED,
    STOPPED_WHILE_SENDING,
    Fault,
    Run,
    Setting,
    assert_named_in_time,
    assert_nothing_left,
    run_faults,
)
from supervisors import ENDS, assert_ended, end_while_ranks_work

pytestmark = pytest.mark.interpreter

SETTING = Setting("p2p", env=(("TRITON_INTERPRET", "1"),))
ALL = (*FAULTS, STOPPED_WHILE_SENDING)
WORLD_SIZES = [2, pytest.param(3, marks=pytest.mark.long)]


def suffer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, faults: tuple[Fault, ...]) -> Run:
    """Three ranks, in the long tests, make 100 right steps after each fault."""
    folder = tmp_path_factory.mktemp("faults")
    setting = SETTING if request.param == 2 else Setting("p2p", right_steps=100, env=SETTING.env)
    return run_faults(setting, request.param, [fault.name for fault in faults], folder, 900)


@pytest.fixture(scope="module", params=WORLD_SIZES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return suffer(request, tmp_path_factory, ALL)


@pytest.fixture(scope="module", params=WORLD_SIZES)
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return suffer(request, tmp_path_factory, (KILLED,))


@pytest.mark.timeout(950)
@pytest.mark.parametrize("fault", ALL, ids=lambda fault: fault.name)
def test_every_rank_blames_the_culprit_in_time_and_goes_on(run: Run, fault: Fault) -> None:
    assert_named_in_time(run, fault)


def test_neither_processes_nor_shared_memory_are_left(run: Run) -> None:
    assert_nothing_left(run)


@pytest.mark.timeout(950)
def test_a_killed_rank_is_named_in_time_and_the_others_go_on(killed: Run) -> None:
    assert_named_in_time(killed, KILLED)


def test_a_killed_rank_leaves_neither_processes_nor_shared_memory(killed: Run) -> None:
    assert "-9" in killed.failure
    assert_nothing_left(killed)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("how", ENDS)
def test_no_descendant_and_no_memory_outlive_a_run_that_ends_amid_steps(how: str, tmp_path: Path) -> None:
    assert_ended(end_while_ranks_work(SETTING, how, tmp_path), how, SETTING.timeout_s)
