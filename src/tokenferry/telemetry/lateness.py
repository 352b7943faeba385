"""Who keeps the others waiting, in one line: read from the waits for the steps' counts."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Final

from tokenferry.telemetry.snapshot import StepRecord, in_words

LATE_NS: Final = 50_000
"""A rank is late to a step if it was waited for longer than for any other by at least this much. Ranks that run evenly enter
within some microseconds of one another, or tens of them where their hosts launch eagerly."""
LATE_SHARE: Final = 0.02
"""And by at least this share of the median time from step to step: what costs less is not worth a look."""
CLEARLY_MORE: Final = 0.25
"""A rank is named if it was late in clearly more steps than its turn, which is one in `size`: by this part of the way from there
to all of them. Of two ranks that is 62.5 % of the steps, of eight 34 %."""
NOBODY: Final = "no rank stood out as late in the last {} steps"


def last_to_enter(steps: Sequence[StepRecord], rank: int, num_steps: int = 100) -> str:
    """One line on who keeps the others waiting, as rank `rank` saw the last `num_steps` steps; empty if there were none.

    A rank cannot see from its own waits by how much it was late itself, so that it never names itself.

    Example:
        "rank 3 was last to enter in 97 of the last 100 steps, by 4.1 ms"; "no rank stood out as late in the last 100 steps" where
        nobody was late as `LATE_NS`, `LATE_SHARE` and `CLEARLY_MORE` have it.
    """
    seen = [step for step in steps if any(wait is not None for wait in step.waits_ns)][-num_steps:]
    if not seen:
        return ""
    least_ns = max(LATE_NS, LATE_SHARE * _step_ns(seen))
    leads: dict[int, list[int]] = {}
    for step in seen:
        spans = sorted(((wait, source) for source, wait in enumerate(step.waits_ns) if wait is not None), reverse=True)
        longest, source = spans[0]
        lead = longest - (spans[1][0] if len(spans) > 1 else 0)
        if lead >= least_ns:
            leads.setdefault(source, []).append(lead)
    turn = 1 / len(seen[-1].waits_ns)
    often = len(seen) * (turn + CLEARLY_MORE * (1 - turn))
    named = [source for source, found in leads.items() if len(found) > often]
    if not named:
        return NOBODY.format(len(seen))
    worst = max(named, key=lambda source: (len(leads[source]), statistics.median(leads[source])))
    by = in_words(statistics.median(leads[worst]))
    return f"rank {worst} was last to enter in {len(leads[worst])} of the last {len(seen)} steps, by {by}"


def _step_ns(steps: Sequence[StepRecord]) -> float:
    """The median time from a step to the next; 0 of a single one."""
    pairs = itertools.pairwise(steps)
    spans = [following.begin_ns - step.begin_ns for step, following in pairs if following.step == step.step + 1]
    return statistics.median(spans) if spans else 0.0


__all__ = ["CLEARLY_MORE", "LATE_NS", "LATE_SHARE", "NOBODY", "last_to_enter"]
