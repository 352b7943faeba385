"""Faults on two GPUs: the scenarios of the other ranks' tests, over symmetric memory and over NCCL."""

from pathlib import Path

import pytest
import torch

import tokenferry as tf
from fault_runs import Run, assert_named_in_time, assert_nothing_left, run_faults
from faults import CAPACITY, CONFIG, CULPRIT, DEADLY, FAULTS, KILLED_IN_LAYER, Fault, Setting, one_step
from sockets import Socket, of_own_process
from supervisors import ENDS, assert_ended, end_while_ranks_work
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.gpu(count=2)

TRANSPORTS = ("p2p", "collective")
RUN_S = 60
NCCL_FAULTS = tuple(fault for fault in FAULTS if fault.name in ("stopped", "late-in-layer", "raises", "one-layer-more"))
"""Over NCCL each reset makes a communicator, which takes a second or two: the faults that differ for it."""
FLOAT8_FAULTS = tuple(fault for fault in FAULTS if fault.name in ("late", "stopped", "late-in-layer", "raises"))


def suffer(transport: str, faults: tuple[Fault, ...], tmp_path_factory: pytest.TempPathFactory, *, float8: bool = False) -> Run:
    setting = Setting(transport, "nccl", timeout_s=1.5, right_steps=100, float8=float8)
    return run_faults(setting, 2, [fault.name for fault in faults], tmp_path_factory.mktemp("faults"), RUN_S)


@pytest.fixture(scope="module")
def on_p2p(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return suffer("p2p", FAULTS, tmp_path_factory)


@pytest.fixture(scope="module")
def on_nccl(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return suffer("collective", NCCL_FAULTS, tmp_path_factory)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_symmetric_every_rank_blames_the_culprit_in_time_and_goes_on(on_p2p: Run, fault: Fault) -> None:
    assert_named_in_time(on_p2p, fault)


def test_symmetric_neither_processes_nor_shared_memory_are_left(on_p2p: Run) -> None:
    assert_nothing_left(on_p2p)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("fault", NCCL_FAULTS, ids=lambda fault: fault.name)
def test_nccl_every_rank_blames_the_culprit_in_time_and_goes_on(on_nccl: Run, fault: Fault) -> None:
    assert_named_in_time(on_nccl, fault)


def test_nccl_neither_processes_nor_shared_memory_are_left(on_nccl: Run) -> None:
    assert_nothing_left(on_nccl)


@pytest.fixture(scope="module")
def in_float8(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return suffer("p2p", FLOAT8_FAULTS, tmp_path_factory, float8=True)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("fault", FLOAT8_FAULTS, ids=lambda fault: fault.name)
def test_float8_every_rank_blames_the_culprit_in_time_and_goes_on(in_float8: Run, fault: Fault) -> None:
    assert_named_in_time(in_float8, fault)


@pytest.mark.timeout(100)
def test_float8_a_rank_killed_before_its_terms_is_named_in_time(tmp_path_factory: pytest.TempPathFactory) -> None:
    killed = suffer("p2p", (KILLED_IN_LAYER,), tmp_path_factory, float8=True)
    assert_named_in_time(killed, KILLED_IN_LAYER)
    assert_nothing_left(killed)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("fault", DEADLY, ids=lambda fault: fault.name)
def test_a_killed_rank_is_named_in_time_and_the_other_goes_on(
    fault: Fault, transport: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    killed = suffer(transport, (fault,), tmp_path_factory)
    assert_named_in_time(killed, fault)
    assert "-9" in killed.failure
    assert_nothing_left(killed)


def no_room(group: tf.EPGroup) -> str:
    config = tf.MoEConfig(hidden_size=4096, num_experts=8, topk=2)
    hog = None
    if group.rank == CULPRIT:
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(free - 2**28, dtype=torch.uint8, device=group.device)
    with pytest.raises(tf.TransportUnavailableError) as caught:
        tf.Workspace(config, group, max_tokens_per_rank=16384, transport="p2p", open_timeout_s=30)
    del hog
    torch.cuda.empty_cache()
    with tf.Workspace(config, group, max_tokens_per_rank=8, transport="p2p", open_timeout_s=60) as ws:
        return f"{caught.value} | {ws.transport}"


def test_out_of_memory_at_opening_is_named_on_all_ranks_and_a_smaller_workspace_opens() -> None:
    for said in run_ranks(no_room, 2, backend="nccl", timeout_s=RUN_S):
        assert "rank 1" in said
        assert said.endswith("| p2p")


@pytest.mark.timeout(150)
@pytest.mark.parametrize("how", ENDS)
def test_symmetric_no_descendant_and_no_memory_outlive_a_run_that_ends_amid_steps(how: str, tmp_path: Path) -> None:
    setting = Setting("p2p", "nccl", timeout_s=5.0)  # processes with a CUDA context take a second or two to end
    assert_ended(end_while_ranks_work(setting, how, tmp_path), how)


def sockets_at_work(group: tf.EPGroup, transport: str) -> list[Socket]:
    """What this rank has open between two steps."""
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=CAPACITY, transport=transport) as ws:
        dispatchers = [ws.dispatcher()]
        assert one_step(ws, dispatchers, 0)
        found = of_own_process()
        group.channel.barrier("looked", 20)
        return found


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sockets_of_launched_ranks_are_on_the_loopback_and_none_is_a_file(transport: str) -> None:
    """CUDA and NCCL have sockets with abstract names too, which live in the machine's memory and are theirs."""
    for found in run_ranks(sockets_at_work, 2, transport, backend="nccl", timeout_s=RUN_S):
        assert [each for each in found if each.kind not in ("unix", "netlink") and not each.on_loopback] == []
        assert [each for each in found if each.kind == "unix" and each.where.startswith("/")] == []
