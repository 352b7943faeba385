"""A busy rank and its peers on two GPUs: over peer memory and over NCCL, amid a capture, with a limit that a graph obeys."""

import time
from collections.abc import Callable

import pytest
import torch

import tokenferry as tf
from busy_work import (
    BUSY,
    BUSY_TIMEOUTS,
    PATIENT,
    SCENARIOS,
    TIMEOUT_S,
    Scenario,
    Told,
    goes_on,
    open_workspace,
    step_as_told,
    waits_for_a_busy_rank,
)
from faults import CAPACITY, CONFIG, one_step
from patience import SLACK_S
from rank_pool import RankPools
from tokenferry.testing.ranks import run_virtual

two_gpus = pytest.mark.gpu(count=2)
one_gpu = pytest.mark.gpu(count=1)
TRANSPORTS = ("p2p", "collective")
VIRTUAL = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}  # as in test_symmetric.py


@two_gpus
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.name)
def test_a_busy_rank_is_waited_for_as_long_as_it_gives_signs_of_life(
    on_ranks: RankPools, scenario: Scenario, transport: str
) -> None:
    scenario.check(on_ranks(scenario.worker, 2, transport, *scenario.args, backend="nccl", timeout_s=90))


def virtual(group: tf.EPGroup) -> list[Told]:
    return run_virtual(waits_for_a_busy_rank, 2, "p2p", BUSY_TIMEOUTS * TIMEOUT_S, device=group.device)


@one_gpu
def test_a_busy_virtual_rank_is_waited_for(on_ranks: RankPools) -> None:
    goes_on(on_ranks(virtual, 1, backend="nccl", timeout_s=90, env=VIRTUAL)[0])


def captures_while_busy(group: tf.EPGroup, transport: str, mode: str) -> tuple[Told, list[float]]:
    """Rank 1 takes three time-outs for a capture, in the middle of which its signs are launched. What its graph yields."""
    with open_workspace(group, transport) as ws:
        dispatchers = [ws.dispatcher()]
        assert one_step(ws, dispatchers, 0)
        yields: list[float] = []
        if group.rank == BUSY:
            ones, graph = torch.ones(4, device=group.device), torch.cuda.CUDAGraph()
            with ws.busy("capturing a graph"), torch.cuda.graph(graph, capture_error_mode=mode):
                sums = ones * 2
                time.sleep(BUSY_TIMEOUTS * TIMEOUT_S)
                sums += 1
            graph.replay()
            torch.cuda.synchronize(group.device)
            yields = sums.tolist()
        return step_as_told(ws, dispatchers), yields


@two_gpus
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_signs_are_given_amid_a_capture_and_are_no_part_of_the_graph(on_ranks: RankPools, mode: str, transport: str) -> None:
    told = on_ranks(captures_while_busy, 2, transport, mode, backend="nccl", timeout_s=90)
    goes_on([each for each, _ in told])
    assert told[BUSY][1] == [3.0] * 4


def graph_of_a_step(ws: tf.Workspace) -> Callable[[], None]:
    """Replays a step without rows."""
    dispatcher, device = ws.dispatcher(), ws.device
    rows = (
        torch.ones(0, CONFIG.hidden_size, dtype=CONFIG.dtype, device=device),
        torch.zeros(0, CONFIG.topk, dtype=torch.int32, device=device),
        torch.ones(0, CONFIG.topk, device=device),
    )
    partial = torch.zeros(CAPACITY * ws.group.size, CONFIG.hidden_size, dtype=CONFIG.dtype, device=device)

    def forward() -> None:
        ws.begin_step(0)
        dispatcher.combine(partial, dispatcher.dispatch(*rows))

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), ws.solo():
        forward()
    torch.cuda.synchronize(device)
    with ws.capturing(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        forward()

    def replay() -> None:
        with ws.replaying():
            graph.replay()
        torch.cuda.synchronize(device)
        ws.check()

    return replay


def graph_obeys_a_new_limit(group: tf.EPGroup) -> Told:
    """The graph is captured with a limit of a minute; then rank 0 takes one of a second, and rank 1 comes late."""
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=CAPACITY, transport="p2p", timeout_s=60.0) as ws:
        replay = graph_of_a_step(ws)
        replay()
        if group.rank == PATIENT:
            ws.set_timeout(TIMEOUT_S)
        else:
            time.sleep(4 * TIMEOUT_S)
        started_s = time.monotonic()
        with pytest.raises(tf.PeerError) as caught:
            replay()
        waited_s = time.monotonic() - started_s
        del replay
        return Told(type(caught.value).__name__, caught.value.rank, str(caught.value), waited_s)


@two_gpus
def test_a_captured_graph_obeys_a_new_limit(on_ranks: RankPools) -> None:
    told = on_ranks(graph_obeys_a_new_limit, 2, backend="nccl", timeout_s=90)
    assert (told[PATIENT].error, told[PATIENT].rank, told[BUSY].error) == ("PeerTimeoutError", BUSY, "PeerFailedError")
    assert TIMEOUT_S - 0.1 < told[PATIENT].waited_s < TIMEOUT_S + SLACK_S
