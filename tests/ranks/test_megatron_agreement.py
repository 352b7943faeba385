"""Megatron's own agreement on a batch ends when a peer does not come: over a group, and over stand-ins of its ZMQ sockets."""

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from patience import PATIENT_S, SLACK_S
from tokenferry.integrations.megatron.engine_agreement import drop_words, with_limit
from tokenferry.testing import run_ranks

CONFIG = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=torch.float32)


def over_a_group(group: tf.EPGroup) -> list[Any]:
    """Rank 1 comes to the first agreement, and late to the second."""
    torch.cuda.current_device = lambda: "cpu"
    dist.init_process_group("gloo", store=dist.PrefixStore("megatron", group.store), rank=group.rank, world_size=2)
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport="collective", timeout_s=PATIENT_S) as ws:
        agreed = with_limit(None, dist.group.WORLD, [ws]).sync_all_reduce_max(8 + group.rank, group.rank)
        ws.set_timeout(1.0 if group.rank == 0 else PATIENT_S)
        if group.rank == 1:
            group.channel.barrier("rank 0 has given up", PATIENT_S)
        start_s = time.monotonic()
        with pytest.raises(tf.PeerError) as caught:
            with_limit(None, dist.group.WORLD, [ws]).sync_all_reduce_max(8, 0)
            ws.check()
        in_time = time.monotonic() - start_s < 1.0 + SLACK_S
        if group.rank == 0:
            group.channel.barrier("rank 0 has given up", PATIENT_S)
        with pytest.raises(tf.PeerError):
            ws.check(wait=False)
        return [agreed, type(caught.value).__name__, caught.value.rank, "Megatron's own agreement" in str(caught.value), in_time]


@pytest.mark.ranks
def test_over_a_group() -> None:
    said = run_ranks(over_a_group, 2)
    assert said[0] == [(9, 1), "PeerTimeoutError", 1, True, True]
    assert said[1][0] == (9, 1)
    assert said[1][1:3] == ["PeerFailedError", 0]
    assert said[1][4]


class Again(Exception):
    """zmq's, of a receive that took too long."""


class Socket:
    """Holds messages; with none it waits as long as it may, and for ever by default."""

    def __init__(self, *messages: int) -> None:
        self.messages, self.rcvtimeo = list(messages), -1

    def recv(self) -> int:
        if self.messages:
            return self.messages.pop(0)
        assert self.rcvtimeo > 0, "it would wait for ever"
        time.sleep(self.rcvtimeo / 1000)
        raise Again

    def poll(self, _milliseconds: int) -> int:
        return len(self.messages)


class Communicator:
    """Megatron's, of two ranks, on the one that leads."""

    is_leader, world_size = True, 2

    def __init__(self, *messages: int) -> None:
        self.gather_sock = Socket(*messages)

    def sync_all_reduce_max(self, value: int) -> int:
        return max(value, self.gather_sock.recv())


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Any:
    zmq = ModuleType("zmq")
    zmq.Again = Again  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zmq", zmq)
    two = next(iter(tf.testing.virtual_ranks(2)))
    return lambda communicator, *workspaces: with_limit(communicator, two, workspaces)


def workspace(timeout_s: float, said: list[str]) -> Any:
    def give_up(error: Exception) -> None:
        said.append(str(error))

    return SimpleNamespace(timeout_s=timeout_s, last_step=3, check=lambda: None, give_up=give_up)


def test_over_zmq_it_is_as_before_where_the_peer_comes(limited: Any) -> None:
    communicator = Communicator(7)
    assert limited(communicator, workspace(2.0, [])).sync_all_reduce_max(5) == 7
    assert communicator.gather_sock.rcvtimeo == -1


def test_over_zmq_it_ends_after_the_shortest_limit_and_breaks_every_workspace(limited: Any) -> None:
    said: list[str] = []
    communicator, start_s = Communicator(), time.monotonic()
    with pytest.raises(tf.PeerTimeoutError, match=r"rank 1 is late.*Megatron's own agreement"):
        limited(communicator, workspace(0.3, said), workspace(PATIENT_S, said)).sync_all_reduce_max(5)
    assert 0.3 <= time.monotonic() - start_s < SLACK_S
    assert len(said) == 2
    assert communicator.gather_sock.rcvtimeo == -1


def test_words_of_an_agreement_that_was_left_are_dropped() -> None:
    communicator = Communicator(1, 2)
    drop_words(communicator)
    assert communicator.gather_sock.messages == []
    drop_words(None)


def test_a_group_of_one_agrees_alone() -> None:
    communicator = Communicator()
    assert with_limit(communicator, None, [workspace(1.0, [])]) is communicator
