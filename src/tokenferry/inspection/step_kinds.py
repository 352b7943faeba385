"""The steps of a run by how many rows they had: decode steps have few, prefills many."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from tokenferry.placement import StepKind
from tokenferry.telemetry import Snapshot
from tokenferry.telemetry.recorder import NUM_TOKEN_STEPS

LEAST_KNOWN: Final = 0.9
"""The share of the steps that could be known of which the rows must be: fewer, and the others were replayed graphs."""


def kinds_of(snapshots: Sequence[Snapshot]) -> tuple[StepKind, ...]:
    """The steps by the rows of all ranks together, few rows first; a kind goes from a power of four to the next. Replayed steps,
    whose rows no host has seen, are one kind: they have the rows that the others leave of all rows that came.

    Empty where that cannot be told.

    Example:
        Two ranks with 100 and 50 rows in step 1, and 1 and 1 in steps 2 to 9: a step of 64 to 255 rows, and 8 of 1 to 3.
    """
    tokens = [dict(snapshot.tokens) for snapshot in snapshots]
    common = set.intersection(*(set(of_rank) for of_rank in tokens))
    known = [sum(of_rank[step] for of_rank in tokens) for step in common]
    found: dict[int, list[int]] = {}
    for num_rows in known:
        found.setdefault((num_rows.bit_length() - 1) // 2, []).append(num_rows)  # -1 for a step without rows
    kinds = [StepKind(name=_name(power), num_steps=len(rows), rows=statistics.fmean(rows)) for power, rows in found.items()]
    num_steps = min(snapshot.num_steps for snapshot in snapshots)
    if len(known) < LEAST_KNOWN * min(num_steps, NUM_TOKEN_STEPS):
        replayed = _replayed(snapshots, known, num_steps)
        if replayed is None:
            return ()
        kinds.append(replayed)
    return tuple(sorted(kinds, key=lambda kind: kind.rows))


def _replayed(snapshots: Sequence[Snapshot], known: Sequence[int], num_steps: int) -> StepKind | None:
    """The steps that are not known. None if steps have fallen out of what is kept, or the rows do not add up."""
    first, num_others = snapshots[0], num_steps - len(known)
    if any(len(snapshot.tokens) >= NUM_TOKEN_STEPS for snapshot in snapshots) or not first.num_rounds:
        return None
    rows_of_all_steps = sum(first.rows) * first.num_steps / first.num_rounds  # each round of a step brings the step's rows again
    rows = (rows_of_all_steps - sum(known)) / num_others
    return None if rows < 0 else StepKind(name=f"replayed graphs, {rows:.0f} rows in the mean", num_steps=num_others, rows=rows)


def _name(power: int) -> str:
    return "0 rows" if power < 0 else f"{4**power} to {4 ** (power + 1) - 1} rows"
