"""What one rank counts. Kernels write to a board on the device; whatever else telemetry sees is noted here, by the host."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

import torch

from tokenferry.errors import StateError
from tokenferry.kernels.wait_board import (
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
from tokenferry.telemetry.lateness import last_to_enter
from tokenferry.telemetry.snapshot import Snapshot, StepRecord, snapshot_of

COUNTS: Final = -1
"""The phase in which a step's counts are exchanged; the others are those of `wait_board`."""
NUM_TOKEN_STEPS: Final = 4096
"""Steps of which a rank's rows are kept."""
_TICKS: Final = (1 << STAMP_SHIFT) - 1


def write_here(tensor: torch.Tensor, number: int) -> None:
    """To a tensor of the CPU."""
    tensor.fill_(number)


def read_here(tensor: torch.Tensor) -> list[Any]:
    """A tensor of the CPU as a list."""
    return tensor.tolist()


@dataclass(frozen=True)
class _Span:
    """A call of a library between two events on a stream, and when the host launched it."""

    phase: int
    layer: int
    step: int
    launched_ns: int
    begin: torch.cuda.Event
    end: torch.cuda.Event


class Recorder:
    """The counters of one workspace on one rank, from one opening to the next.

    A transport whose kernels write to a board of their own takes `make_board`; the others call `step_began`, `waited` and `came`.

    Args:
        row_bytes, term_bytes: of a hidden row, and of a partial row, on its way.
        device: where the expert numbers are counted.
        experts: those of this rank, whose rows alone are told. Default: all.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        num_experts: int,
        row_bytes: int,
        term_bytes: int,
        device: torch.device,
        experts: range | None = None,
    ) -> None:
        self.rank, self.size, self._row_bytes, self._term_bytes = rank, size, row_bytes, term_bytes
        self._experts = range(num_experts) if experts is None else experts
        self.transport = ""
        """The name of what moves the rows."""
        self.layout = BoardLayout(size)
        self.load_words = torch.zeros(1 + NUM_LAYERS * num_experts, dtype=torch.int64, device=device)
        """Where kernels add up rows. The first word is 0 while nothing is counted, in graphs that were captured before too."""
        self.load_words[0] = 1
        self.loads = self.load_words[1:].view(NUM_LAYERS, num_experts)
        """[NUM_LAYERS, E] rows that came for each expert. Layers beyond share the last row."""
        self.counts_ids = True
        """Whether expert numbers are counted where experts do not count themselves: by the combine of a symmetric transport, by a
        small kernel a round on other GPUs. If not, a graph that is captured then does not count them either."""
        self.is_on = True
        self.read: Callable[[torch.Tensor], list[Any]] = read_here
        """Copies a tensor of the device to the host beside whatever runs there."""
        self.write: Callable[[torch.Tensor, int], None] = write_here
        """Writes a number to a tensor of one, likewise."""
        self._words = [0] * self.layout.num_words
        self._words[TICKS_WORD] = self._words[NANOSECONDS_WORD] = 1  # spans of the host are in nanoseconds
        self.board: torch.Tensor | None = None
        """int64 on the device, where kernels count."""
        self.relaxed: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        """Within it events may be asked whether they have passed, also while a graph is captured: by this thread or another."""
        self._switch: weakref.WeakMethod[Callable[[bool], None]] | None = None
        self._is_closed = False
        # Whoever reads or switches may be another thread, a scrape's for one. The lock is held for what ends by itself. It lets
        # its own thread in again: a signal handler may close what it has interrupted.
        self._lock = threading.RLock()
        self._step = 0
        # No lock is taken as a step appends to `_tokens` and `_spans`. So whoever reads takes from them one by one: a deque must
        # not grow while it is copied, which raises in Python without a global lock.
        self._tokens: deque[tuple[int, int]] = deque(maxlen=NUM_TOKEN_STEPS)
        self._tokens_read: deque[tuple[int, int]] = deque(maxlen=NUM_TOKEN_STEPS)
        """Taken from `_tokens` by those who have read, under the lock."""
        self._spans: deque[_Span] = deque(maxlen=4096)
        self._oldest_span: _Span | None = None
        """Taken from `_spans`, since it is looked at until it is over, and a full deque drops its oldest as it grows."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.load_words.nbytes + (0 if self.board is None else self.board.nbytes)

    # --- with kernels that write to a board ------------------------------------------------------------------------

    def make_board(self, device: torch.device) -> torch.Tensor:
        """From here on a board of int64 words on the device, empty and returned, holds what is counted."""
        self.board = torch.zeros(self.layout.num_words, dtype=torch.int64, device=device)
        return self.board

    def take_switch(self, switch: Callable[[bool], None]) -> None:
        """`switch`, a method, lets the kernels count, or not. Its object is not kept alive."""
        self._switch = weakref.WeakMethod(switch)

    def close(self) -> None:
        """What it switches is about to go. Waits for a thread that is switching it."""
        with self._lock:
            self._is_closed = True

    @property
    def has_board(self) -> bool:
        """Whether kernels count, so that the host must not."""
        return self.board is not None

    def turn(self, on: bool) -> None:
        """Counts from here on, or does not."""
        with self._lock:
            self._require_open()
            switch = None if self._switch is None else self._switch()
            if switch is not None and on != self.is_on:
                switch(on)
            self.write(self.load_words[:1], int(on))
            self.is_on = on

    # --- by the host ------------------------------------------------------------------------------------------------

    def step_began(self, step: int) -> None:
        """The counts of `step` are exchanged from now on."""
        if not self.is_on or self.has_board:
            return
        with self._lock:
            self.collect_spans()
            self._step = step
            words, first = self._words, self._first_of_step(step)
            words[STEPS_WORD] += 1
            words[first], words[first + 1] = step, time.time_ns()
            for source in range(self.size):
                words[first + 2 + source] = self._stamp(step) if source != self.rank else 0

    def is_in_step(self, step: int, num_tokens: int) -> None:
        """This rank has brought so many rows to `step`, which begins now if whoever exchanged its counts has not said so."""
        if self._step != step:
            self.step_began(step)
        if self.is_on:
            self._tokens.append((step, num_tokens))

    def waited(self, phase: int, layer: int, source: int, span_ns: int) -> None:
        """This rank has waited so long for `source`; under its own number, for peers that it cannot tell apart."""
        if self.is_on and not self.has_board:
            self._note(phase, layer, source, self._step, time.time_ns() - span_ns, span_ns)

    def _note(self, phase: int, layer: int, source: int, step: int, begin_ns: int, span_ns: int) -> None:
        with self._lock:
            words = self._words
            if phase == COUNTS:
                words[FIRST_WAITS_WORD + source] += span_ns
                self._add(self._first_of_step(step) + 2 + source, step, span_ns)
                return
            place = 2 * min(layer, NUM_LAYERS - 1) + phase
            words[self.layout.layer_waits + place * self.size + source] += span_ns
            first = self.layout.round_log + (step % NUM_ROUND_STEPS * 2 * NUM_LAYERS + place) * (1 + self.size)
            kept = words[first + 1 : first + 1 + self.size]
            if not words[first] or all(word >> STAMP_SHIFT != step % (1 << 16) for word in kept):  # the round's first wait
                words[first] = begin_ns
            self._add(first + 1 + source, step, span_ns)

    def came(self, layer: int, tokens_per_rank: Sequence[int]) -> None:
        """A dispatch has brought so many rows from each rank."""
        if not self.is_on or self.has_board:
            return
        self._words[self.layout.rounds + min(layer, NUM_LAYERS - 1)] += 1
        for source, number in enumerate(tokens_per_rank):
            self._words[self.layout.rows + source] += number

    def span_on_stream(self, phase: int, layer: int, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """A call of a library lies between two events on the stream. It is read once both have passed, and never waited for."""
        if self.is_on and not self.has_board:
            self._spans.append(_Span(phase, layer, self._step, time.time_ns(), begin, end))

    def collect_spans(self) -> None:
        """Notes the calls that are over, in the steps that they belong to. Of two ranks the peer is known; of more, they cannot
        be told apart."""
        if not self._spans and self._oldest_span is None:
            return
        source = 1 - self.rank if self.size == 2 else self.rank
        with self._lock, self.relaxed():
            while (span := self._oldest_span or (self._spans.popleft() if self._spans else None)) is not None:
                self._oldest_span = span
                if not span.end.query():
                    return
                self._oldest_span = None
                span_ns = round(span.begin.elapsed_time(span.end) * 1e6)
                self._note(span.phase, span.layer, source, span.step, span.launched_ns, span_ns)

    def _stamp(self, step: int) -> int:
        return step % (1 << 16) << STAMP_SHIFT

    def _first_of_step(self, step: int) -> int:
        return self.layout.steps + step % NUM_STEPS * (2 + self.size)

    def _add(self, place: int, step: int, span_ns: int) -> None:
        """To a kept wait, which begins at 0 in a new step."""
        word, stamp = self._words[place], self._stamp(step)
        before = word & _TICKS if word & ~_TICKS == stamp else 0
        self._words[place] = stamp | min(before + span_ns, _TICKS)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._is_closed:
            raise StateError("telemetry: the workspace is closed; take what you need before")

    def last_waits(self) -> tuple[tuple[StepRecord, ...], str]:
        """The last steps, and the reading of them in one line."""
        steps = self.snapshot().steps
        return steps, last_to_enter(steps, self.rank)

    def snapshot(self) -> Snapshot:
        """What has been counted so far. Waits for no step.

        Raises:
            StateError: the workspace is closed.
        """
        self._require_open()
        if self.board is not None:
            words = self.read(self.board)
        else:
            with self._lock:
                self.collect_spans()
                words = list(self._words)
        return snapshot_of(
            words,
            self._read_loads(),
            rank=self.rank,
            size=self.size,
            transport=self.transport,
            is_on=self.is_on,
            row_bytes=self._row_bytes,
            term_bytes=self._term_bytes,
            tokens=self._last_tokens(),
        )

    def _last_tokens(self) -> tuple[tuple[int, int], ...]:
        """The oldest first."""
        with self._lock:
            for _ in range(NUM_TOKEN_STEPS):  # and not until there are none: steps go on meanwhile
                if not self._tokens:
                    break
                self._tokens_read.append(self._tokens.popleft())
            return tuple(self._tokens_read)

    def _read_loads(self) -> list[list[int]]:
        """Of this rank's experts. Where the gathered numbers are counted, which are all ranks', the others' are left out: a load
        means the same whoever has counted it, and those of all ranks add up."""
        words, num_experts = self.read(self.load_words), self.loads.shape[1]
        start, stop = self._experts.start, self._experts.stop
        before, behind = [0] * start, [0] * (num_experts - stop)
        return [before + words[first + start : first + stop] + behind for first in range(1, len(words), num_experts)]


__all__ = ["COUNTS", "DISPATCH", "Recorder", "read_here"]
