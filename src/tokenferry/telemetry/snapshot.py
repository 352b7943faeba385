"""What telemetry has counted on one rank, as frozen objects that JSON can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, Final, Literal

from tokenferry.kernels.wait_board import (
    COMBINE,
    DISPATCH,
    FIRST_WAITS_WORD,
    NANOSECONDS_WORD,
    NUM_LAYERS,
    NUM_ROUND_STEPS,
    NUM_STEPS,
    STAMP_SHIFT,
    STEPS_WORD,
    TICKS_WORD,
    BoardLayout,
)

FORMAT: Final = 1
"""Of `Snapshot.to_dict`; raised when a field changes its meaning."""
TYPICAL_NS_PER_TICK: Final = 0.58
"""Of a GPU at 1.7 GHz, until a step has told."""
_STAMPS: Final = 1 << 16
_TICKS: Final = (1 << STAMP_SHIFT) - 1


@dataclass(frozen=True)
class Waits:
    """Nanoseconds that this rank waited, by source rank.

    Attributes:
        counts_ns: for the rank's count, at the start of a step.
        dispatch_ns, combine_ns: for the first packets of its rows or terms, or, where they come in bulk, for their first flag.
        shared_ns: within calls of a library that serves all peers at once, so that nobody can be told apart.
    """

    counts_ns: tuple[int, ...]
    dispatch_ns: tuple[int, ...]
    combine_ns: tuple[int, ...]
    shared_ns: int

    @property
    def total_ns(self) -> tuple[int, ...]:
        """By source rank, all phases."""
        return tuple(sum(phases) for phases in zip(self.counts_ns, self.dispatch_ns, self.combine_ns, strict=True))


@dataclass(frozen=True)
class RoundRecord:
    """One dispatch or combine.

    Attributes:
        begin_ns: when this rank began to wait, by its own clock.
        waits_ns: what it waited for each source; None where it waited for nothing, its own place among them.
        shared_ns: the same where a library serves all peers in one call, so that nobody can be told apart. None elsewhere.
    """

    layer: int
    phase: Literal["dispatch", "combine"]
    begin_ns: int
    waits_ns: tuple[int | None, ...]
    shared_ns: int | None = None

    @property
    def length_ns(self) -> int:
        """The longest of its waits."""
        return max((wait or 0 for wait in (*self.waits_ns, self.shared_ns)), default=0)


@dataclass(frozen=True)
class StepRecord:
    """One of the last steps: when it began by this rank's clock, its waits for counts, and its rounds if they are still kept."""

    step: int
    begin_ns: int
    waits_ns: tuple[int | None, ...]
    rounds: tuple[RoundRecord, ...]

    @property
    def met_ns(self) -> int:
        """When the last count had come, which is nearly the same moment on all ranks."""
        return self.begin_ns + max((wait or 0 for wait in self.waits_ns), default=0)


