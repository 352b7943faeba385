"""A transport that was accepted and cannot be opened: all ranks reject it with the reason, and `auto` tries the next."""

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokenferry as tf
from patience import PATIENT_S, once
from rank_pool import RankPools
from tokenferry.transports import selection
from tokenferry.transports.base import StepTensors, Transport, TransportSettings
from tokenferry.transports.opening import open_transport

CONFIG = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=torch.float32)
INTERPRETER = {"TRITON_INTERPRET": "1"}


def round_trip(ws: tf.Workspace) -> list[float]:
    layer = ws.dispatcher()
    ws.begin_step(1)
    got = layer.dispatch(torch.full((1, 8), 1.0 + ws.group.rank), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    return got.hidden[: ws.group.size, 0].tolist() + layer.combine(got.hidden)[:, 0].tolist()


def no_space(*_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# --- our own transports -----------------------------------------------------------------------------------------------


def without_memory(group: tf.EPGroup, ranks: tuple[int, ...], transport: str) -> dict[str, Any]:
    """Opens while `ranks` get no memory to share, where `auto` would take p2p, as on GPUs; then resets when there is memory."""
    interpreted, fallocate = selection._interpreted, os.posix_fallocate
    selection._interpreted = lambda name, requested: interpreted(name, name if name == "p2p" else requested)
    if group.rank in ranks:
        os.posix_fallocate = no_space
    try:
        with tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport=transport, timeout_s=20.0) as ws:
            seen = {"transport": ws.transport, "decisions": list(map(str, ws.decisions)), "rows": round_trip(ws)}
            os.posix_fallocate = fallocate
            ws.reset()
            return {**seen, "after": ws.transport, "rows after": round_trip(ws)}
    except tf.TransportUnavailableError as error:
        return {"decisions": list(map(str, error.decisions)), "said": str(error)}
    finally:
        selection._interpreted, os.posix_fallocate = interpreted, fallocate


@pytest.mark.interpreter
@pytest.mark.parametrize("ranks", [(0, 1), (1,)], ids=["on-every-rank", "on-one-rank"])
def test_auto_falls_back_when_an_accepted_transport_does_not_open(on_ranks: RankPools, ranks: tuple[int, ...]) -> None:
    for rank, seen in enumerate(on_ranks(without_memory, 2, ranks, "auto", env=INTERPRETER)):
        assert seen["transport"] == "collective"
        [p2p] = [text for text in seen["decisions"] if text.startswith("p2p")]
        assert p2p.startswith("p2p: rejected, could not be opened on rank ")
        assert f"rank {ranks[0]} failed to allocate shared memory: OSError: [Errno 28] No space left on device" in p2p
        assert seen["rows"] == seen["rows after"] == [1.0, 2.0, 2.0 * (1 + rank)]
        assert seen["after"] == "p2p", "a reset decides anew"


@pytest.mark.interpreter
def test_a_transport_asked_for_by_name_that_does_not_open_is_unavailable_with_its_reason(on_ranks: RankPools) -> None:
    for seen in on_ranks(without_memory, 2, (1,), "p2p", env=INTERPRETER):
        assert len(seen["decisions"]) == 4
        assert any(text.startswith("p2p: rejected, could not be opened on rank ") for text in seen["decisions"])
        assert seen["said"].startswith("transport 'p2p' cannot serve this group:")


def no_socket(group: tf.EPGroup) -> list[str]:
    with pytest.raises(tf.TransportUnavailableError, match="no transport can serve this group") as caught:
        tf.Workspace(CONFIG, group, max_tokens_per_rank=4, open_timeout_s=PATIENT_S)
    return list(map(str, caught.value.decisions))


@pytest.mark.ranks
def test_where_nothing_opens_the_error_has_a_reason_for_each(on_ranks: RankPools) -> None:
    for decisions in on_ranks(no_socket, 2, env={"GLOO_SOCKET_IFNAME": "nosuchinterface"}):
        assert len(decisions) == 4
        assert all(": rejected, " in text for text in decisions)
        assert "could not be opened on rank" in decisions[-1] and "nosuchinterface" in decisions[-1]


def interpreted_nvls(group: tf.EPGroup) -> list[str]:
    with pytest.raises(tf.TransportUnavailableError) as caught:
        tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport="nvls", open_timeout_s=PATIENT_S)
    return [str(decision) for decision in caught.value.decisions if "nvls" in str(decision)]


