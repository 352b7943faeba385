"""A layer with float8 weights: rows that travel in bfloat16 and are quantized by the experts, beside rows that travel quantized.

Both are measured in one run, with the layer of bfloat16 weights beside them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Final

import torch

from tokenferry.benchmarking.layer_checks import expected_rows, experts_floor, is_right
from tokenferry.benchmarking.layer_model import LayerModel
from tokenferry.benchmarking.layer_times import time_dispatch_and_combine, time_layer, time_stages
from tokenferry.benchmarking.records import Record
from tokenferry.benchmarking.timing import GroupTimer
from tokenferry.layer import MoELayer
from tokenferry.workspace import Workspace

FORMATS: Final = ("same", "fp8_block128")


class FormatLayers:
    """The layers of a preset, each on a workspace of its own. Opening is collective.

    Args:
        model: made with `float8=True`.
        transport: of the workspaces.
        stack: closes them.
    """

    def __init__(self, model: LayerModel, transport: str, stack: ExitStack) -> None:
        self.model = model
        self.workspaces = {name: stack.enter_context(model.open(transport, name)) for name in FORMATS}
        self.layers = {name: model.layer(ws) for name, ws in self.workspaces.items()}
        plain = self.workspaces["same"]
        self.bfloat16 = MoELayer(
            plain, model.router, model.bfloat16_experts, shared_experts=model.shared, shared_overlap="stream"
        )

    @property
    def transport(self) -> str:
        """Of all of them."""
        return self.workspaces["same"].transport

    @torch.no_grad()
    def measure(self, timer: GroupTimer, count: int, rates: dict[str, float]) -> Record:
        """One row of the table, with `count` tokens on every rank. Collective.

        Returns:
            `bfloat16_us`, and for each format by name its `total_us`, `round_trip_us` and stages; `correct` for both, within the
            tolerance of what float8 weights and quantized rows stand for.
        """
        rows, expected = self.model.rows(timer.group.rank, count), expected_rows(self.model, count)
        record: Record = experts_floor(timer, self.model, count, rates)
        record["experts_floor_us"] = round(record["experts_floor_us"], 2)
        right = {}
        for name, layer in self.layers.items():
            figures, outputs = _measure(timer, self.workspaces[name], layer, rows)
            right[name] = is_right(timer, outputs, expected)
            record[name] = figures
        record["bfloat16_us"] = round(time_layer(timer, self.workspaces["same"], self.bfloat16, rows)[0], 2)
        return record | {"correct": right}


def _measure(
    timer: GroupTimer, ws: Workspace, layer: MoELayer, rows: list[torch.Tensor]
) -> tuple[dict[str, float], list[torch.Tensor]]:
    total_us, outputs = time_layer(timer, ws, layer, rows)
    figures = {"total_us": round(total_us, 2)}
    figures["round_trip_us"] = round(time_dispatch_and_combine(timer, ws, layer, rows), 2)
    return figures | time_stages(timer, ws, layer, rows), outputs
