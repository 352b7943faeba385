"""What all ranks' snapshots say together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokenferry.errors import ConfigError
from tokenferry.inspection.step_kinds import kinds_of
from tokenferry.kernels.wait_board import NUM_LAYERS
from tokenferry.placement import Placement, StepModel, Verdict, judge
from tokenferry.telemetry import Snapshot, last_to_enter, loads_of


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
        notes: what these figures cannot tell, in sentences.
    """

    snapshots: tuple[Snapshot, ...]
    loads: tuple[tuple[int, ...], ...]
    waits_ns: tuple[tuple[int, ...], ...]
    rank_imbalance: tuple[float, ...]
    expert_imbalance: tuple[float, ...]
    readings: tuple[str, ...]
    verdict: Verdict
    model: StepModel
    notes: tuple[str, ...]

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
            "notes": list(self.notes),
            "snapshots": [snapshot.to_dict() for snapshot in self.snapshots],
        }


def findings_of(snapshots: Sequence[Snapshot], model: StepModel) -> Findings:
    """The figures of all ranks' snapshots, in rank order.

    Raises:
        ConfigError: there are none, or they are of no round.
    """
    if not any(snapshot.layers for snapshot in snapshots):
        raise ConfigError("nothing was counted: no rank has dispatched with telemetry on")
    loads = loads_of(snapshots)
    table = torch.tensor(loads, dtype=torch.float64, device="cpu")
    num_layers, num_ranks = len(loads), len(snapshots)
    placement = Placement.as_is(num_layers, table.shape[1], num_ranks)
    mean = table.mean(1)
    of_experts = torch.where(mean > 0, table.amax(1) / mean.clamp_min(1e-300), torch.ones_like(mean))
    rounds = _rounds(snapshots, num_layers)
    num_steps = max(1, *(rounds[:-1] if num_layers == NUM_LAYERS else rounds))
    kinds = kinds_of(snapshots)
    return Findings(
        snapshots=tuple(snapshots),
        loads=loads,
        waits_ns=tuple(snapshot.waits.total_ns for snapshot in snapshots),
        rank_imbalance=tuple(placement.imbalance(table).tolist()),
        expert_imbalance=tuple(of_experts.tolist()),
        readings=tuple(last_to_enter(snapshot.steps, snapshot.rank) for snapshot in snapshots),
        verdict=judge(table, num_ranks, model, num_steps=num_steps, rounds=rounds, kinds=kinds),
        model=model,
        notes=tuple(_notes(rounds, num_steps, has_kinds=bool(kinds))),
    )


def _rounds(snapshots: Sequence[Snapshot], num_layers: int) -> list[int]:
    """How often each layer ran. A rank whose snapshot was read earlier lacks some."""
    rounds = [0] * num_layers
    for snapshot in snapshots:
        for layer in snapshot.layers:
            rounds[layer.layer] = max(rounds[layer.layer], layer.num_rounds)
    return rounds


def _notes(rounds: Sequence[int], num_steps: int, *, has_kinds: bool) -> Iterator[str]:
    if rounds[-1] > num_steps:
        yield (
            f"Layers from number {NUM_LAYERS - 1} on, about {rounds[-1] / num_steps:.0f} of them, share the last place: what is "
            "said of it is of all of them together, whose loads may be more uneven one by one."
        )
    if not has_kinds:
        yield ("The rows of the steps are not known: the verdict is on a mean step, although decode steps and prefills differ.")
