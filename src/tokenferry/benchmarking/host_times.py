"""What `begin_step` takes by itself, and how long the host is busy in each call of an eager step."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any, Final

import torch

from tokenferry.benchmarking.round_trip_data import NUM_EXPERTS, RankInputs, RoundTripPoint, inputs_of
from tokenferry.benchmarking.timing import GroupTimer
from tokenferry.config import MoEConfig
from tokenferry.kernels.control_block import COUNTERS_OFFSET, ROUND_OFFSET
from tokenferry.workspace import Workspace

EAGER_STEPS: Final = 200


def begin_step_and_host_times(timer: GroupTimer, point: RoundTripPoint, chain: int) -> dict[str, float]:
    """Times of a symmetric transport on GPUs, collective over the timer's group, all ranks with the same number of tokens.

    Returns:
        `opened_s`: seconds that opening took. `begin_step_us`, `dispatch_us`: microseconds on the device, each call alone.
        `host_*_us`: microseconds of the host in a call; `host_torch_add_us` is a small operation of torch, to compare with.
    """
    config = MoEConfig(hidden_size=point.hidden_size, num_experts=NUM_EXPERTS, topk=point.topk)
    [count] = set(point.tokens)
    start = time.monotonic()
    with Workspace(config, timer.group, max_tokens_per_rank=point.capacity, transport=point.transport) as ws:
        opened_s = time.monotonic() - start
        inputs = inputs_of(point, timer.group.rank, 1, timer.group.device)
        ws.begin_step(count)
        host = _host_times(ws, inputs, count)

        def steps() -> None:
            for _ in range(chain):
                ws.begin_step(count)

        begin_step_us, _ = timer.time_graph(steps, chain)
        dispatch_us = _dispatch_alone(timer, ws, inputs, count, chain)
        timer.synchronize()
        ws.check()
        timer.meet()
    slowest = {f"host_{name}_us": round(timer.slowest(value_us), 1) for name, value_us in host.items()}
    times = {"opened_s": opened_s, "begin_step_us": begin_step_us, "dispatch_us": dispatch_us}
    return {name: round(value, 2) for name, value in times.items()} | slowest


def _host_times(ws: Workspace, inputs: RankInputs, count: int) -> dict[str, float]:
    """Medians over eager steps, in microseconds."""
    dispatcher, device = ws.dispatcher(), inputs.hidden.device
    shape = (count * ws.group.size, inputs.hidden.shape[1])
    partial = torch.zeros(shape, dtype=torch.bfloat16, device=device)  # the gathered rows themselves would be copied first
    other = torch.zeros(64, dtype=torch.float32, device=device)
    spans: dict[str, list[float]] = {"begin_step": [], "dispatch": [], "combine": [], "torch_add": []}
    for _ in range(EAGER_STEPS):
        marks = [time.perf_counter()]
        ws.begin_step(count)
        marks.append(time.perf_counter())
        got = dispatcher.dispatch(inputs.hidden, inputs.topk_idx, inputs.topk_weights)
        marks.append(time.perf_counter())
        dispatcher.combine(partial, got)
        marks.append(time.perf_counter())
        other.add_(1)
        marks.append(time.perf_counter())
        for name, begin, end in zip(spans, marks, marks[1:], strict=False):
            spans[name].append(end - begin)
    torch.cuda.synchronize(device)
    return {name: statistics.median(span) * 1e6 for name, span in spans.items()}


def _dispatch_alone(timer: GroupTimer, ws: Workspace, inputs: RankInputs, count: int, chain: int) -> float:
    """Microseconds of a dispatch without its combine.

    Only a combine moves on to the other parity's slots, so every second dispatch reads its round from a copy of the counters
    that is one ahead. This is safe where every rank brings rows.
    """
    ws.begin_step(count)
    transport: Any = ws.active_transport
    counters = transport.memory.buffer[COUNTERS_OFFSET : COUNTERS_OFFSET + 64].clone().view(torch.int64)
    counters[ROUND_OFFSET // 8] += 1 << 32
    second = transport.viewed_as(dataclasses.replace(transport.view, counters_ptr=counters.data_ptr()))

    def dispatches() -> None:
        for number in range(chain):
            sender = second if number % 2 else transport
            sender.dispatch(0, inputs.hidden, inputs.topk_idx, inputs.topk_weights)

    return timer.time_graph(dispatches, chain)[0]
