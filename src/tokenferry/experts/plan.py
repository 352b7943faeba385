"""How the grouped products are cut into tiles. Chosen from shapes, dtype and settings alone; which of the two cuts serves an
expert is decided on the device, by its number of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One launch of the grouped product.

    Attributes:
        low, high: it serves experts with low < rows <= high; high 0: no upper limit.
        rows_few: an expert with at most so many rows gets tiles of so many (0: never).
        rows, columns, depth: of a tile; `columns` are of the output, so a gated product reads twice as many.
        num_warps, num_stages: of a program, and of its pipeline.
        programs_per_sm: the launch has at most so many times the SMs; the tiles go round.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    rows_few: int = 0
    low: int = 0
    high: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The launches of the first and of the second product, in order."""

    up: tuple[Tiles, ...]
    down: tuple[Tiles, ...]


FEW_ROWS = 64
"""Experts with at most so many rows are bound by reading their weights: small tiles, so that all SMs read."""


def plan(dtype: torch.dtype, gated: bool, batch_invariant: bool, scaled: bool, max_rows: int | None) -> Plan:
    """The cut for one configuration.

    Args:
        dtype: of the rows.
        gated: whether the first product has a gate.
        batch_invariant: one cut for every number of rows, so that a row's bits do not depend on it.
        scaled: float8 weights with block scales.
        max_rows: most rows that an expert can get (C·EP), None if unknown.
    """
    halves = 2 if gated else 1
    if dtype == torch.float32:  # no tensor cores: meant for checks
        tiles = Tiles(rows=32, columns=64 // halves, depth=32, num_warps=4, num_stages=2, programs_per_sm=4)
        return Plan(up=(tiles,), down=(tiles,))
    if batch_invariant:
        up = Tiles(rows=64, columns=128 // halves, depth=128, num_warps=4, num_stages=3, programs_per_sm=4)
        down = Tiles(rows=64, columns=128, depth=128, num_warps=4, num_stages=3, programs_per_sm=4)
        return Plan(up=(up,), down=(down,))
    high = 0 if max_rows is not None and max_rows <= FEW_ROWS else FEW_ROWS
    few_up = Tiles(
        rows=64, rows_few=16, columns=64 // halves, depth=128, num_warps=4, num_stages=4, programs_per_sm=16, high=high
    )
    few_down = Tiles(rows=64, rows_few=16, columns=64, depth=128, num_warps=4, num_stages=4, programs_per_sm=16, high=high)
    if not high:
        return Plan(up=(few_up,), down=(few_down,))
    depth, stages = (128, 3) if scaled else (64, 4)
    many_up = Tiles(rows=128, columns=256 // halves, depth=depth, num_warps=8, num_stages=stages, programs_per_sm=1, low=FEW_ROWS)
    many_down = Tiles(rows=128, columns=256, depth=depth, num_warps=8, num_stages=stages, programs_per_sm=1, low=FEW_ROWS)
    return Plan(up=(few_up, many_up), down=(few_down, many_down))
