"""How a layer is timed: a chain of layers on different rows in one CUDA graph, the round trip alone, and stage by stage."""

from __future__ import annotations

import statistics
from typing import Final

import torch

from tokenferry.benchmarking.layer_model import POSITIONS
from tokenferry.benchmarking.timing import GroupTimer
from tokenferry.graph_capture import captured
from tokenferry.layer import MoELayer
from tokenferry.workspace import Workspace

PASSES: Final = 2
"""How often each position's rows come in a chain."""
STAGES: Final = ("shared", "router", "dispatch", "experts", "combine")


def time_layer(
    timer: GroupTimer, ws: Workspace, layer: MoELayer, rows: list[torch.Tensor], *, promised: bool = True
) -> tuple[float, list[torch.Tensor]]:
    """Microseconds of a layer, and what the layers of the last pass gave. `promised`: steps say that no rank brings more rows, as
    is the case here, and engines know in decode."""
    outputs: list[torch.Tensor] = []

    def chain() -> None:
        ws.begin_step(len(rows[0]), max_tokens=len(rows[0]) if promised else None)
        outputs[:] = [layer(hidden) for _ in range(PASSES) for hidden in rows]

    time_us, _ = timer.time_graph(chain, POSITIONS * PASSES)
    ws.check()
    return time_us, outputs[-POSITIONS:]


def time_dispatch_and_combine(timer: GroupTimer, ws: Workspace, layer: MoELayer, rows: list[torch.Tensor]) -> float:
    """Microseconds of dispatch and combine alone; routing and partial rows stand ready."""
    routing = [layer.router(hidden) for hidden in rows]
    dispatcher = layer.dispatcher

    def chain() -> None:
        ws.begin_step(len(rows[0]))
        for _ in range(PASSES):
            for hidden, (weights, idx) in zip(rows, routing, strict=True):
                got = dispatcher.dispatch(hidden, idx, weights)
                dispatcher.combine(dispatcher.combine_input(), got)

    return timer.time_graph(chain, POSITIONS * PASSES)[0]


def time_stages(timer: GroupTimer, ws: Workspace, layer: MoELayer, rows: list[torch.Tensor]) -> dict[str, float]:
    """Microseconds of each stage, by time stamps within a graph; nothing without CUDA.

    A time stamp costs about a microsecond, and no kernel can begin before the one ahead of it has ended: the sum of the stages
    is more than the layer takes.
    """
    if timer.group.device.type != "cuda":
        return {}
    marks = [[torch.cuda.Event(enable_timing=True, external=True) for _ in range(len(STAGES) + 1)] for _ in rows]

    def chain() -> None:
        ws.begin_step(len(rows[0]), max_tokens=len(rows[0]))
        for hidden, mark in zip(rows, marks, strict=True):
            _marked_layer(layer, hidden, mark)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain()
    timer.meet()
    graph = torch.cuda.CUDAGraph()
    with ws.capturing(), captured(graph, stream=stream):
        chain()
    spans: dict[str, list[float]] = {name: [] for name in STAGES}
    for _ in range(timer.repeats):
        timer.meet()
        graph.replay()
        timer.synchronize()
        for mark in marks[1:]:  # the ranks come to the first layer apart
            for number, name in enumerate(STAGES):
                spans[name].append(mark[number].elapsed_time(mark[number + 1]) * 1e3)
    ws.check()
    return {f"{name}_us": round(timer.slowest(statistics.median(span)), 2) for name, span in spans.items()}


def _marked_layer(layer: MoELayer, hidden: torch.Tensor, mark: list[torch.cuda.Event]) -> None:
    """A layer's stages one after another, with a time stamp before, between and after them."""
    shared, dispatcher = layer.shared_experts, layer.dispatcher
    mark[0].record()
    if shared is not None:
        shared(hidden)
    mark[1].record()
    weights, idx = layer.router(hidden)
    mark[2].record()
    got = dispatcher.dispatch(hidden, idx, weights)
    mark[3].record()
    partial = layer.experts(got, out=dispatcher.combine_input())
    mark[4].record()
    dispatcher.combine(partial, got)
    mark[5].record()
