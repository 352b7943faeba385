"""What a step of a model with experts takes under a placement, predicted.

The model is stated in full, so that it can be argued with. In each layer a rank reads the weights of those of its physical
experts that get a row at all, and multiplies its rows by them, one after the other:

    rank_s  = touched experts * weight_bytes / memory_bytes_per_s + rows * flops_per_row / flops_per_s
    layer_s = the slowest rank's time + exchange_s + rows of all ranks * exchange_s_per_row
    step_s  = all layers' time + other_s

It is the sum, and not the longer of the two, because the sum fits what was measured: where the longer of the two predicted a gain
of 0, 9 % were measured. (That kernels hide hardly any of the one behind the other would explain it; nothing was profiled.)
Measured gains of a skewed load were off by up to 2.1 % of a step for the layer by which the model was mended, and by up
to 7.3 % for another one (2 x H100, 2026-11-26, benchmarks/results/2xH100-2026-11-26-placement.jsonl; docs/telemetry.md).

A physical expert that gets `n` rows in a mean step is touched with the probability 1 - exp(-n): rows come by chance. A replica
therefore costs nothing where experts get many rows, and where they get few it adds weights to be read and removes hardly a row.

The slowest rank is the one whose mean time is longest. With few rows now one rank gets more and now another, whatever the
placement: the mean of the slowest is then longer than the model says, and a gain in such steps may be said too large.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from tokenferry.errors import ConfigError
from tokenferry.placement.layout import Placement


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """What a step is made of.

    Attributes:
        weight_bytes: of one expert of one layer.
        flops_per_row: for one row through one expert.
        memory_bytes_per_s: at which a rank reads weights.
        flops_per_s: at which it multiplies.
        exchange_s: dispatch and combine of a layer, which no placement changes here.
        exchange_s_per_row: beside that, for each row of the load table, in which a token stands as often as it has experts.
        other_s: everything outside of the experts, for all layers.
    """

    weight_bytes: float
    flops_per_row: float
    memory_bytes_per_s: float
    flops_per_s: float
    exchange_s: float = 0.0
    exchange_s_per_row: float = 0.0
    other_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0 or (name in ("memory_bytes_per_s", "flops_per_s") and value == 0):
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
        exchange_s_per_row: float = 0.0,
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
            exchange_s_per_row=exchange_s_per_row,
            other_s=other_s,
        )

    def step_s(self, placement: Placement, rows_LE: torch.Tensor, shares_L: torch.Tensor | None = None) -> float:
        """The predicted time of a step.

        Args:
            rows_LE: [L, E] that the experts of each layer get when it runs.
            shares_L: [L] how often each layer runs in a step, 0.5 for one in every second step. Default: once.
        """
        read_s, compute_s = self._rank_times_s(placement, rows_LE)
        exchanges_s = self.exchange_s + self.exchange_s_per_row * rows_LE.to(torch.float64).sum(1)
        layers_s = (read_s + compute_s).amax(1) + exchanges_s
        return float((layers_s if shares_L is None else layers_s * shares_L).sum()) + self.other_s

    def share_bound_by_weights(self, placement: Placement, rows_LE: torch.Tensor) -> float:
        """The share of layers in which the slowest rank is longer at reading weights than at products."""
        read_s, compute_s = self._rank_times_s(placement, rows_LE)
        slowest = (read_s + compute_s).argmax(1, keepdim=True)
        return float((read_s.gather(1, slowest) > compute_s.gather(1, slowest)).double().mean())

    def _rank_times_s(self, placement: Placement, rows_LE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[L, ranks] each: reading weights, multiplying."""
        places = placement.loads_of_places(rows_LE)
        touched = torch.zeros((places.shape[0], placement.num_ranks), dtype=torch.float64, device="cpu")
        touched.index_add_(1, placement.rank_of_place, -torch.expm1(-places))
        read_s = touched * (self.weight_bytes / self.memory_bytes_per_s)
        return read_s, placement.loads_of_ranks(rows_LE) * (self.flops_per_row / self.flops_per_s)
