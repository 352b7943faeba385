"""The last steps of all ranks on one time line, in the format that chrome://tracing and ui.perfetto.dev read.

Every rank has a clock of its own. They are aligned by what the ranks have in common: a step's counts are exchanged by all, and
the last of them reaches everybody at nearly the same moment. A rank's offset is the median, over the steps that all ranks have
kept, of the time by which it saw that moment later than rank 0; the error is how far these times lie from their median. What the
error does not hold is the way of one packet: a rank that is always the last to come sees the moment so much earlier than the
others. With fewer than two steps in common nothing is known of the error. The clocks are left as they are if there is none.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from tokenferry.telemetry.snapshot import RoundRecord, Snapshot, StepRecord

MIN_STEPS: Final = 2
"""That all ranks must have kept for the error to be known."""


@dataclass(frozen=True)
class Alignment:
    """By how much each rank's clock is ahead of rank 0's.

    Attributes:
        error_ns: how far off that may be: the median distance of the steps' own offsets from it, on the rank where that is
            largest. Infinite where fewer than two steps tell.
        num_steps: that all ranks have kept.
    """

    offsets_ns: tuple[float, ...]
    error_ns: float
    num_steps: int


def align(snapshots: Sequence[Snapshot]) -> Alignment:
    """The clocks of ranks that took part in the same steps.

    Example:
        Rank 1 saw steps 1 and 2 begin at 1005 and 2007, rank 0 at 1000 and 2000: the offset is 6, the error 1.
    """
    met = [{step.step: step.met_ns for step in snapshot.steps} for snapshot in snapshots]
    common = sorted(set.intersection(*(set(steps) for steps in met))) if met else []
    offsets, errors = [], []
    for steps in met:
        differences = [steps[step] - met[0][step] for step in common]
        offset = statistics.median(differences) if differences else 0.0
        offsets.append(offset)
        if len(common) >= MIN_STEPS:
            errors.append(statistics.median(abs(difference - offset) for difference in differences))
    known = len(common) >= MIN_STEPS or len(met) < 2
    return Alignment(tuple(offsets), max(errors, default=0.0) if known else math.inf, len(common))


def trace_events(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """The trace as a document: a process a rank, in it a track of steps and one of waits for each source rank."""
    alignment = align(snapshots)
    begins = [
        step.begin_ns - offset
        for snapshot, offset in zip(snapshots, alignment.offsets_ns, strict=True)
        for step in snapshot.steps
    ]
    start_ns = min(begins, default=0.0)
    events: list[dict[str, Any]] = []
    for snapshot, offset in zip(snapshots, alignment.offsets_ns, strict=True):
        events.extend(_names(snapshot))
        for step, following in zip_longest(snapshot.steps, snapshot.steps[1:]):
            events.extend(_step_events(snapshot, step, following, start_ns + offset))
    note = {
        "clock_error_us": alignment.error_ns / 1e3 if math.isfinite(alignment.error_ns) else "unknown",
        "clock_offsets_us": [offset / 1e3 for offset in alignment.offsets_ns],
        "steps_in_common": alignment.num_steps,
    }
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": note}


def write_trace(path: str | Path, snapshots: Sequence[Snapshot]) -> float:
    """Writes `trace_events`. Returns the error of the clocks, in nanoseconds; infinite if it is unknown."""
    Path(path).write_text(json.dumps(trace_events(snapshots)), encoding="utf-8")
    return align(snapshots).error_ns


def _names(snapshot: Snapshot) -> Iterator[dict[str, Any]]:
    rank = snapshot.rank
    yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank} ({snapshot.transport})"}}
    for track in range(snapshot.size + 1):
        name = "steps and layers" if track == 0 else f"waits for rank {track - 1}"
        if track - 1 == rank:  # nobody waits for itself
            name = "waits for nobody in particular"
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": track, "args": {"name": name}}


def _step_events(snapshot: Snapshot, step: StepRecord, following: StepRecord | None, zero_ns: float) -> Iterator[dict[str, Any]]:
    """A step lasts until the next one begins, or until its last round."""
    ends = [round_.begin_ns + round_.length_ns for round_ in step.rounds]
    end_ns = following.begin_ns if following is not None and following.step == step.step + 1 else max(ends, default=step.met_ns)
    event = {"ph": "X", "pid": snapshot.rank, "cat": "tokenferry"}
    yield {**event, "tid": 0, "name": f"step {step.step}", **_span(step.begin_ns - zero_ns, end_ns - step.begin_ns)}
    yield from _wait_events(event, f"counts of step {step.step}", step.begin_ns - zero_ns, step.waits_ns)
    for round_, end in zip(step.rounds, ends, strict=True):
        name = f"{round_.phase}[{round_.layer}]"
        yield {**event, "tid": 0, "name": name, **_span(round_.begin_ns - zero_ns, end - round_.begin_ns)}
        waits = [round_.shared_ns if source == snapshot.rank else wait for source, wait in enumerate(round_.waits_ns)]
        yield from _wait_events(event, name, round_.begin_ns - zero_ns, waits)


def _wait_events(event: dict[str, Any], name: str, begin_ns: float, waits_ns: Sequence[int | None]) -> Iterator[dict[str, Any]]:
    for source, wait in enumerate(waits_ns):
        if wait:
            yield {**event, "tid": source + 1, "name": name, **_span(begin_ns, wait)}


def _span(begin_ns: float, length_ns: float) -> dict[str, float]:
    return {"ts": begin_ns / 1e3, "dur": max(0.0, length_ns) / 1e3}


__all__ = ["Alignment", "RoundRecord", "align", "trace_events", "write_trace"]
