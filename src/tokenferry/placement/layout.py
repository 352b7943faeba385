"""Which physical expert, on which rank, holds which expert of the model.

Legend: L layers, E logical experts (the model's), P physical experts (E and their further replicas), X most replicas of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokenferry.errors import ConfigError, DtypeError, ShapeError


def balanced_blocks(num_items: int, num_blocks: int) -> list[int]:
    """The lengths of `num_blocks` contiguous blocks, of which the first `num_items` modulo `num_blocks` hold one more: how
    `EPGroup.expert_range` cuts the experts.

    Example:
        balanced_blocks(7, 3) == [3, 2, 2]
    """
    return [num_items // num_blocks + (block < num_items % num_blocks) for block in range(num_blocks)]


@dataclass(frozen=True, eq=False)
class Placement:
    """A placement of L layers' experts on ranks. All tensors are int64 on the CPU.

    Attributes:
        phy2log: [L, P] the logical expert that each physical one is a copy of.
        log2phy: [L, E, X] the physical experts of each logical one, and -1 behind them.
        num_replicas: [L, E] how many there are.
        num_ranks: rank r holds the r-th of as many blocks of the P, as `balanced_blocks` cuts them.
    """

    phy2log: torch.Tensor
    log2phy: torch.Tensor
    num_replicas: torch.Tensor
    num_ranks: int

    @staticmethod
    def of(phy2log: Sequence[Sequence[int]] | torch.Tensor, num_experts: int, num_ranks: int) -> Placement:
        """From `phy2log` alone.

        Raises:
            ConfigError: an expert has no place, a number names no expert, or there are fewer places than ranks.
        """
        table = torch.as_tensor(phy2log, dtype=torch.int64, device="cpu")
        if table.dim() != 2:
            raise ShapeError(f"phy2log has {table.dim()} dimensions; give [layers, physical experts]")
        num_layers, num_physical = table.shape
        if not 1 <= num_ranks <= num_physical:
            raise ConfigError(f"num_ranks is {num_ranks} but there are {num_physical} places; every rank needs one")
        if table.numel() and (int(table.min()) < 0 or int(table.max()) >= num_experts):
            raise ConfigError(f"phy2log holds {int(table.min())} to {int(table.max())}, but experts are 0 to {num_experts - 1}")
        replicas = torch.zeros((num_layers, num_experts), dtype=torch.int64, device="cpu")
        replicas.scatter_add_(1, table, torch.ones_like(table))
        if (replicas == 0).any():
            layer, expert = (int(index) for index in (replicas == 0).nonzero()[0])
            raise ConfigError(f"expert {expert} of layer {layer} has no place; every expert needs one")
        most = int(replicas.max()) if replicas.numel() else 0
        inverse = torch.full((num_layers, num_experts, most), -1, dtype=torch.int64, device="cpu")
        for layer in range(num_layers):
            filled = [0] * num_experts
            for physical, logical in enumerate(table[layer].tolist()):
                inverse[layer, logical, filled[logical]] = physical
                filled[logical] += 1
        return Placement(table, inverse, replicas, num_ranks)

    @staticmethod
    def as_is(num_layers: int, num_experts: int, num_ranks: int) -> Placement:
        """What the library does by itself: one copy of each expert, in contiguous blocks."""
        return Placement.of([list(range(num_experts))] * num_layers, num_experts, num_ranks)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.num_replicas.shape[1]

    @property
    def num_physical(self) -> int:
        """P."""
        return self.phy2log.shape[1]

    @property
    def rank_of_place(self) -> torch.Tensor:
        """[P] the rank that holds each physical expert."""
        lengths = torch.tensor(balanced_blocks(self.num_physical, self.num_ranks), dtype=torch.int64, device="cpu")
        return torch.arange(self.num_ranks, dtype=torch.int64, device="cpu").repeat_interleave(lengths)

    def loads_of_places(self, loads: torch.Tensor) -> torch.Tensor:
        """[L, P] float64: what each physical expert gets of `loads` [L, E], if replicas share their expert's evenly."""
        loads = checked_loads(loads)
        if loads.shape != self.num_replicas.shape:
            raise ShapeError(f"loads are {list(loads.shape)} but the placement is of {list(self.num_replicas.shape)}")
        return (loads / self.num_replicas).gather(1, self.phy2log)

    def loads_of_ranks(self, loads: torch.Tensor) -> torch.Tensor:
        """[L, ranks] float64: what each rank gets of `loads` [L, E]."""
        places = self.loads_of_places(loads)
        sums = torch.zeros((places.shape[0], self.num_ranks), dtype=torch.float64, device="cpu")
        return sums.index_add_(1, self.rank_of_place, places)

    def imbalance(self, loads: torch.Tensor) -> torch.Tensor:
        """[L] float64: the rows of the fullest rank over the mean of all ranks; 1 where there are none."""
        ranks = self.loads_of_ranks(loads)
        mean = ranks.mean(1)
        return torch.where(mean > 0, ranks.amax(1) / mean.clamp_min(1e-300), torch.ones_like(mean))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "num_ranks": self.num_ranks,
            "phy2log": self.phy2log.tolist(),
            "log2phy": self.log2phy.tolist(),
            "num_replicas": self.num_replicas.tolist(),
        }


def checked_loads(loads: Sequence[Sequence[float]] | torch.Tensor) -> torch.Tensor:
    """A load table as float64 on the CPU.

    Raises:
        ShapeError: it is not [layers, experts].
        DtypeError: it holds something that is no finite number >= 0.
    """
    table = torch.as_tensor(loads, device="cpu").to(torch.float64)
    if table.dim() != 2 or not table.shape[1]:
        raise ShapeError(f"loads are {list(table.shape)}; give [layers, experts], with at least one expert")
    if not torch.isfinite(table).all() or (table < 0).any():
        raise DtypeError("loads hold a negative number, a NaN or an infinity; give the rows that each expert got")
    return table
