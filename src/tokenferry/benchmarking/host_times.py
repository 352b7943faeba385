"""What `begin_step` takes by itself, and how long the host is busy in each call of an eager step."""

from __future__ import annotations

import statistics
import time
from typing import Final

import torch

from tokenferry.benchmarking.round_trip_data import NUM_EXPERTS, RankInputs, RoundTripPoint, inputs_of
from tokenferry.benchmarking.timing import GroupTimer
from tokenferry.config import MoEConfig
from tokenferry.step import StepRequest
from tokenferry.workspace import Workspace

EAGER_STEPS: Final = 200


def begin_step_and_host_times(timer: GroupTimer, point: RoundTripPoint, chain: int) -> dict[str, float]:
    """Times of a symmetric transport on GPUs, collective over the timer's group, all ranks with the same number of tokens.

    Returns:
        `opened_s`: seconds that opening took. `begin_step_us`: microseconds on the device in a chain of these calls alone.
        `begin_step_and_dispatch_us`: in a chain of both, without combines.
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
        both_us = _begin_step_and_dispatch(timer, ws, inputs, count, chain)
        timer.synchronize()
        ws.check()
        timer.meet()
    slowest = {f"host_{name}_us": round(timer.slowest(value_us), 1) for name, value_us in host.items()}
    times = {"opened_s": opened_s, "begin_step_us": begin_step_us, "begin_step_and_dispatch_us": both_us}
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


def _begin_step_and_dispatch(timer: GroupTimer, ws: Workspace, inputs: RankInputs, count: int, chain: int) -> float:
    """Microseconds of a `begin_step` and a dispatch, without the combine that a workspace would insist on.

    The exchange of counts lets slots be used again, as a combine would. It does so for slots alone: in bulk rounds flags hold the
    number of the round, which only a combine moves on.
    """
    transport, request = ws.active_transport.innermost, StepRequest(1, count, count)

    def dispatches() -> None:
        for _ in range(chain):
            transport.begin_step(request, -1)
            transport.dispatch(0, inputs.hidden, inputs.topk_idx, inputs.topk_weights)

    return timer.time_graph(dispatches, chain)[0]