@dataclass(frozen=True)
class LayerRecord:
    """One layer's dispatches, and its waits by source rank."""

    layer: int
    num_rounds: int
    dispatch_ns: tuple[int, ...]
    combine_ns: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one rank has counted since its workspace was opened or last reset.

    Attributes:
        rank, size: of the group.
        transport: its name.
        is_on: whether it counted when this was taken.
        num_steps, num_rounds: that were begun; a round is a dispatch and its combine.
        rows, num_bytes: that dispatches brought from each source rank, this one's own rows included; bytes of hidden rows.
        num_term_bytes: that combines bring from each source rank: a term for each row of this rank, its own terms included. Where
            they are added up on the way (`combine_order="any"`), fewer arrive. None in what was written before this was known.
        waits: see `Waits`.
        layers: of those that had a round.
        loads: `[layer][expert]` rows that came for each of this rank's experts, 0 for the others'; without padding and ids of -1.
            `loads_of` adds the ranks up.
        steps: the last ones, the oldest first.
        tokens: the step and this rank's rows in it, of the last steps that were begun by a call: those of replayed graphs are not
            among them.
    """

    rank: int
    size: int
    transport: str
    is_on: bool
    num_steps: int
    num_rounds: int
    rows: tuple[int, ...]
    num_bytes: tuple[int, ...]
    waits: Waits
    layers: tuple[LayerRecord, ...]
    loads: tuple[tuple[int, ...], ...]
    steps: tuple[StepRecord, ...]
    tokens: tuple[tuple[int, int], ...]
    num_term_bytes: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; `from_dict` takes it back."""
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_dict(told: dict[str, Any]) -> Snapshot:
        """The inverse of `to_dict`, also of what came through JSON, and of what an older version has written."""
        told = {name: value for name, value in told.items() if name != "format"}
        steps = [
            StepRecord(
                step["step"],
                step["begin_ns"],
                tuple(step["waits_ns"]),
                tuple(RoundRecord(**{**each, "waits_ns": tuple(each["waits_ns"])}) for each in step["rounds"]),
            )
            for step in told.pop("steps")
        ]
        layers = [
            LayerRecord(each["layer"], each["num_rounds"], tuple(each["dispatch_ns"]), tuple(each["combine_ns"]))
            for each in told.pop("layers")
        ]
        spans = told.pop("waits")
        waits = Waits(tuple(spans["counts_ns"]), tuple(spans["dispatch_ns"]), tuple(spans["combine_ns"]), int(spans["shared_ns"]))
        rows, num_bytes, of_terms = tuple(told.pop("rows")), tuple(told.pop("num_bytes")), told.pop("num_term_bytes", None)
        loads = tuple(tuple(row) for row in told.pop("loads"))
        tokens = tuple((step, number) for step, number in told.pop("tokens"))
        return Snapshot(
            **told,
            rows=rows,
            num_bytes=num_bytes,
            num_term_bytes=None if of_terms is None else tuple(of_terms),
            waits=waits,
            layers=tuple(layers),
            loads=loads,
            steps=tuple(steps),
            tokens=tokens,
        )


def snapshot_of(
    words: Sequence[int],
    loads: Sequence[Sequence[int]],
    *,
    rank: int,
    size: int,
    transport: str,
    is_on: bool,
    row_bytes: int,
    term_bytes: int,
    tokens: tuple[tuple[int, int], ...] = (),
) -> Snapshot:
    """Reads a board. `loads` has a row for every layer that the board could have. Terms have no counter of their own: each source
    sends one for every row that this rank has brought, in each round."""
    board = _Board(words, size, rank)
    layers = [layer for layer in (board.layer(number) for number in range(NUM_LAYERS)) if layer is not None]
    num_layers = max((layer.layer + 1 for layer in layers), default=0)
    rows = tuple(words[board.layout.rows + source] for source in range(size))
    totals = {
        phase: tuple(sum(spans) for spans in zip(*(getattr(layer, phase) for layer in layers), strict=True)) or (0,) * size
        for phase in ("dispatch_ns", "combine_ns")
    }
    counts = board.spans(FIRST_WAITS_WORD)
    shared = board.shared_ns()
    return Snapshot(
        rank=rank,
        size=size,
        transport=transport,
        is_on=is_on,
        num_steps=words[STEPS_WORD],
        num_rounds=sum(layer.num_rounds for layer in layers),
        rows=rows,
        num_bytes=tuple(number * row_bytes for number in rows),
        num_term_bytes=(rows[rank] * term_bytes,) * size,
        waits=Waits(counts, totals["dispatch_ns"], totals["combine_ns"], shared),
        layers=tuple(layers),
        loads=tuple(tuple(row) for row in loads[:num_layers]),
        steps=board.steps(),
        tokens=tokens,
    )


