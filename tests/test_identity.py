"""Who is who: virtual ranks, machines, and groups of one, whatever names and numbers collide."""

import gc
import os
import platform
import socket
import tempfile
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from tokenferry import topology
from tokenferry.groups import ThreadRanks
from tokenferry.testing import run_ranks
from tokenferry.testing.ranks import run_virtual, virtual_ranks
from tokenferry.transports.symmetric.buffer import SymmetricBuffer

INTERPRETER = {"TRITON_INTERPRET": "1"}


# --- virtual ranks ---------------------------------------------------------------------------------------------------------


def test_virtual_ranks_hand_over_objects_themselves() -> None:
    def shared(group: tf.EPGroup) -> list[int]:
        mine = torch.full((1,), float(group.rank))
        first = group.share("one", mine, 10.0)
        second = group.subset([0, 1, 2]).share("one", mine, 10.0)
        assert [float(each) for each in first] == [float(each) for each in second] == [0.0, 1.0, 2.0]
        assert first[group.rank] is mine
        return [id(each) for each in first]

    first, *others = run_virtual(shared, 3)
    assert others == [first] * 2


def test_what_was_handed_over_is_not_kept() -> None:
    def shared(group: tf.EPGroup) -> weakref.ref:
        mine = torch.empty(1)
        group.share("one", mine, 10.0)
        return weakref.ref(mine)

    alive = run_virtual(shared, 2)
    gc.collect()
    assert [each() for each in alive] == [None, None]


def test_a_virtual_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(tf.PeerTimeoutError) as caught:
        ThreadRanks().share("one", 0, 2, None, 0.05)
    assert caught.value.rank == 1


def test_ranks_that_are_processes_share_no_objects() -> None:
    with pytest.raises(tf.StateError, match="the ranks of this group are processes"):
        tf.EPGroup.alone("cpu").share("one", None, 1.0)


def test_groups_of_processes_are_not_virtual() -> None:
    assert tf.EPGroup.from_store(dist.HashStore(), 0, 2, "cpu").threads is None
    assert virtual_ranks(2)[0].threads is not None


@pytest.mark.ranks
def test_processes_with_one_host_name_process_number_and_device_are_two() -> None:
    """Containers on the host's network: each is process 1 on its cuda:0. They passed for virtual ranks, and a number
    that came from the peer for an object's address."""
    for said in run_ranks(collide, 2):
        assert "cuda" in said.lower(), said


def collide(group: tf.EPGroup) -> str:
    def on_cpu(function):
        return lambda *arguments, device=None, **named: function(*arguments, **named)

    names = mock.patch.object(os, "getpid", lambda: 1), mock.patch.object(socket, "gethostname", lambda: "host")
    tensors = mock.patch.object(torch, "zeros", on_cpu(torch.zeros)), mock.patch.object(torch.cuda, "current_stream", mock.Mock())
    group.device = torch.device("cuda", 0)  # what it asks of it comes from the CPU; CUDA's own path cannot work here
    with names[0], names[1], tensors[0], tensors[1]:
        try:
            return f"opened, virtual: {SymmetricBuffer(group, 4096, 'a name', 15.0).is_virtual}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"


# --- machines ----------------------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_containers_with_host_names_of_their_own_are_one_machine() -> None:
    assert run_ranks(round_trip_under_own_name, 2, env=INTERPRETER) == [[1.0, 2.0]] * 2


def round_trip_under_own_name(group: tf.EPGroup) -> list[float]:
    socket.gethostname = platform.node = lambda: f"container-{group.rank}"
    config = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=torch.float32)
    with tf.Workspace(config, group, max_tokens_per_rank=4, transport="p2p", timeout_s=20.0) as ws:
        layer = ws.dispatcher()
        ws.begin_step(1)
        rows = torch.full((1, 8), 1.0 + group.rank)
        got = layer.dispatch(rows, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
        seen = got.hidden[:2, 0].tolist()
        layer.combine(torch.zeros_like(got.hidden), got)
        return seen


@pytest.mark.interpreter
def test_ranks_of_two_machines_have_no_symmetric_memory() -> None:
    for said in run_ranks(open_elsewhere, 2, env=INTERPRETER):
        assert "the ranks live on 2 machines" in said


def open_elsewhere(group: tf.EPGroup) -> str:
    topology.machine_id = lambda device_type: f"boot-{group.rank}"
    config = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1)
    with pytest.raises(tf.TransportUnavailableError) as caught:
        tf.Workspace(config, group, max_tokens_per_rank=4, transport="p2p")
    return str(caught.value)


def test_a_machine_without_a_boot_number_goes_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(topology, "BOOT_ID", tmp_path / "absent")
    monkeypatch.setattr(platform, "node", lambda: "a-name")
    assert topology.machine_id("cpu") == "a-name"


def test_containers_that_do_not_share_a_temporary_folder_are_apart_on_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """PyTorch passes memory between GPUs' processes through a socket there."""
    cpu, cuda = topology.machine_id("cpu"), topology.machine_id("cuda")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert topology.machine_id("cpu") == cpu
    assert topology.machine_id("cuda") != cuda


@pytest.mark.ranks
def test_rank_processes_inherit_no_place_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_ranks(size_of_a_group_of_one, 2) == [1, 1]


def size_of_a_group_of_one(group: tf.EPGroup) -> int:
    del group
    return tf.EPGroup(device="cpu").size


# --- a group of one ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["2", "72"])
def test_none_among_many_processes_is_refused_and_says_what_to_call(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(tf.UsageError, match=rf"WORLD_SIZE is {size}: call torch\.distributed\.init_process_group\(\) first"):
        tf.EPGroup(dist.group.WORLD)
    assert tf.EPGroup.alone("cpu").size == 1


@pytest.mark.parametrize("size", [None, "1", "tcp://10.0.0.1:80"], ids=["unset", "one", "another-program-s"])
def test_none_elsewhere_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch, size: str | None) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert tf.EPGroup(device="cpu").size == 1
