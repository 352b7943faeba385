"""Where telemetry's words lie, on the device and on the host alike. Without Triton.

A board is one array of int64 words of one rank. Kernels of a workspace with telemetry write to the one in device memory, whose
address stands in the rank's counters; hosts whose transport has no such kernels write to a list of their own. Spans are in ticks:
cycles of the SM's clock in kernels, of which words 1 and 2 say how long they are, nanoseconds elsewhere.

Legend: s source rank, l layer, p phase (0 dispatch, 1 combine).
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_LAYERS = 128
"""Layers that have words of their own. Those beyond share the last one's."""
NUM_STEPS = 128
"""Steps whose waits for counts are kept."""
NUM_ROUND_STEPS = 16
"""Steps whose dispatches and combines are kept one by one."""
STAMP_SHIFT = 48
"""The upper 16 bits of a kept wait are those of its step's number, so that no word need be cleared; 48 bits hold two days of
cycles."""

STEPS_WORD = 0
"""Steps that were begun."""
TICKS_WORD = 1
NANOSECONDS_WORD = 2
"""The same spans by both clocks: their ratio is the length of a tick."""
FIRST_WAITS_WORD = 4
"""Of the waits for counts, by source."""
DISPATCH, COMBINE = 0, 1


@dataclass(frozen=True)
class BoardLayout:
    """The numbers of a board's words, for a group of `size` ranks."""

    size: int

    @property
    def rows(self) -> int:
        """+ s: rows that dispatches brought."""
        return FIRST_WAITS_WORD + self.size

    @property
    def rounds(self) -> int:
        """+ l: dispatches."""
        return self.rows + self.size

    @property
    def layer_waits(self) -> int:
        """+ (2 l + p) size + s: waits for rows."""
        return self.rounds + NUM_LAYERS

    @property
    def steps(self) -> int:
        """+ (step mod NUM_STEPS) (2 + size): the step, when it began by the global clock, and the stamped waits by source."""
        return self.layer_waits + 2 * NUM_LAYERS * self.size

    @property
    def round_log(self) -> int:
        """+ ((step mod NUM_ROUND_STEPS) 2 NUM_LAYERS + 2 l + p) (1 + size): when the first rows were looked for, by the global
        clock, and the stamped waits by source."""
        return self.steps + NUM_STEPS * (2 + self.size)

    @property
    def num_words(self) -> int:
        """Of the board."""
        return self.round_log + NUM_ROUND_STEPS * 2 * NUM_LAYERS * (1 + self.size)