class _Board:
    """A board's words by what they mean, in nanoseconds. A rank's own place holds what could not be told apart by peer."""

    def __init__(self, words: Sequence[int], size: int, rank: int) -> None:
        self._words, self.layout, self._size, self._rank = words, BoardLayout(size), size, rank
        ticks, nanoseconds = words[TICKS_WORD], words[NANOSECONDS_WORD]
        self._ns_per_tick = nanoseconds / ticks if ticks > 0 and nanoseconds > 0 else TYPICAL_NS_PER_TICK

    def _ns(self, ticks: int) -> int:
        return round(ticks * self._ns_per_tick)

    def spans(self, first: int) -> tuple[int, ...]:
        """Of all sources."""
        return tuple(0 if source == self._rank else self._ns(self._words[first + source]) for source in range(self._size))

    def shared_ns(self) -> int:
        """Of all phases and layers, counts included."""
        first = self.layout.layer_waits + self._rank
        of_layers = sum(self._words[first + place * self._size] for place in range(2 * NUM_LAYERS))
        return self._ns(of_layers + self._words[FIRST_WAITS_WORD + self._rank])

    def layer(self, number: int) -> LayerRecord | None:
        """None for one that had no round."""
        num_rounds = self._words[self.layout.rounds + number]
        if not num_rounds:
            return None
        first = self.layout.layer_waits + 2 * number * self._size
        return LayerRecord(number, num_rounds, self.spans(first + DISPATCH), self.spans(first + COMBINE * self._size))

    def stamped(self, first: int, step: int) -> tuple[int | None, ...]:
        """The kept waits of `step` for each peer; None where the word is of an older one."""
        kept = (None if source == self._rank else self._kept(first + source, step) for source in range(self._size))
        return tuple(kept)

    def _kept(self, place: int, step: int) -> int | None:
        word = self._words[place] % (1 << 64)
        return self._ns(word & _TICKS) if word >> STAMP_SHIFT == step % _STAMPS else None

    def steps(self) -> tuple[StepRecord, ...]:
        """The last ones, the oldest first."""
        entry = 2 + self._size
        firsts = [self.layout.steps + slot * entry for slot in range(NUM_STEPS)]
        known = sorted((self._words[first], first) for first in firsts if self._words[first])
        newest = known[-1][0] if known else 0
        return tuple(
            StepRecord(
                step,
                self._words[first + 1],
                self.stamped(first + 2, step),
                self._rounds(step) if newest - step < NUM_ROUND_STEPS else (),
            )
            for step, first in known
            if newest - step < NUM_STEPS
        )

    def _rounds(self, step: int) -> tuple[RoundRecord, ...]:
        entry = 1 + self._size
        first = self.layout.round_log + step % NUM_ROUND_STEPS * 2 * NUM_LAYERS * entry
        rounds = []
        for place in range(2 * NUM_LAYERS):
            words = first + place * entry
            begin_ns = self._words[words]
            if not begin_ns:
                continue
            waits, shared = self.stamped(words + 1, step), self._kept(words + 1 + self._rank, step)
            if any(wait is not None for wait in (*waits, shared)):
                phase: Literal["dispatch", "combine"] = "combine" if place % 2 == COMBINE else "dispatch"
                rounds.append(RoundRecord(place // 2, phase, begin_ns, waits, shared))
        return tuple(rounds)


def loads_of(snapshots: Sequence[Snapshot]) -> tuple[tuple[int, ...], ...]:
    """`[layer][expert]` rows that came for each of the model's experts, of all ranks' snapshots. A rank that was read amid its
    first step may lack the later layers: it had no rows in them yet, and those of the other ranks are kept.

    Example:
        Rank 0 has counted [[5, 0]] and rank 1 [[0, 7]], each its own expert: [[5, 7]].
    """
    layers = zip_longest(*(snapshot.loads for snapshot in snapshots))
    return tuple(tuple(map(sum, zip(*(row for row in rows if row is not None), strict=True))) for rows in layers)


def in_words(nanoseconds: float) -> str:
    """A span as a person reads it.

    Example:
        in_words(4_100_000) == "4.1 ms"
    """
    for unit, length in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if nanoseconds >= length:
            return f"{nanoseconds / length:.1f} {unit}"
    return f"{nanoseconds:.0f} ns"
