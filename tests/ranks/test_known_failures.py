"""`check(wait=False)` on ranks: what lies in this host's memory, and what does not yet; over gloo and interpreted kernels."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenferry as tf
from patience import PATIENT_S, SLACK_S
from rank_pool import RankPools
from tokenferry import supervisor
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.ranks

CONFIG = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=torch.float32)
INTERPRETED = {"TRITON_INTERPRET": "1"}
TRANSPORTS = ["collective", "p2p"]
TIMEOUT_S = 1.0


def opened(group: tf.EPGroup, transport: str, timeout_s: float) -> tf.Workspace:
    return tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport=transport, timeout_s=timeout_s, open_timeout_s=PATIENT_S)


def one_step(ws: tf.Workspace) -> None:
    layer = ws.dispatcher_at(0)
    ws.begin_step(2)
    got = layer.dispatch(torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))
    layer.combine(got.hidden, got)


def said_by(error: Exception) -> tuple[str, int]:
    return type(error).__name__, getattr(error, "rank", -2)


def nothing_wrong(group: tf.EPGroup, transport: str) -> int:
    with opened(group, transport, timeout_s=PATIENT_S) as ws:
        for _ in range(3):
            with ws.engine_step():
                one_step(ws)
            ws.check(wait=False)
        return ws.last_step


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_where_nothing_is_wrong_nothing_is_raised(on_ranks: RankPools, transport: str) -> None:
    assert on_ranks(nothing_wrong, 2, transport, env=INTERPRETED) == [3, 3]


def late(group: tf.EPGroup, transport: str) -> list[Any]:
    """Rank 1 comes late to the second step, which is over on rank 0 then, whoever swallowed its exception."""
    with opened(group, transport, PATIENT_S) as ws:
        one_step(ws)
        ws.set_timeout(TIMEOUT_S)
        if group.rank == 1:
            group.channel.barrier("rank 0 has given up", PATIENT_S)
        with contextlib.suppress(tf.PeerError):
            one_step(ws)
        if group.rank == 0:
            group.channel.barrier("rank 0 has given up", PATIENT_S)
        ws.set_timeout(PATIENT_S)
        ws.lifecycle.error = None  # as in a replayed graph: no call of ours has raised anything
        start_s = time.monotonic()
        with pytest.raises(tf.PeerError) as caught:
            ws.check(wait=False)
        return [*said_by(caught.value), time.monotonic() - start_s < SLACK_S]


def test_a_late_rank_is_known_after_the_synchronisation(on_ranks: RankPools) -> None:
    said = on_ranks(late, 2, "p2p", env=INTERPRETED)
    assert said == [["PeerTimeoutError", 1, True], ["PeerFailedError", 1, True]]


def gives_up(group: tf.EPGroup, transport: str) -> Any:
    """Rank 1 gives up between steps; rank 0 looks for it without a call that meets rank 1."""
    with opened(group, transport, timeout_s=PATIENT_S) as ws:
        one_step(ws)
        group.channel.barrier(f"{transport} stepped", 20)
        if group.rank == 1:
            ws.fail("out of luck")
            group.channel.barrier(f"{transport} told", 20)
            return None
        group.channel.barrier(f"{transport} told", 20)
        seen = []
        for wait in (False, True):
            try:
                ws.check(wait=wait)
                seen.append(None)
            except tf.PeerFailedError as error:
                seen.append((error.rank, "out of luck" in str(error)))
        return seen


def test_symmetric_memory_knows_a_peers_failure_without_a_call(on_ranks: RankPools) -> None:
    assert on_ranks(gives_up, 2, "p2p", env=INTERPRETED)[0] == [(1, True), (1, True)]


def test_gloo_knows_it_from_the_store_alone_which_is_not_asked(on_ranks: RankPools) -> None:
    assert on_ranks(gives_up, 2, "collective", env=INTERPRETED)[0] == [None, (1, True)]


def engine_whose_peer_is_gone(group: tf.EPGroup, transport: str, path: str) -> None:
    with opened(group, transport, PATIENT_S) as ws:
        one_step(ws)
        ws.set_timeout(TIMEOUT_S)
        if group.rank == 1:
            os._exit(0)
        with pytest.raises(tf.PeerError) as caught, ws.engine_step():
            try:
                one_step(ws)
            except tf.PeerError:
                raise ValueError("what an engine makes of it") from None
        Path(path).write_text(f"{caught.value.rank} {type(caught.value.__cause__).__name__}")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_peer_that_is_gone_ends_the_engines_step_whatever_that_raises(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "GRACE_S", PATIENT_S)  # for rank 0, after the end of rank 1
    with pytest.raises(tf.RankFailedError, match="rank 1"):
        run_ranks(engine_whose_peer_is_gone, 2, transport, str(tmp_path / "said"), env=INTERPRETED)
    assert (tmp_path / "said").read_text() == "1 ValueError"
