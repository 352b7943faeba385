"""Telemetry in kernels: what a rank waits for, written to its board. Compiled out unless a workspace is opened with telemetry.

One program notes the wait for a source: the one that looks for its first packets or, in bulk rounds, for its first flag. So a
round costs one addition a source, whatever the grid. Shape of the board: see `wait_board`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wait_board, wire, wire_clock
from tokenferry.kernels.control_block import BOARD_OFFSET as _BOARD_OFFSET

BOARD_OFFSET: tl.constexpr = tl.constexpr(_BOARD_OFFSET)
DISPATCH: tl.constexpr = tl.constexpr(wait_board.DISPATCH)
COMBINE: tl.constexpr = tl.constexpr(wait_board.COMBINE)
_NUM_LAYERS: tl.constexpr = tl.constexpr(wait_board.NUM_LAYERS)
_NUM_STEPS: tl.constexpr = tl.constexpr(wait_board.NUM_STEPS)
_NUM_ROUND_STEPS: tl.constexpr = tl.constexpr(wait_board.NUM_ROUND_STEPS)
_STAMP_SHIFT: tl.constexpr = tl.constexpr(wait_board.STAMP_SHIFT)
_FIRST_WAITS: tl.constexpr = tl.constexpr(wait_board.FIRST_WAITS_WORD)


@triton.jit
def find_board(counters_ptr):
    """The board's address, 0 while nothing is counted."""
    return tl.load(wire.field(counters_ptr, BOARD_OFFSET, tl.int64))


@triton.jit
def stamp_of(step):
    """The upper 16 bits of a kept wait."""
    return (step & 0xFFFF).to(tl.int64) << _STAMP_SHIFT


@triton.jit
def places(board, size, layer, step, PHASE: tl.constexpr):
    """Addresses of a round's words: the layer's waits by source, and the kept round, of which the first word is its beginning."""
    slot = tl.minimum(layer, _NUM_LAYERS - 1) * 2 + PHASE
    totals = _FIRST_WAITS + 2 * size + _NUM_LAYERS
    log = totals + 2 * _NUM_LAYERS * size + _NUM_STEPS * (2 + size)
    kept = log + (step % _NUM_ROUND_STEPS * (2 * _NUM_LAYERS) + slot) * (1 + size)
    return board + (totals + slot * size).to(tl.int64) * 8, board + kept.to(tl.int64) * 8


@triton.jit
def begin_round(board, step_counts, size, layer, step, lanes, is_noted, PHASE: tl.constexpr):
    """Notes when this rank begins to look for a round's rows and, for a dispatch, that it is one and how many rows it brings.
    `is_noted` holds in one program."""
    if is_noted & (board != 0):
        _, kept = places(board, size, layer, step, PHASE)
        tl.store(kept.to(tl.pointer_type(tl.int64)), wire_clock.global_clock())
        if PHASE == 0:
            words = board.to(tl.pointer_type(tl.int64))
            num_rows = tl.load(step_counts + 2 + lanes, mask=lanes < size, other=0).to(tl.int64)
            tl.atomic_add(words + (_FIRST_WAITS + size) + lanes, num_rows, mask=lanes < size, sem="relaxed")
            tl.atomic_add(words + (_FIRST_WAITS + 2 * size) + tl.minimum(layer, _NUM_LAYERS - 1), 1, sem="relaxed")


@triton.jit
def note_source(board, size, layer, step, source, since, is_noted, PHASE: tl.constexpr):
    """The wait for one source has lasted from the clock `since` until now."""
    if is_noted & (board != 0):
        totals, kept = places(board, size, layer, step, PHASE)
        wire_clock.note_wait(totals + source * 8, kept + 8 + source * 8, since, stamp_of(step), is_noted)


# Where a program has many blocks, a clock read for each made a round trip of 512 rows 0.9 microseconds longer, of 52. The
# functions below read it for the first block alone, and tell that one by a number: 0.2. In launches for few tokens, whose
# programs have one block or two, that costs more than the clock: 0.3 and 0.7 with 1 and 32 rows, against 0.1 and 0.3 (H 7168,
# 2 x H100, 2026-11-26).


@triton.jit
def notes(board, is_first):
    """1 in the program that notes a source's wait, while anything is counted, else 0. A loop over blocks has it for its first
    block, and `noted()` from there on."""
    return (is_first & (board != 0)).to(tl.int32)


@triton.jit
def noted():
    """What has been noted, is not noted again."""
    return tl.zeros([], tl.int32)


@triton.jit
def clock_if(noting):
    """The clock where `note_first` will want it, else 0."""
    since = tl.zeros([], tl.int64)
    if noting != 0:
        since = wire_clock.clock()
    return since


@triton.jit
def note_first(board, size, layer, step, source, since, noting, PHASE: tl.constexpr):
    """`note_source` for the first of many blocks: see `notes`."""
    if noting != 0:
        totals, kept = places(board, size, layer, step, PHASE)
        wire_clock.note_wait(totals + source * 8, kept + 8 + source * 8, since, stamp_of(step), noting)


@triton.jit
def note_sources(board, size, layer, step, sources, since, clocks, is_noted, PHASE: tl.constexpr):
    """The waits for a block of sources have lasted until `clocks`. `is_noted` holds for one element a source, of one program."""
    if board != 0:
        totals, kept = places(board, size, layer, step, PHASE)
        spans = clocks - since
        is_noted = is_noted != 0  # a block and what holds for a whole program make an int32 in the interpreter
        tl.atomic_add(totals.to(tl.pointer_type(tl.int64)) + sources, spans, mask=is_noted, sem="relaxed")
        tl.store(kept.to(tl.pointer_type(tl.int64)) + 1 + sources, spans | stamp_of(step), mask=is_noted)


@triton.jit
def note_step(board, size, step, lanes, is_peer, since, began_ns, clocks):
    """The waits for the counts of a step, and both clocks at its end. By one program: it adds without atomics."""
    if board != 0:
        words = board.to(tl.pointer_type(tl.int64))
        totals = words + _FIRST_WAITS + lanes
        spans = clocks - since
        tl.store(totals, tl.load(totals, mask=is_peer, other=0) + spans, mask=is_peer)
        kept = words + (_FIRST_WAITS + 2 * size + _NUM_LAYERS + 2 * _NUM_LAYERS * size) + step % _NUM_STEPS * (2 + size)
        tl.store(kept, step.to(tl.int64))
        tl.store(kept + 1, began_ns)
        tl.store(kept + 2 + lanes, spans | stamp_of(step), mask=is_peer)
        tl.store(words, tl.load(words) + 1)
        tl.store(words + 1, tl.load(words + 1) + (wire_clock.clock() - since))
        tl.store(words + 2, tl.load(words + 2) + (wire_clock.global_clock() - began_ns))
