"""A verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenferry.placement.layout import Placement
from tokenferry.placement.options import KindVerdict, Option

LEAST_GAIN: Final = 0.03
"""A gain below this share of a step is not worth a change: predictions of this kind are no better than that."""


FEW_TOUCHED: Final = 0.9
"""The share of a rank's experts that get a row in a step, below which it is chance which do."""


def sentence_of(options: Sequence[Option], best: Option, bound_by_weights: float, touched: float, *, num_rows: float) -> str:
    """Whether it pays over all steps, and why, or why not. `touched`: see `KindVerdict`."""
    as_is = options[0]
    if not num_rows:
        return "No expert got a row: there is nothing to balance."
    if as_is.placement.num_ranks == 1:
        return "One rank holds every expert: there is nothing to balance."
    times = f"{as_is.step_s * 1e3:.3f} ms a step as it is, {best.step_s * 1e3:.3f} ms {best.name}"
    if best.gain >= LEAST_GAIN:
        memory = f", for {best.extra_bytes / 2**30:.2f} GiB of weights more on each rank" if best.extra_bytes else ""
        return f"Balancing would pay: {times} (predicted), {best.gain:.0%} less{memory}."
    if bound_by_weights >= 0.5:
        held = _held(as_is.placement)
        bound = f"in {bound_by_weights:.0%} of the layers the slowest rank is bound by the bytes of its experts' weights"
        why = "which moving rows does not change and replicas only add to."
        if touched < FEW_TOUCHED * held:
            why = (
                f"of which it reads those of {touched:.1f} of {held} experts in the mean step: the others get no row. Which do, "
                "and on which rank the most, is chance, which no placement evens out."
            )
        return f"Balancing would not pay: {bound}, {why}"
    if best is as_is or best.gain <= 0:
        return (
            f"Balancing would not pay: the fullest rank has {as_is.imbalance:.2f} times the mean, and no placement does better."
        )
    return (
        f"Balancing would not pay: {times} (predicted), a gain of {best.gain:.1%}, below the {LEAST_GAIN:.0%} that are worth it."
    )


def by_kind(found: Sequence[KindVerdict], as_is: Placement) -> str:
    """The same for each kind of steps.

    Example:
        "By the rows of a step: 1 to 3 rows (60 steps), no, bound by weights, of 2.7 of 16 experts; 256 to 1023 rows (2 steps),
        yes, 12% less."
    """
    told = []
    for each in found:
        steps = f"{each.kind.num_steps:.0f} step{'' if each.kind.num_steps == 1 else 's'}"
        if each.pays:
            answer = f"yes, {each.gain:.0%} less"
        elif each.bound_by_weights >= 0.5:
            held = _held(as_is)
            answer = "no, bound by weights"
            if each.touched < FEW_TOUCHED * held:
                answer += f", of {each.touched:.1f} of {held} experts"
        else:
            answer = f"no, {max(0.0, each.gain):.1%} less"
        told.append(f"{each.kind.name} ({steps}), {answer}")
    return f"By the rows of a step: {'; '.join(told)}."


def _held(placement: Placement) -> int:
    """The most places of a rank."""
    return -(-placement.num_physical // placement.num_ranks)
