"""A layer with float8 weights, in each way in which its rows and its terms can travel, beside the layer of bfloat16 weights.

Rows that travel in bfloat16 are quantized by the experts; all is measured in one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import torch

from tokenferry.benchmarking.layer_checks import FLOAT8_TERMS_TOLERANCE, TOLERANCE, expected_rows, experts_floor, is_right
from tokenferry.benchmarking.layer_model import DTYPE, LayerModel
from tokenferry.benchmarking.layer_times import time_dispatch_and_combine, time_layer, time_stages
from tokenferry.benchmarking.records import Record
from tokenferry.benchmarking.timing import GroupTimer, Laps
from tokenferry.dispatched import FLOAT8
from tokenferry.layer import MoELayer
from tokenferry.workspace import Workspace


@dataclass(frozen=True)
class Formats:
    """How rows and terms travel: as `Workspace` takes it."""

    dispatch_format: str
    combine_dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        """See `is_right`."""
        return FLOAT8_TERMS_TOLERANCE if self.combine_dtype == FLOAT8 else TOLERANCE


FORMATS: Final[Mapping[str, Formats]] = {
    "same": Formats("same", DTYPE),
    "fp8_block128": Formats("fp8_block128", DTYPE),
    "fp8_block128_both": Formats("fp8_block128", FLOAT8),
}
"""By the names in the records: all in bfloat16, the rows in float8, rows and terms in float8."""


class FormatLayers:
    """The layers of a preset, each on a workspace of its own. Opening is collective.

    Args:
        model: its experts are quantized: `float8` is True.
        transport: of the workspaces.
        stack: closes them.
        bfloat16_us: what layers of bfloat16 weights took already, by the number of tokens; the others are measured.
    """

    def __init__(
        self, model: LayerModel, transport: str, stack: ExitStack, bfloat16_us: Mapping[int, float] | None = None
    ) -> None:
        self.model, self._bfloat16_us = model, dict(bfloat16_us or {})
        self.workspaces = {
            name: stack.enter_context(model.open(transport, each.dispatch_format, each.combine_dtype))
            for name, each in FORMATS.items()
        }
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
            `bfloat16_us`, and for each of `FORMATS` by name its `total_us`, `round_trip_us` and stages; `correct` for all,
            within the tolerance of what float8 weights and quantized rows stand for; `seconds` that each took to measure.
        """
        laps = Laps()
        rows, expected = self.model.rows(timer.group.rank, count), expected_rows(self.model, count)
        record: Record = experts_floor(timer, self.model, count, rates)
        record["experts_floor_us"] = round(record["experts_floor_us"], 2)
        laps.mark("expected")
        right = {}
        for name, layer in self.layers.items():
            figures, outputs = _measure(timer, self.workspaces[name], layer, rows)
            right[name] = is_right(timer, outputs, expected, FORMATS[name].tolerance)
            record[name] = figures
            laps.mark(name)
        if count not in self._bfloat16_us:
            self._bfloat16_us[count] = round(time_layer(timer, self.workspaces["same"], self.bfloat16, rows)[0], 2)
            laps.mark("bfloat16")
        return record | {"bfloat16_us": self._bfloat16_us[count], "correct": right, "seconds": laps.seconds}


def _measure(
    timer: GroupTimer, ws: Workspace, layer: MoELayer, rows: list[torch.Tensor]
) -> tuple[dict[str, float], list[torch.Tensor]]:
    total_us, outputs = time_layer(timer, ws, layer, rows)
    figures = {"total_us": round(total_us, 2)}
    figures["round_trip_us"] = round(time_dispatch_and_combine(timer, ws, layer, rows), 2)
    return figures | time_stages(timer, ws, layer, rows), outputs
