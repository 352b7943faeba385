"""The engine's captured decode forwards by themselves: replayed back to back, without the host's work between steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from engine_harness.engine import Engine

REPLAYS = 20
REPEATS = 7


def decode_graphs(engine: Engine) -> dict[int, Any]:
    """The graphs of whole decode forwards ("block"), by the rows that they are made for."""
    manager = getattr(engine.model.decoder, "cudagraph_manager", None)
    runners = {} if manager is None else manager.custom_cudagraphs_lookup_table
    return {
        key.token_count: runner.fwd_graph
        for key, runner in runners.items()
        if runner is not None and getattr(key, "prefill_req_count", None) == 0
    }


def microseconds_per_layer(engine: Engine, rows: Sequence[int]) -> dict[int, float]:
    """Time of a decode forward on the GPU, divided by the layers; the median of some repeats, of the ranks the slowest.

    Every row is taken for a real token, as in a full batch. All ranks call it with the same rows; sizes without a graph are left
    out.
    """
    ranks, graphs, times = engine.ranks, decode_graphs(engine), {}
    for count in rows:
        if count not in graphs:
            continue
        engine.context.gpu_view.real_token_count.fill_(count)
        repeats = [_one_repeat(engine, graphs[count]) for _ in range(REPEATS)]
        own_us = 1e3 * statistics.median(repeats) / REPLAYS / engine.size.num_layers
        times[count] = max(ranks.gather(own_us))
    return times


def _one_repeat(engine: Engine, graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of REPLAYS replays, after one that brings the ranks together."""
    dist.barrier(group=engine.ranks.host_group)
    torch.cuda.synchronize()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    before.record()
    for _ in range(REPLAYS):
        graph.replay()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def kernels_of_a_layer(engine: Engine, rows: int, replays: int = 5) -> list[tuple[str, float, float]]:
    """(kernel, microseconds a layer, launches a layer) of a decode forward, the longest first, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    engine.context.gpu_view.real_token_count.fill_(rows)
    graph = decode_graphs(engine)[rows]
    dist.barrier(group=engine.ranks.host_group)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    share = 1 / replays / engine.size.num_layers
    found = [(event.key, event.self_device_time_total * share, event.count * share) for event in profiler.key_averages()]
    return sorted(found, key=lambda row: -row[1])
