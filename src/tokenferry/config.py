"""The shape of one mixture-of-experts layer, as far as moving its tokens is concerned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenferry.errors import ConfigError

HIDDEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that hidden rows, partial rows and the combine wire may have."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """What every rank must agree on about a layer.

    Attributes:
        hidden_size: H, columns of a hidden row.
        num_experts: E, experts of the whole group; they need not divide evenly among the ranks.
        topk: K, experts chosen for each token.
        dtype: of the hidden rows and of the combined result: bfloat16, float16 or float32.

    Raises:
        ConfigError: a number is not a positive int, `topk` exceeds `num_experts`, or the dtype is not one of the three.
    """

    hidden_size: int
    num_experts: int
    topk: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_experts", "topk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive int, got {value!r}")
        if self.topk > self.num_experts:
            raise ConfigError(f"topk is {self.topk} but there are only {self.num_experts} experts; lower topk")
        if self.dtype not in HIDDEN_DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(map(str, HIDDEN_DTYPES))}, got {self.dtype!r}")
