"""Faults on ranks that run the symmetric kernels in the interpreter: processes over shared memory."""

from dataclasses import replace
from pathlib import Path

import pytest

from fault_runs import Run, assert_named_in_time, assert_nothing_left, run_faults
from faults import DEADLY, FAULTS, KILLED_IN_LAYER, STOPPED_WHILE_SENDING, Fault, Setting
from patience import PATIENT_S
from supervisors import EACH_END, assert_ended, end_while_ranks_work

pytestmark = pytest.mark.interpreter

SETTING = Setting("p2p", right_steps=2, env=(("TRITON_INTERPRET", "1"),))
ALL = (*FAULTS, STOPPED_WHILE_SENDING)
PATIENT = Setting("p2p", right_steps=40, env=SETTING.env)
FLOAT8 = Setting("p2p", timeout_s=4.0, right_steps=4, env=SETTING.env, float8=True)
"""Rows and terms in float8: other kernels, which wait for values and scales. Interpreted they take longer, so that three ranks on
two busy cores found one another late in right steps at 1.5 s."""
GROUPS = [
    pytest.param((2, SETTING), id="EP2"),
    pytest.param((2, PATIENT), id="EP2-40-steps", marks=pytest.mark.long),
    pytest.param((3, PATIENT), id="EP3-40-steps", marks=pytest.mark.long),
    pytest.param((2, FLOAT8), id="EP2-float8", marks=pytest.mark.long),
]


@pytest.fixture(scope="module", params=GROUPS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    world_size, setting = request.param
    return run_faults(setting, world_size, [fault.name for fault in ALL], tmp_path_factory.mktemp("faults"), 900)


@pytest.mark.timeout(950)
@pytest.mark.parametrize("fault", ALL, ids=lambda fault: fault.name)
def test_every_rank_blames_the_culprit_in_time_and_goes_on(run: Run, fault: Fault) -> None:
    assert_named_in_time(run, fault)


def test_neither_processes_nor_shared_memory_are_left(run: Run) -> None:
    assert_nothing_left(run)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("fault", DEADLY, ids=lambda fault: fault.name)
def test_a_killed_rank_is_named_in_time_and_the_others_go_on(fault: Fault, group: tuple[int, Setting], tmp_path: Path) -> None:
    assert_kill_is_named(fault, *group, tmp_path)


@pytest.mark.timeout(200)
def test_a_rank_killed_before_its_float8_terms_is_named_in_time_and_the_other_goes_on(tmp_path: Path) -> None:
    assert_kill_is_named(KILLED_IN_LAYER, 2, FLOAT8, tmp_path)


def assert_kill_is_named(fault: Fault, world_size: int, setting: Setting, folder: Path) -> None:
    run = run_faults(setting, world_size, [fault.name], folder, 180)
    assert "-9" in run.failure
    assert_named_in_time(run, fault)
    assert_nothing_left(run)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("how", EACH_END)
def test_no_descendant_and_no_memory_outlive_a_run_that_ends_amid_steps(how: str, tmp_path: Path) -> None:
    assert_ended(end_while_ranks_work(replace(SETTING, timeout_s=PATIENT_S), how, tmp_path), how)
