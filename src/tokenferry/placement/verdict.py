"""Whether moving experts would pay: a model's step as it is, with experts rearranged, and with replicas.

The model is stated in full, so that it can be argued with. In each layer a rank reads the weights of those of its physical
experts that get a row at all, and multiplies its rows by them; the two overlap, so that its time is the longer of them:

    rank_s  = max(touched experts * weight_bytes / memory_bytes_per_s, rows * flops_per_row / flops_per_s)
    layer_s = the slowest rank's time + exchange_s
    step_s  = all layers' time + other_s

A physical expert that gets `n` rows in a mean step is touched with the probability 1 - exp(-n): rows come by chance. A replica
therefore costs nothing where experts get many rows, and where they get few it adds weights to be read and removes hardly a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from tokenferry.errors import ConfigError
from tokenferry.placement.algorithm import place
from tokenferry.placement.layout import Placement, checked_loads

LEAST_GAIN: Final = 0.03
"""A gain below this share of a step is not worth a change: no prediction of this kind is better than that."""


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """What a step is made of.

    Attributes:
        weight_bytes: of one expert of one layer.
        flops_per_row: for one row through one expert.
        memory_bytes_per_s: at which a rank reads weights.
        flops_per_s: at which it multiplies.
        exchange_s: dispatch and combine of a layer, which no placement changes here.
        other_s: everything outside of the experts, for all layers.
    """

    weight_bytes: float
    flops_per_row: float
    memory_bytes_per_s: float
    flops_per_s: float
    exchange_s: float = 0.0
    other_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0 or (name.endswith("per_s") and value == 0):
                raise ConfigError(f"{name} is {value}; give a positive number")

    @staticmethod
    def of_gated(
        hidden_size: int,
        intermediate_size: int,
        bytes_per_weight: float,
        *,
        memory_bytes_per_s: float,
        flops_per_s: float,
        exchange_s: float = 0.0,
        other_s: float = 0.0,
    ) -> StepModel:
        """Of experts with three matrices [intermediate_size, hidden_size]: gate, up and down."""
        weights = 3.0 * hidden_size * intermediate_size
        return StepModel(
            weight_bytes=weights * bytes_per_weight,
            flops_per_row=2 * weights,
            memory_bytes_per_s=memory_bytes_per_s,
            flops_per_s=flops_per_s,
            exchange_s=exchange_s,
            other_s=other_s,
        )

    def step_s(self, placement: Placement, rows_LE: torch.Tensor) -> float:
        """The predicted time of a step in which the experts get `rows_LE` [L, E] rows."""
        read_s, compute_s = self._rank_times_s(placement, rows_LE)
        slowest_s = torch.maximum(read_s, compute_s).amax(1)
        return float(slowest_s.sum()) + rows_LE.shape[0] * self.exchange_s + self.other_s

    def share_bound_by_weights(self, placement: Placement, rows_LE: torch.Tensor) -> float:
        """The share of layers in which the slowest rank waits for weights, not for products."""
        read_s, compute_s = self._rank_times_s(placement, rows_LE)
        slowest = torch.maximum(read_s, compute_s).argmax(1, keepdim=True)
        return float((read_s.gather(1, slowest) > compute_s.gather(1, slowest)).double().mean())

    def _rank_times_s(self, placement: Placement, rows_LE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[L, ranks] each: reading weights, multiplying."""
        places = placement.loads_of_places(rows_LE)
        touched = torch.zeros((places.shape[0], placement.num_ranks), dtype=torch.float64, device="cpu")
        touched.index_add_(1, placement.rank_of_place, -torch.expm1(-places))
        read_s = touched * (self.weight_bytes / self.memory_bytes_per_s)
        return read_s, placement.loads_of_ranks(rows_LE) * (self.flops_per_row / self.flops_per_s)


@dataclass(frozen=True, eq=False)
class Option:
    """One thing that could be done.

    Attributes:
        name: "as is", "rearranged", or "rearranged + n replicas".
        placement: what it is.
        step_s: predicted.
        gain: the share of the step as it is that it saves; negative if it is slower.
        imbalance: of the fullest layer: rows of the fullest rank over the mean.
        extra_bytes: of weights that each rank holds beyond its share today, all layers, for replicas.
    """

    name: str
    placement: Placement
    step_s: float
    gain: float
    imbalance: float
    extra_bytes: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = {"step_s": self.step_s, "gain": self.gain, "imbalance": self.imbalance, "extra_bytes": self.extra_bytes}
        return {"name": self.name, **figures, "placement": self.placement.to_dict()}


