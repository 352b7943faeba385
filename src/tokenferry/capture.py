"""What a workspace offers to whoever captures its steps in CUDA graphs: `GraphRunner`, and runners of your own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tokenferry.errors import StateError
from tokenferry.peers import PeerCalls
from tokenferry.step import Announced, Step, StepRequest, checked_counts


class GraphCalls(PeerCalls):
    """The part of a `Workspace` that graphs need: agreeing on counts before a step, steps that nobody else takes part in, and
    steps that are recorded or replayed. None of them is needed to run steps eagerly."""

    _promised_equal = False
    _says_done = False

    # --- counts that the host has to know ---------------------------------------------------------------------------

    def announce(self, num_tokens: int, *, done: bool = False) -> Announced | None:
        """Tells the host what all ranks will bring to the next step, so that they can agree on a graph. Every rank calls it.

        Returns:
            On the collective transport the counts: one exchange, which saves `begin_step` its own. None on the others, where
            each rank chooses alone; nothing is sent.

        Raises:
            As `begin_step`.
        """
        lifecycle, settings = self.lifecycle, self._settings
        lifecycle.enter("announce")
        try:
            transport = self.active_transport
            transport.launched = False
            lifecycle.begin_step("announce")
            checked_counts(num_tokens, None, settings.max_tokens_per_rank, settings.group.device)
            return transport.announce(StepRequest(self._step_index + 1, num_tokens, num_tokens, done))
        except BaseException as error:
            self.settle_failure("announce", error)
            raise
        finally:
            lifecycle.leave()

    @contextlib.contextmanager
    def equal_counts(self) -> Iterator[None]:
        """Steps begun within it have the same num_tokens on every rank, which is not checked: the collective transport then
        exchanges no counts, so that a graph may capture the step. Other transports exchange them as ever."""
        before, self._promised_equal = self._promised_equal, True
        try:
            yield
        finally:
            self._promised_equal = before

    @contextlib.contextmanager
    def saying_done(self, done: bool) -> Iterator[None]:
        """Steps begun within it say `done`, if it is True: the last step of a forward carries the answer of the whole."""
        before, self._says_done = self._says_done, done
        try:
            yield
        finally:
            self._says_done = before

    # --- steps that are recorded and replayed -----------------------------------------------------------------------

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Callable[[], int]]:
        """Within it, calls are recorded in a CUDA graph and nothing runs: steps begun inside are not counted, and whatever was
        under way when the block ends, by an exception too, is forgotten. The peers hear nothing of such an exception: they wait
        for nothing that is captured. The number of steps begun is in what it yields."""
        before, index = self._set_step_aside("capturing")
        num_steps, outer, self._captures = 0, self._captures, True
        try:
            yield lambda: num_steps
        finally:
            self._captures = outer
            num_steps = self._step_index - index
            self._take_step_back(before, index)

    @contextlib.contextmanager
    def replaying(self, num_steps: int = 1) -> Iterator[None]:
        """Around the launch of a graph that holds `num_steps` steps. Afterwards the workspace is without a step.

        Raises:
            As `begin_step`; call `check()` after your own synchronisation.
        """
        lifecycle = self.lifecycle
        lifecycle.enter("replaying")
        try:
            transport = self._transport
            transport.launched = False
            lifecycle.begin_step("replaying")
            if self._stand_in is not None:
                raise StateError("replaying: inside solo(), but a graph runs with the peers; leave it first")
            with transport.watching_replay():
                transport.launched = True
                yield
            self._step_index += num_steps
            lifecycle.leave_step()
        except BaseException as error:
            self.settle_failure("replaying", error)
            raise
        finally:
            lifecycle.leave()

    @contextlib.contextmanager
    def engine_step(self) -> Iterator[None]:
        """Around one step of an engine: whatever it runs, eagerly or by replaying graphs, and, at its end, the synchronisation
        that brings the step's tokens to the host. Then raises if a peer failed or was late.

        It is for engines whose graphs replay without a call of ours. Steps and captures inside are made as ever; it may be
        nested, and entered for several workspaces at once. It costs microseconds and waits for nothing. A step that ends before
        its work has run is checked by the next one, or by `check(wait=False)` after the synchronisation.

        On NCCL the current stream is watched: where the device waits for a peer longer than `timeout_s`, the communicator is
        aborted, so that the stream goes on, with rows that nobody filled, and the host reaches the end of the step.

        An exception inside leaves as it is, after the peers were told (as `fail`), and breaks the workspace: the engine's step
        is broken off, and the peers would wait for the rest of it. Where a peer's failure lies behind it, that is raised.

        Raises:
            PeerTimeoutError, PeerFailedError: another rank is the cause; at the beginning too, until a reset.
            StateError: the workspace is closed, or another thread closed it meanwhile.
        """
        self.check(wait=False)
        try:
            with self._transport.watching_step():
                yield
        except BaseException as error:
            self.settle_engine_step(error)
            raise
        self.check(wait=False)

    @contextlib.contextmanager
    def solo(self) -> Iterator[None]:
        """Within it, steps involve this rank alone: the same calls and shapes without communication, for warm-up and capture.

        Counts outside are not disturbed: a step begun inside is over when the block ends.
        """
        before, index = self._set_step_aside("solo")
        self._stand_in = self._transport.solo()
        try:
            yield
        finally:
            self._stand_in = None
            self._take_step_back(before, index)

    def _set_step_aside(self, what: str) -> tuple[Step | None, int]:
        self.lifecycle.enter(what)  # another thread's call would find another step under it
        try:
            self.lifecycle.begin_step(what)
            if self._stand_in is not None:
                raise StateError(f"{what}: already inside solo()")
            return self._step, self._step_index
        finally:
            self.lifecycle.leave()

    def _take_step_back(self, step: Step | None, index: int) -> None:
        """Its number alone: its counts may be overwritten."""
        self._step, self._step_index = step, index
        self.lifecycle.leave_step()
