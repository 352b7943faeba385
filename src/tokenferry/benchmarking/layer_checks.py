"""What a layer's figures and results are held against: the least that its experts could take, and plain float32 products."""

from __future__ import annotations

from typing import Final

import torch

from tokenferry.benchmarking.layer_model import POSITIONS, LayerModel
from tokenferry.benchmarking.timing import MEETING_TIMEOUT_S, GroupTimer
from tokenferry.experts import float8

SAMPLES: Final = 2
"""Rows of each rank that are computed again."""
TOLERANCE: Final = 4e-2
"""Of the largest expected number: what bfloat16 rounding in several places may come to."""
FLOAT8_TERMS_TOLERANCE: Final = TOLERANCE + 2**-4
"""Where the terms travel in float8: with three bits behind the leading one, a rounded term is off by up to 1/16 of itself."""


def experts_floor(timer: GroupTimer, model: LayerModel, count: int, rates: dict[str, float]) -> dict[str, float]:
    """The work of this rank's experts and shared expert, the mean over the positions, and the least time it can take.

    Returns:
        `touched_mb`, `gflop` and `experts_floor_us` = max(bytes of touched weights / read bandwidth, FLOP / GEMM rate), of each
        the largest of all ranks. The rates are those of `device_rates`.
    """
    preset, local_range = model.preset, model.experts.expert_range
    everyone = [model.rows(rank, count) for rank in range(model.group.size)]
    num_touched = num_pairs = 0
    for position in range(POSITIONS):
        idx = model.router(torch.cat([rows[position] for rows in everyone]))[1]
        local = idx[(idx >= local_range.start) & (idx < local_range.stop)]
        num_touched += local.unique().numel()
        num_pairs += local.numel()
    expert_size = 3 * preset.hidden_size * preset.intermediate_size
    shared_size = 3 * preset.hidden_size * preset.shared_size
    num_bytes = model.bytes_per_weight * expert_size * num_touched / POSITIONS + 2 * shared_size
    flop = 2 * (expert_size * num_pairs / POSITIONS + shared_size * count)
    floor_us = max(num_bytes / rates["read_gb_per_s"] / 1e3, flop / rates["gemm_tflops"] / 1e6)
    return {
        "touched_mb": round(timer.slowest(num_bytes / 1e6), 1),
        "gflop": round(timer.slowest(flop / 1e9), 3),
        "experts_floor_us": timer.slowest(floor_us),
    }


@torch.no_grad()
def expected_rows(model: LayerModel, count: int) -> torch.Tensor:
    """[samples, H] float32: the first rows of this rank's last position.

    Every rank computes its own experts' terms of all ranks' sampled rows, and they are exchanged. Collective.
    """
    group, samples = model.group, min(SAMPLES, count)
    terms = []
    for rank in range(group.size):
        hidden = model.rows(rank, count)[-1][:samples]
        weights, idx = model.router(hidden)
        terms.append(torch.stack([_term(model, *row) for row in zip(hidden, weights, idx, strict=True)]).tolist())
    everyone = group.channel.exchange(group.unique_name("bench/expected"), terms, MEETING_TIMEOUT_S)
    total = torch.tensor([sent[group.rank] for sent in everyone], dtype=torch.float32, device=model.device).sum(0)
    if model.shared is not None:
        total = total + model.shared(model.rows(group.rank, count)[-1][:samples]).float()
    return total


def _term(model: LayerModel, row: torch.Tensor, weights: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """The weighted sum over this rank's experts for one row."""
    experts = model.experts if model.float8 else model.bfloat16_experts
    local_range = experts.expert_range
    total = torch.zeros(len(row), dtype=torch.float32, device=model.device)
    for weight, expert in zip(weights.tolist(), idx.tolist(), strict=True):
        if expert not in local_range:
            continue
        local = expert - local_range.start
        up = _product(row, experts.up_proj[local], experts.up_scale, local)
        up = up if experts.up_bias is None else up + experts.up_bias[local].float()
        activated = experts.config.activation(up).to(row.dtype)
        down = _product(activated, experts.down_proj[local], experts.down_scale, local)
        total += weight * (down if experts.down_bias is None else down + experts.down_bias[local].float())
    return total


def _product(row: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor | None, local: int) -> torch.Tensor:
    """In float32; of what float8 weights, and rows quantized for them, stand for."""
    if scales is None:
        return matrix.float() @ row.float()
    return float8.dequantize(matrix, scales[local]) @ float8.rounded_rows(row[None])[0]


def is_right(timer: GroupTimer, outputs: list[torch.Tensor], expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether every rank's sampled rows are within the tolerance; a NaN is not. Collective."""
    got = outputs[-1][: len(expected)].float()
    worst = float((got - expected).abs().max() / expected.abs().max()) if len(expected) else 0.0
    return timer.slowest(0.0 if worst < tolerance else 1.0) == 0.0
