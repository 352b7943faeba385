"""The store in which ranks meet, lost: who is named, and what a rank settles on that can ask nobody. In one process."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from tokenferry.channel import RendezvousStore, host_of
from tokenferry.transports.base import AbortRecord
from tokenferry.transports.settling import _without_store

SIZE = 3
LOST = tf.PeerFailedError(0, "the store is lost", 0, "open")


def group_whose_store_is_lost(rank: int) -> tf.EPGroup:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = tf.EPGroup.from_store(dist.TCPStore("127.0.0.1", server.port, is_master=False), rank, SIZE)
    del server  # its thread ends, as with its process
    return group


@pytest.mark.parametrize(
    "call",
    [
        lambda group: group.channel.exchange("name", 1, 5.0),
        lambda group: group.channel.barrier("name", 5.0),
        lambda group: group.channel.claim("name", 1),
        lambda group: group.channel.peek("name"),
        lambda group: group.channel.give_up("name", "why"),
        lambda group: group.subset([1, 2]),
        lambda group: tf.Workspace(tf.MoEConfig(hidden_size=4, num_experts=4, topk=1), group, max_tokens_per_rank=2),
    ],
    ids=["exchange", "barrier", "claim", "peek", "give-up", "subset", "open"],
)
def test_a_lost_store_is_its_hosts_failure(call: Callable[[tf.EPGroup], object]) -> None:
    with pytest.raises(
        tf.PeerFailedError, match=r"^rank 0 .*the rendezvous store, which rank 0 hosts, cannot be reached"
    ) as caught:
        call(group_whose_store_is_lost(1))
    assert caught.value.rank == 0


def test_an_exchange_says_during_what_the_store_was_lost() -> None:
    with pytest.raises(tf.PeerFailedError) as caught:
        group_whose_store_is_lost(1).channel.exchange("name", 1, 5.0, phase="reset", step=7)
    assert (caught.value.phase, caught.value.step) == ("reset", 7)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_rank_that_loses_the_store_does_not_host_it() -> None:
    """Rank 0 is the host by convention alone."""
    with pytest.raises(tf.PeerFailedError, match=r"^a process of unknown rank .*whose host this rank does not know") as caught:
        group_whose_store_is_lost(0).channel.peek("name")
    assert caught.value.rank == -1


def test_a_workspace_of_one_rank_works_on_and_cannot_be_reset() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = tf.EPGroup.from_store(dist.TCPStore("127.0.0.1", server.port, is_master=False), 0, 1)
    config = tf.MoEConfig(hidden_size=4, num_experts=4, topk=1, dtype=torch.float32)
    with tf.Workspace(config, group, max_tokens_per_rank=2, transport="local") as ws:
        del server
        dispatcher, rows = ws.dispatcher(), torch.ones(2, 4)
        ws.begin_step(2)
        got = dispatcher.dispatch(rows, torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))
        assert torch.equal(dispatcher.combine(got.hidden, got), rows)
        ws.check()
        with pytest.raises(tf.PeerFailedError, match="rendezvous store") as caught:
            ws.reset()
        assert (caught.value.rank, caught.value.phase) == (-1, "reset")
        ws.reset(group=tf.EPGroup.alone("cpu"))
        ws.begin_step(2)


@pytest.mark.parametrize(("uses_agent_store", "host"), [("False", 0), ("True", None)])
def test_torchruns_agent_is_no_rank(monkeypatch: pytest.MonkeyPatch, uses_agent_store: str, host: int | None) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", uses_agent_store)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert host_of(dist.PrefixStore("outer", dist.PrefixStore("inner", store))) == host


def test_a_store_within_the_process_has_no_host() -> None:
    assert host_of(dist.HashStore()) is None


@pytest.mark.parametrize(("ranks", "host"), [([0, 2], 0), ([1, 2], None)])
def test_a_subset_numbers_the_host_as_its_own_ranks(ranks: list[int], host: int | None) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = tf.EPGroup.from_store(server, 2, SIZE)
    assert group.subset(ranks).rendezvous.host == host
    assert isinstance(group.rendezvous, RendezvousStore)


@pytest.mark.parametrize(
    ("record", "rank", "reason"),
    [
        (AbortRecord(0, 1, "not-entered", 4, -1, 2.0), 0, "the store is lost"),
        (AbortRecord(0, 1, "not-entered", 4, -1, 2.0, "gone"), 0, "gone; the store is lost"),
        (AbortRecord(2, 1, "not-entered", 4, -1, 2.0, "gone"), 0, "rank 2 was missed (gone); the store is lost"),
        (AbortRecord(2, 1, "not-entered", 4, -1, 2.0), 0, "rank 2 was missed (for 2.0 s); the store is lost"),
        (AbortRecord(-1, 1, "not-entered", 4, -1, 2.0), 0, "the store is lost"),
        (AbortRecord(1, 1, "not-entered", 4, -1, 2.0, "own"), 1, "own; the store is lost"),
        (AbortRecord(2, 1, "counts-disagree", 4, -1, 0.0, "off"), 2, "off; the store is lost"),
    ],
    ids=["host-late", "host-gone", "peer-gone", "peer-late", "nobody-known", "this-rank-gave-up", "peer-off-by-a-step"],
)
def test_what_a_rank_settles_on_without_the_store(record: AbortRecord, rank: int, reason: str) -> None:
    settled = _without_store(record, LOST, 1)
    assert (settled.rank, settled.reason, settled.phase, settled.step) == (rank, reason, record.phase, record.step)
