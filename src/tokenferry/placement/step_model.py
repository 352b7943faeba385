"""What a step of a model with experts takes under a placement, predicted.

The model is stated in full, so that it can be argued with. In each layer a rank reads the weights of those of its physical
experts that get a row at all, and multiplies its rows by them, one after the other:

    rank_s  = touched experts * weight_bytes / memory_bytes_per_s + rows * flops_per_row / flops_per_s
    layer_s = the slowest rank's time, in the mean + exchange_s + rows of all ranks * exchange_s_per_row
    step_s  = all layers' time + other_s

It is the sum, and not the longer of the two, because the sum fits what was measured: where the longer of the two predicted a gain
of 0, 9 % were measured. (That kernels hide hardly any of the one behind the other would explain it; nothing was profiled.)
Measured gains of a skewed load were off by up to 2.1 % of a step for the layer by which the model was mended, and by up
to 7.3 % for another one (2 x H100, 2026-11-26, benchmarks/results/2xH100-2026-11-26-placement.jsonl; docs/telemetry.md).

Where few rows come for each expert, as in decoding, most experts get none in a step, and their weights are not read. Which do
is chance, and differs from step to step (`chance`): a physical expert with `n` rows in a mean step of `N` tokens gets one at all
with the probability 1 - (1 - n/N)^N. The slowest rank is the one of whose experts the most have got a row in that very step, so
that its mean time is longer than any rank's mean, also where all ranks' means are the same: that part no placement evens out. A
model that took the rank with the longest mean said 1.6 experts where 2.6 were (one token in a step, 8 of 256 experts by Zipf's
law, 8 ranks), and so a gain of a third for a placement that gains 6 % when such steps are drawn. A replica costs nothing where
experts get many rows; where they get few it takes hardly a row away, and the two copies together get one more often than the
expert did.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from tokenferry.errors import ConfigError
from tokenferry.placement.chance import chances_of_a_row, expected_slowest, numbers_with_a_row
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

    def step_s(
        self,
        placement: Placement,
        rows_LE: torch.Tensor,
        shares_L: torch.Tensor | None = None,
        num_tokens: float | None = None,
    ) -> float:
        """The predicted time of a step.

        Args:
            rows_LE: [L, E] that the experts of each layer get when it runs.
            shares_L: [L] how often each layer runs in a step, 0.5 for one in every second step. Default: once.
            num_tokens: of all ranks, that these rows belong to. Default: many.
        """
        likely = _numbers_with_a_row(placement, rows_LE, num_tokens)
        slowest_s = expected_slowest(likely, self.weight_bytes / self.memory_bytes_per_s, self._compute_s(placement, rows_LE))
        layers_s = slowest_s + self.exchange_s + self.exchange_s_per_row * rows_LE.to(torch.float64).sum(1)
        return float((layers_s if shares_L is None else layers_s * shares_L).sum()) + self.other_s

    def share_bound_by_weights(self, placement: Placement, rows_LE: torch.Tensor, num_tokens: float | None = None) -> float:
        """The share of layers in which the slowest rank is longer at reading weights than at products."""
        read_s = _means(_numbers_with_a_row(placement, rows_LE, num_tokens)) * (self.weight_bytes / self.memory_bytes_per_s)
        compute_s = self._compute_s(placement, rows_LE)
        slowest = (read_s + compute_s).argmax(1, keepdim=True)
        return float((read_s.gather(1, slowest) > compute_s.gather(1, slowest)).double().mean())

    def _compute_s(self, placement: Placement, rows_LE: torch.Tensor) -> torch.Tensor:
        """[L, ranks] multiplying. By the mean of a rank's rows: where they are few, reading takes far longer."""
        return placement.loads_of_ranks(rows_LE) * (self.flops_per_row / self.flops_per_s)


def most_with_a_row(placement: Placement, rows_LE: torch.Tensor, num_tokens: float | None = None) -> float:
    """Experts of one rank that get a row in a step, on the rank that has the most of them then: the mean of steps and layers."""
    likely = _numbers_with_a_row(placement, rows_LE, num_tokens)
    return float(expected_slowest(likely, 1.0, torch.zeros(likely.shape[:2], dtype=torch.float64, device="cpu")).mean())


def _numbers_with_a_row(placement: Placement, rows_LE: torch.Tensor, num_tokens: float | None) -> torch.Tensor:
    chances = chances_of_a_row(placement.loads_of_places(rows_LE), num_tokens)
    return numbers_with_a_row(chances, placement.rank_of_place, placement.num_ranks)


def _means(likely_LGM: torch.Tensor) -> torch.Tensor:
    """[L, ranks] experts with a row, in the mean."""
    return likely_LGM @ torch.arange(likely_LGM.shape[2], dtype=torch.float64, device="cpu")