@pytest.mark.interpreter
def test_nvls_without_multicast_is_rejected(on_ranks: RankPools) -> None:
    for [nvls] in on_ranks(interpreted_nvls, 2, env=INTERPRETER):
        assert nvls.startswith("nvls: rejected, could not be opened on rank ") and "no multicast address" in nvls


# --- each kind of failure ---------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """As Ctrl-C is."""


class Failing:
    """Opens `collective`; on `rank` `fail` comes first."""

    name = "failing"

    def __init__(self, rank: int, fail: Callable[[], None]) -> None:
        self.rank, self.fail = rank, fail

    def open(self, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
        if settings.group.rank == self.rank:
            self.fail()
        return open_transport("collective", settings, step_tensors)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("no\nmemory")


def wrong_settings() -> None:
    raise tf.ConfigError("max_ctas is odd")


def peer_is_dead() -> None:
    raise tf.PeerFailedError(2, "it was killed", 0, "open")


def interrupted() -> None:
    raise Interrupted("amid opening")


def too_long() -> None:
    """Until the other rank has waited for a connection and then for an answer, and is out. `failing` sees to that."""


def failing(group: tf.EPGroup, fail: Callable[[], None]) -> tuple[str, list[str]]:
    """What opening raises, and what it decided."""
    open_timeout_s = 2.0 if fail is too_long else PATIENT_S
    fail = (lambda: once(lambda: group.channel.peek("out") is not None)) if fail is too_long else fail
    try:
        tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport=Failing(1, fail), open_timeout_s=open_timeout_s).close()
    except (tf.TokenferryError, Interrupted) as error:
        told = [str(decision) for decision in getattr(error, "decisions", ())]
        return f"{type(error).__name__}: {error}", told
    finally:
        group.channel.claim("out", group.rank)
        group.channel.barrier("all are out", PATIENT_S)
    return "nothing", []


UNAVAILABLE = "TransportUnavailableError: transport 'failing' cannot serve"
WRONG_SETTINGS = "ConfigError: transport 'failing' cannot be opened with these settings (rank 1): ConfigError: max_ctas is odd"
BEFORE_OPEN = "PeerFailedError: rank {} failed before its workspace was open: "


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("fail", "on_the_other", "on_that_rank"),
    [
        pytest.param(out_of_memory, UNAVAILABLE, UNAVAILABLE, id="out-of-memory"),
        pytest.param(wrong_settings, WRONG_SETTINGS, WRONG_SETTINGS, id="wrong-settings"),
        pytest.param(
            peer_is_dead,
            BEFORE_OPEN.format(1) + "while opening transport 'failing': PeerFailedError: rank 2",
            BEFORE_OPEN.format(2) + "it was killed",
            id="a-third-rank-is-dead",
        ),
        pytest.param(interrupted, BEFORE_OPEN.format(1) + "Interrupted: amid opening", "Interrupted: amid", id="interrupted"),
        # gloo has given up to connect when that rank comes at last, and the other one is gone.
        pytest.param(too_long, "PeerTimeoutError: rank 1 is late: open", UNAVAILABLE, id="late"),
    ],
)
def test_each_kind_of_failure_comes_as_its_own_error_on_every_rank(
    on_ranks: RankPools, fail: Callable[[], None], on_the_other: str, on_that_rank: str
) -> None:
    (other, decisions), (culprit, _) = on_ranks(failing, 2, fail)
    assert other.startswith(on_the_other)
    assert culprit.startswith(on_that_rank)
    if fail is out_of_memory:
        assert decisions == ["failing: rejected, could not be opened on rank 1: OutOfMemoryError: no memory"]
