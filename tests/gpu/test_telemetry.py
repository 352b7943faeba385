"""Telemetry on GPUs: a delayed rank over peer memory and over NCCL, in bulk rounds too, and in replayed graphs."""

import time
from typing import Any

import pytest
import torch

import telemetry_work as work
import tokenferry as tf
from faults import CONFIG
from rank_pool import RankPools
from tokenferry.graph_capture import captured
from tokenferry.testing.ranks import run_virtual

two_gpus = pytest.mark.gpu(count=2)
one_gpu = pytest.mark.gpu(count=1)
VIRTUAL = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}  # as in test_symmetric.py


@two_gpus
@pytest.mark.parametrize("within", [False, True], ids=["entering", "within"])
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_a_delayed_rank_is_found_by_its_waits(on_ranks: RankPools, transport: str, within: bool) -> None:
    work.check_delayed(on_ranks(work.delayed, 2, transport, 1, within, backend="nccl", timeout_s=90), 1, within)


@two_gpus
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_loads_and_rows_are_those_counted_by_hand(on_ranks: RankPools, transport: str) -> None:
    for told in on_ranks(work.counts_by_hand, 2, transport, backend="nccl", timeout_s=90):
        work.check_counts_by_hand(told)


@two_gpus
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_nothing_is_counted_while_it_is_stopped(on_ranks: RankPools, transport: str) -> None:
    assert on_ranks(work.stops_and_starts, 2, transport, backend="nccl", timeout_s=90) == [[1, 1, 2]] * 2


def replays(group: tf.EPGroup, num_tokens: int) -> dict[str, Any]:
    """A captured step of two rounds, replayed five times with rank 1 late by 50 ms; a snapshot is read amid the replays, while
    rank 0's kernel waits."""
    with work.opened(group, "p2p", max_tokens_per_rank=num_tokens, telemetry=True) as ws:
        dispatcher = ws.dispatcher()
        hidden = torch.ones(num_tokens, CONFIG.hidden_size, dtype=CONFIG.dtype, device=ws.device)
        ids = torch.zeros(num_tokens, CONFIG.topk, dtype=torch.int32, device=ws.device)
        weights = torch.ones(num_tokens, CONFIG.topk, device=ws.device)

        def step() -> None:
            ws.begin_step(num_tokens)
            for _ in range(2):
                got = dispatcher.dispatch(hidden, ids, weights)
                dispatcher.combine(got.hidden)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with captured(graph, stream=stream):
            step()
        read_s = 0.0
        before = ws.telemetry.snapshot()
        for _ in range(5):
            group.channel.barrier(group.unique_name("replay"), 30.0)
            if group.rank == 1:
                time.sleep(work.DELAY_S)
            graph.replay()
            if group.rank == 0:
                start_s = time.perf_counter()
                ws.telemetry.snapshot()
                read_s = max(read_s, time.perf_counter() - start_s)
            torch.cuda.synchronize()
        ws.check()
        after = ws.telemetry.snapshot()
        waited_ns = after.waits.counts_ns[1 - group.rank] - before.waits.counts_ns[1 - group.rank]
        return {"waited_ns": waited_ns, "read_s": read_s, **after.to_dict()}


@two_gpus
@pytest.mark.parametrize("num_tokens", [4, 4096], ids=["slots", "bulk"])
def test_replayed_graphs_are_counted_and_read_without_waiting_for_them(on_ranks: RankPools, num_tokens: int) -> None:
    first, second = on_ranks(replays, 2, num_tokens, backend="nccl", timeout_s=90)
    assert 0.6 * 5 * work.DELAY_S < first["waited_ns"] / 1e9 < 3 * 5 * work.DELAY_S
    assert second["waited_ns"] < first["waited_ns"] / 10
    assert first["num_rounds"] == 12
    assert first["loads"][0][0] == 12 * 2 * num_tokens * CONFIG.topk
    assert first["read_s"] < work.DELAY_S


def virtual(group: tf.EPGroup) -> list[work.Seen]:
    return run_virtual(work.delayed, 4, "p2p", 2, False, device=group.device)


@one_gpu
def test_of_four_ranks_the_late_one_is_found(on_ranks: RankPools) -> None:
    """Each lane of a warp waits for a rank of its own: the early ones must not be charged with the late one's wait."""
    seen = on_ranks(virtual, 1, backend="nccl", timeout_s=90, env=VIRTUAL)[0]
    work.check_delayed(seen, 2, within=False)
    for rank in (0, 1, 3):
        others = [wait for source, wait in enumerate(seen[rank][0]["waited_ns"]) if source not in (rank, 2)]
        assert max(others) < seen[rank][0]["waited_ns"][2] / 3
