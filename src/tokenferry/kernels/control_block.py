"""What the host and the kernels agree on: the control block of a rank's buffer, abort records, and sizes. Without Triton.

The control block is the first `CONTROL_BYTES` bytes of every rank's symmetric buffer. Names that end in `_OFFSET` are offsets in
bytes: from the buffer's first byte, or, for `STEP_OFFSET` to `NUM_REAL_OFFSET`, from the first byte of a rank's counters.
"""

from __future__ import annotations

from dataclasses import dataclass

CONTROL_BYTES = 256
SPARE_BYTES = 32
"""The last bytes of the control block. No kernel uses them, and debug mode watches them like the gaps behind the regions."""

RECORD_OFFSET = 0
"""int64: the abort record, 0 while there is none. Peers write it, and the next word; no other word of the control block."""
SIGNS_OFFSET = 8
"""int64: how many signs of life busy peers have given, whichever of them. It is read with the record, in one load."""
MIRROR_OFFSET = 16
"""int64: address of a word in the host's memory that gets a copy of the abort record, or 0."""
OBSERVER_OFFSET = 24
"""int64: `id()` of the observer; the interpreter alone reads it."""
PEER_TABLE_OFFSET = 32
"""int64: address of the table with the addresses of all ranks' buffers."""
GROUP_SIZE_OFFSET = 40
"""int32: ranks of the group, and so entries of that table."""
DIRTY_ROWS_OFFSET = 44
"""int32: the gathered rows from this one on have id -1 already."""
LIMITS_OFFSET = 48
"""int64: in the lower half the time-out in ticks (see `limits`), after which a kernel stops waiting unless there was a sign of
life; in the upper half the ticks after which it stops in any case."""

COUNTERS_OFFSET = 128
"""This rank's counters of steps and rounds, in a cache line of their own."""
SOLO_COUNTERS_OFFSET = 192
"""The same for `solo`, whose steps and rounds are counted apart."""
STEP_OFFSET = 0
"""int32: the number of the step, which is the epoch of its count packets."""
ROUND_OFFSET = 8
"""int64: upper half: bulk rounds (a dispatch and its combine) that are done; lower half: tickets taken in the one under way."""
NUM_REAL_OFFSET = 16
"""int32: `num_real_tokens` of the step, where the host knows it."""
BOARD_OFFSET = 24
"""int64: address of the rank's telemetry board (see `wait_board`), 0 while nothing is counted. Kernels without telemetry do not
read it, and those of `solo` find 0."""

MODE_SEND = 1
MODE_RECEIVE = 2
MODE_BOTH = MODE_SEND | MODE_RECEIVE
"""What one launch of dispatch or combine does."""

SENTINEL = 0xFFFFFFFF
"""What a word of a slot reads as until a payload word has arrived."""
ESCAPED_SENTINEL = 0xFFFFFFFE
"""How a payload word with the sentinel's bits travels."""

COUNT_PACKET_BYTES = 16
COUNT_PACKET_STEP_OFFSET = 8
"""int32 within a count packet (num_tokens, flags, step, generation): the step."""
FLAG_BYTES = 8

MAX_RANKS = 256
"""An abort record names a rank in 8 bits, and one program waits for all peers at once, with a thread for each."""
MAX_LAYERS = (1 << 16) - 1
"""Dispatchers of a workspace: an abort record has 16 bits for the layer, and one of their values stands for no layer."""
NUM_RECORD_STEPS = 1 << 24
"""An abort record has 24 bits for the step."""

TICK_SHIFT = 20
"""Kernels measure their waits in ticks of 2**20 nanoseconds: 32 bits hold 52 days of them."""

PHASES = ("failed", "not-entered", "data-missing", "counts-disagree", "too-few-rows")
"""What the blamed rank did, by its number in an abort record."""
NOT_ENTERED = PHASES.index("not-entered")
DATA_MISSING = PHASES.index("data-missing")
COUNTS_DISAGREE = PHASES.index("counts-disagree")
TOO_FEW_ROWS = PHASES.index("too-few-rows")
"""Its combine was given fewer partial rows than there are tokens. It blames itself."""

LAYER_SHIFT = 24
RANK_SHIFT = 40
REPORTER_SHIFT = 48
PHASE_SHIFT = 56
VALID_RECORD = 1 << 62
"""Set in every abort record, which is therefore never 0."""


def limits(timeout_s: float, longest_wait_s: float) -> int:
    """The word at `LIMITS_OFFSET`. Both are rounded up, by up to two ticks: a wait may begin just before a tick.

    Example:
        limits(1.0, 2.0) == 955 | 1909 << 32
    """
    ticks = [int(seconds * 1e9) // (1 << TICK_SHIFT) + 2 for seconds in (timeout_s, max(timeout_s, longest_wait_s))]
    return ticks[0] | ticks[1] << 32


@dataclass(frozen=True)
class Record:
    """An abort record: rank `reporter` blames rank `rank`. It is one 64-bit word, so that it is always written whole.

    Bits, from the lowest: step 24, layer + 1 16, rank 8, reporter 8, phase 3, three unused, one that is always set.
    """

    rank: int
    reporter: int
    phase: str
    step: int
    layer: int

    def pack(self) -> int:
        """The word. Steps are kept modulo 2**24.

        Example:
            Record(rank=1, reporter=0, phase="data-missing", step=7, layer=-1).pack() == 0x4200010000000007
        """
        fields = self.step % NUM_RECORD_STEPS | (self.layer + 1) << LAYER_SHIFT | self.rank << RANK_SHIFT
        return fields | self.reporter << REPORTER_SHIFT | PHASES.index(self.phase) << PHASE_SHIFT | VALID_RECORD

    @staticmethod
    def unpack(word: int) -> Record:
        """The inverse of `pack`."""
        return Record(
            rank=word >> RANK_SHIFT & 0xFF,
            reporter=word >> REPORTER_SHIFT & 0xFF,
            phase=PHASES[word >> PHASE_SHIFT & 7],
            step=word % NUM_RECORD_STEPS,
            layer=(word >> LAYER_SHIFT & 0xFFFF) - 1,
        )

    def step_near(self, step: int) -> int:
        """The whole number of the step, of which the word has the lower 24 bits: the one nearest to `step`, the reader's own.

        Example:
            A record of step 3, read by a rank in step 2**24 - 1, is of step 2**24 + 3.
        """
        half = NUM_RECORD_STEPS // 2
        return max(0, step + (self.step - step + half) % NUM_RECORD_STEPS - half)