@dataclass(frozen=True, eq=False)
class Verdict:
    """What was compared, the best of it, and the reading in words."""

    options: tuple[Option, ...]
    pays: bool
    best: Option
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        options = [option.to_dict() for option in self.options]
        return {"pays": self.pays, "best": self.best.name, "sentence": self.sentence, "options": options}


def judge(
    loads: Sequence[Sequence[float]] | torch.Tensor,
    num_ranks: int,
    model: StepModel,
    *,
    num_steps: float = 1.0,
    replicas: Sequence[int] = (),
    num_groups: int = 1,
    num_nodes: int = 1,
) -> Verdict:
    """Compares the step as it is with rearranged experts, and with each number of `replicas`.

    Args:
        loads: [L, E] the rows that each expert got in `num_steps` steps.
        num_ranks: that share the experts, in contiguous blocks today.
        model: what a step is made of.
        num_steps: over which the loads were counted.
        replicas: numbers of further places to try. Default: one for each rank, if there are ranks to share.
        num_groups, num_nodes: see `place`.

    Raises:
        ConfigError: sizes that do not fit one another.
    """
    table = checked_loads(loads)
    if not num_steps > 0:
        raise ConfigError(f"num_steps is {num_steps}; give the number of steps that the loads were counted over")
    rows_LE, (num_layers, num_experts) = table / num_steps, table.shape
    tried = [("as is", Placement.as_is(num_layers, num_experts, num_ranks))]
    for number in (0, *(replicas or ((num_ranks,) if num_ranks > 1 else ()))):
        name = f"rearranged + {number} replicas" if number else "rearranged"
        tried.append((name, place(table, num_ranks, num_replicas=number, num_groups=num_groups, num_nodes=num_nodes)))
    as_is_s = model.step_s(tried[0][1], rows_LE)
    options = []
    for name, placement in tried:
        step_s = model.step_s(placement, rows_LE)
        gain = 1 - step_s / as_is_s if as_is_s else 0.0
        imbalance = float(placement.imbalance(table).max()) if num_layers else 1.0
        extra_bytes = (placement.num_physical - num_experts) / num_ranks * model.weight_bytes * num_layers
        options.append(Option(name, placement, step_s, gain, imbalance, extra_bytes))
    best = min(options, key=lambda option: option.step_s)  # of equals the first, which changes least
    pays = best.gain >= LEAST_GAIN
    return Verdict(tuple(options), pays, best, _sentence(options, best, model, rows_LE))


def _sentence(options: Sequence[Option], best: Option, model: StepModel, rows_LE: torch.Tensor) -> str:
    as_is = options[0]
    if not float(rows_LE.sum()):
        return "No expert got a row: there is nothing to balance."
    if as_is.placement.num_ranks == 1:
        return "One rank holds every expert: there is nothing to balance."
    times = f"{as_is.step_s * 1e3:.3f} ms a step as it is, {best.step_s * 1e3:.3f} ms {best.name}"
    if best.gain >= LEAST_GAIN:
        memory = f", for {best.extra_bytes / 2**30:.2f} GiB of weights more on each rank" if best.extra_bytes else ""
        return f"Balancing would pay: {times} (predicted), {best.gain:.0%} less{memory}."
    share = model.share_bound_by_weights(as_is.placement, rows_LE)
    if share >= 0.5:
        return (
            f"Balancing would not pay: in {share:.0%} of the layers the slowest rank is bound by the bytes of its experts' "
            "weights, which moving rows does not change and replicas only add to."
        )
    if best is as_is or best.gain <= 0:
        return (
            f"Balancing would not pay: the fullest rank has {as_is.imbalance:.2f} times the mean, and no placement does better."
        )
    return (
        f"Balancing would not pay: {times} (predicted), a gain of {best.gain:.1%}, below the {LEAST_GAIN:.0%} that are worth it."
    )
