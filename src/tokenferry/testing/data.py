"""Inputs for tests: every rank regenerates all ranks' inputs from a seed, so that expectations need no communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tokenferry.config import MoEConfig

Payload = Literal["normal", "hostile"]
Routing = Literal["uniform", "skewed", "none", "repeated"]
Shape = tuple[int, int]

HOSTILE = (float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1e-40, -1e-40, 1.0)
"""Values that a careless copy or sum changes: NaNs, infinities, signed zeros, subnormals."""


@dataclass(frozen=True)
class RankInputs:
    """One rank's arguments of dispatch, and its partial rows for all ranks' tokens."""

    hidden: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    partial: torch.Tensor


def make_inputs(
    config: MoEConfig,
    tokens_per_rank: Sequence[int],
    *,
    seed: int,
    routing: Routing = "uniform",
    payload: Payload = "normal",
    index_dtype: torch.dtype = torch.int64,
    weight_dtype: torch.dtype = torch.float32,
    partial_dtype: torch.dtype | None = None,
    supplied: Sequence[int] | None = None,
) -> list[RankInputs]:
    """Every rank's inputs, the same on every rank. CPU tensors.

    `supplied` gives T' for each rank (default T): hidden, ids and weights have T' rows; partials always have V rows.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    partial_dtype = config.dtype if partial_dtype is None else partial_dtype
    rows = tokens_per_rank if supplied is None else supplied
    num_valid = sum(tokens_per_rank)
    return [
        RankInputs(
            hidden=_payload((count, config.hidden_size), config.dtype, payload, generator),
            topk_idx=_routing((count, config.topk), config.num_experts, routing, generator).to(index_dtype),
            topk_weights=_uniform((count, config.topk), generator).to(weight_dtype),
            partial=_payload((num_valid, config.hidden_size), partial_dtype, payload, generator),
        )
        for count in rows
    ]


def _payload(shape: Shape, dtype: torch.dtype, payload: Payload, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    if payload == "hostile":
        special = torch.tensor(HOSTILE, dtype=torch.float32, device="cpu")[_integers(0, len(HOSTILE), shape, generator)]
        values = torch.where(_uniform(shape, generator) < 0.5, special, values)
        bits = _integers(-(2**31), 2**31, shape, generator).to(torch.int32)
        values = torch.where(_uniform(shape, generator) < 0.2, bits.view(torch.float32), values)
        empty_word = torch.tensor(-1, dtype=torch.int32, device="cpu").view(torch.float32)  # what unread slots hold
        values = torch.where(_uniform(shape, generator) < 0.1, empty_word, values)
    return values.to(dtype)


def _routing(shape: Shape, num_experts: int, routing: Routing, generator: torch.Generator) -> torch.Tensor:
    if routing == "none":
        return torch.full(shape, -1, dtype=torch.int64, device="cpu")
    if routing == "repeated":
        return _integers(0, num_experts, (shape[0], 1), generator).expand(shape).contiguous()
    if routing == "skewed":
        return torch.zeros(shape, dtype=torch.int64, device="cpu")
    ids = _integers(0, num_experts, shape, generator)
    return ids.masked_fill(_uniform(shape, generator) < 0.1, -1)


def _uniform(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def _integers(low: int, high: int, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int64, device="cpu")
