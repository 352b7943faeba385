"""What all ranks' snapshots say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokenferry.errors import ConfigError
from tokenferry.placement import Placement, StepModel, Verdict, judge
from tokenferry.telemetry import Snapshot, last_to_enter


@dataclass(frozen=True, eq=False)
class Findings:
    """The figures of a run.

    Attributes:
        snapshots: of all ranks, in rank order.
        loads: [layer][expert] rows that came, over all steps.
        waits_ns: [rank][source] how long each rank waited for each other, all phases.
        rank_imbalance: by layer: rows of the fullest rank over the mean, experts in contiguous blocks.
        expert_imbalance: by layer: rows of the fullest expert over the mean.
        readings: one line a rank on who kept it waiting.
        verdict: on balancing.
        model: what the verdict's times are predicted with.
    """

    snapshots: tuple[Snapshot, ...]
    loads: tuple[tuple[int, ...], ...]
    waits_ns: tuple[tuple[int, ...], ...]
    rank_imbalance: tuple[float, ...]
    expert_imbalance: tuple[float, ...]
    readings: tuple[str, ...]
    verdict: Verdict
    model: StepModel

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "num_ranks": len(self.snapshots),
            "loads": [list(row) for row in self.loads],
            "waits_ns": [list(row) for row in self.waits_ns],
            "rank_imbalance": list(self.rank_imbalance),
            "expert_imbalance": list(self.expert_imbalance),
            "readings": list(self.readings),
            "verdict": self.verdict.to_dict(),
            "snapshots": [snapshot.to_dict() for snapshot in self.snapshots],
        }


def findings_of(snapshots: Sequence[Snapshot], model: StepModel) -> Findings:
    """The figures of all ranks' snapshots, in rank order.

    Raises:
        ConfigError: there are none, or they are of no round.
    """
    if not snapshots or not snapshots[0].layers:
        raise ConfigError("nothing was counted: no rank has dispatched with telemetry on")
    num_layers = max(len(snapshot.loads) for snapshot in snapshots)
    table = _together(snapshots, num_layers)
    num_ranks = len(snapshots)
    placement = Placement.as_is(num_layers, table.shape[1], num_ranks)
    mean = table.mean(1)
    of_experts = torch.where(mean > 0, table.amax(1) / mean.clamp_min(1e-300), torch.ones_like(mean))
    num_steps = max(1, *(layer.num_rounds for snapshot in snapshots for layer in snapshot.layers))
    return Findings(
        snapshots=tuple(snapshots),
        loads=tuple(tuple(int(rows) for rows in row) for row in table.tolist()),
        waits_ns=tuple(snapshot.waits.total_ns for snapshot in snapshots),
        rank_imbalance=tuple(placement.imbalance(table).tolist()),
        expert_imbalance=tuple(of_experts.tolist()),
        readings=tuple(last_to_enter(snapshot.steps, snapshot.rank) for snapshot in snapshots),
        verdict=judge(table, num_ranks, model, num_steps=num_steps),
        model=model,
    )


def _together(snapshots: Sequence[Snapshot], num_layers: int) -> torch.Tensor:
    """[L, E] float64. All ranks see the same numbers; one that was read earlier, in its last step, lacks some."""
    tables = [torch.tensor(snapshot.loads, dtype=torch.float64, device="cpu") for snapshot in snapshots if snapshot.loads]
    whole = [table for table in tables if table.shape[0] == num_layers]
    return torch.stack(whole).amax(0)
