"""The steps of a run by how many rows they had: decode steps have few, prefills many."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from tokenferry.placement import StepKind
from tokenferry.telemetry import Snapshot
from tokenferry.telemetry.recorder import NUM_TOKEN_STEPS

LEAST_KNOWN: Final = 0.9
"""The share of the steps that could be known of which the rows must be: fewer, and those that are known are a kind by themselves,
as the calls between replayed graphs."""


def kinds_of(snapshots: Sequence[Snapshot]) -> tuple[StepKind, ...]:
    """The steps by the rows of all ranks together, few rows first; a kind goes from a power of four to the next.

    Empty if of too many steps the rows are not known.

    Example:
        Two ranks with 100 and 50 rows in step 1, and 1 and 1 in steps 2 to 9: a step of 64 to 255 rows, and 8 of 1 to 3.
    """
    tokens = [dict(snapshot.tokens) for snapshot in snapshots]
    common = set.intersection(*(set(of_rank) for of_rank in tokens))
    num_steps = min(snapshot.num_steps for snapshot in snapshots)
    if len(common) < LEAST_KNOWN * min(num_steps, NUM_TOKEN_STEPS):
        return ()
    found: dict[int, list[int]] = {}
    for step in common:
        num_rows = sum(of_rank[step] for of_rank in tokens)
        found.setdefault((num_rows.bit_length() - 1) // 2, []).append(num_rows)  # -1 for a step without rows
    return tuple(
        StepKind(name=_name(power), num_steps=len(rows), rows=statistics.fmean(rows)) for power, rows in sorted(found.items())
    )


def _name(power: int) -> str:
    return "0 rows" if power < 0 else f"{4**power} to {4 ** (power + 1) - 1} rows"
