"""A verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenferry.placement.options import KindVerdict, Option

LEAST_GAIN: Final = 0.03
"""A gain below this share of a step is not worth a change: predictions of this kind are no better than that."""


def sentence_of(options: Sequence[Option], best: Option, bound_by_weights: float, *, num_rows: float) -> str:
    """Whether it pays over all steps, and why, or why not."""
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
        return (
            f"Balancing would not pay: in {bound_by_weights:.0%} of the layers the slowest rank is bound by the bytes of its "
            "experts' weights, which moving rows does not change and replicas only add to."
        )
    if best is as_is or best.gain <= 0:
        return (
            f"Balancing would not pay: the fullest rank has {as_is.imbalance:.2f} times the mean, and no placement does better."
        )
    return (
        f"Balancing would not pay: {times} (predicted), a gain of {best.gain:.1%}, below the {LEAST_GAIN:.0%} that are worth it."
    )


def by_kind(found: Sequence[KindVerdict]) -> str:
    """The same for each kind of steps.

    Example:
        "By the rows of a step: 1 to 3 rows (60 steps), no, bound by weights; 256 to 1023 rows (2 steps), yes, 12% less."
    """
    told = []
    for each in found:
        steps = f"{each.kind.num_steps:.0f} step{'' if each.kind.num_steps == 1 else 's'}"
        if each.pays:
            answer = f"yes, {each.gain:.0%} less"
        elif each.bound_by_weights >= 0.5:
            answer = "no, bound by weights"
        else:
            answer = f"no, {max(0.0, each.gain):.1%} less"
        told.append(f"{each.kind.name} ({steps}), {answer}")
    return f"By the rows of a step: {'; '.join(told)}."
