"""Debug mode (TOKENFERRY_DEBUG=1): a transport around another one that poisons and checks.

What was found is raised by the next `begin_step` or `check`, which then waits for the device.
"""

from __future__ import annotations

import torch

from tokenferry.dispatched import HiddenRows, PartialRows, QuantizedRows
from tokenferry.step import StepRequest, StepTensors
from tokenferry.transports.base import Gathered, Transport, TransportSettings
from tokenferry.transports.debug_checks import Checks, input_changed
from tokenferry.transports.wrapper import TransportWrapper


class DebugTransport(TransportWrapper):
    """The same transport, watched.

    Poison, where the rows have fixed addresses and so are the workspace's own: `combine_input()` is NaN when a dispatch
    returns it; the gathered rows and weights are NaN from opening on, and again as soon as their combine begins. Not
    earlier: a fast peer may have stored the next rows by then.

    On `local` what a dispatch returns are copies, so that a write to them does not reach the caller's own rows.

    Checks: that what a sending half was given stays as it is until the receiving half, whoever writes to it, by a copy of it;
    expert numbers (on CUDA there is no other check of them), the counts that a step publishes, users' writes to
    the step's tensors, and the bytes before, between and behind the regions of the symmetric buffer, which nobody may write.

    Args:
        inner: open on this rank. No rank may launch anything before all have made their wrapper: taking pinned memory may wait
            for the device, where a faster rank's first kernel would wait for this rank already.
    """

    def __init__(self, inner: Transport, checks: Checks) -> None:
        super().__init__(inner)
        self._checks = checks
        self._held: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        """What the sending half was given, by name, and a copy of it."""

    @classmethod
    def around(cls, inner: Transport, settings: TransportSettings, step_tensors: StepTensors) -> DebugTransport:
        """Watches a transport that was just opened, before its first step."""
        checks = Checks(settings, step_tensors, inner.memory)
        if inner.fixed_rows is not None:
            _poison(inner.fixed_rows)  # peers store here only after they have this rank's count
        device = settings.group.device
        if device.type == "cuda":  # steps may begin on another stream
            torch.cuda.current_stream(device).synchronize()
        return cls(inner, checks)

    def begin_step(self, request: StepRequest, layer: int) -> None:
        self._checks.report()
        self._checks.look()
        super().begin_step(request, layer)
        self._checks.step_was_published(request.max_tokens)

    # --- dispatch ---------------------------------------------------------------------------------------------------

    def dispatch(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Gathered:
        self._look_at(hidden, topk_idx)
        return self._poison_terms(super().dispatch(layer, hidden, topk_idx, topk_weights))

    def dispatch_begin(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        held = self._copies(hidden=hidden, topk_idx=topk_idx, topk_weights=topk_weights)
        self._look_at(hidden, topk_idx)
        super().dispatch_begin(layer, hidden, topk_idx, topk_weights)
        self._held = held

    def dispatch_end(self) -> Gathered:
        self._compare_held()
        return self._poison_terms(super().dispatch_end())

    # --- combine ----------------------------------------------------------------------------------------------------

    def combine(self, partial: PartialRows, out: torch.Tensor | None = None) -> torch.Tensor:
        self._look_at_terms(partial)
        return super().combine(self._poison_behind(partial), out)

    def combine_begin(self, partial: PartialRows) -> None:
        self._look_at_terms(partial)
        held = [] if self._is_written_over(partial) else self._copies(partial=partial)
        super().combine_begin(self._poison_behind(partial))
        self._held = held

    def combine_end(self, out: torch.Tensor | None = None) -> torch.Tensor:
        self._compare_held()
        return super().combine_end(out)

    # --- beside steps -----------------------------------------------------------------------------------------------

    def solo(self) -> Transport:
        alone = super().solo()
        return self if alone is self.inner else DebugTransport(alone, self._checks)

    def check(self) -> None:
        super().check()
        self._checks.report(wait=True)

    def check_known(self) -> None:
        super().check_known()
        self._checks.report()  # what the device has copied to the host so far

    def close(self) -> None:
        self._checks.forget_memory()
        super().close()

    # --- how --------------------------------------------------------------------------------------------------------

    def _look_at(self, hidden: HiddenRows, topk_idx: torch.Tensor) -> None:
        if isinstance(hidden, QuantizedRows):
            self._checks.check_scales(hidden.scales)
        self._checks.check_ids(topk_idx)
        self._checks.look()

    def _look_at_terms(self, partial: PartialRows) -> None:
        """Of the rows that are read: those behind the last token's are anything."""
        if isinstance(partial, QuantizedRows):
            self._checks.check_term_scales(partial.scales)

    def _copies(self, **given: HiddenRows) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """Not of what lies in the gathered rows: these are the workspace's own again from `combine_begin` on, and are poisoned
        there."""
        rows = self.fixed_rows
        return [
            (name, tensor, tensor.clone())
            for name, handed in given.items()
            for tensor in _parts(handed)
            if rows is None or not any(_lies_in(tensor, part) for part in _parts(rows.hidden_RH))
        ]

    def _is_written_over(self, partial: PartialRows) -> bool:
        """Whether partial rows lie in `combine_input()`, but not as its first rows: the transport itself then copies them, and
        writes its terms over the memory that they lie in."""
        if self.fixed_rows is None:
            return False
        return any(
            _lies_in(part, place)
            and (part.data_ptr(), part.dtype, part.stride(0)) != (place.data_ptr(), place.dtype, place.stride(0))
            for part in _parts(partial)
            for place in _parts(self.combine_input())
        )

    def _compare_held(self) -> None:
        """What the sending half was given must be as it was. What has left may be either, so that the workspace is broken and the
        peers are told. On CUDA the next report says it, and breaks nothing."""
        held, self._held = self._held, []
        for name, tensor, before in held:
            if not self._checks.check_unchanged(name, tensor, before):
                self.launched = True
                raise input_changed(name)

    def _poison_terms(self, gathered: Gathered) -> Gathered:
        if self.fixed_rows is not None:
            for part in _parts(self.combine_input()):
                part.view(torch.uint8).fill_(0xFF)  # a NaN in each floating dtype
        return gathered

    def _poison_behind(self, partial: PartialRows) -> PartialRows:
        """Poisons the gathered rows, where they have a fixed address. Returns the partial rows, out of their way."""
        rows = self.fixed_rows
        if rows is None:
            return partial
        if any(_lies_in(each, part) for each in _parts(partial) for part in _parts(rows.hidden_RH)):
            partial = partial.clone()
        _poison(rows)
        self._checks.look()
        return partial


def _poison(gathered: Gathered) -> None:
    for part in _parts(gathered.hidden_RH):
        part.view(torch.uint8).fill_(0xFF)  # a NaN in each floating dtype
    gathered.topk_weights_RK.fill_(torch.nan)


def _parts(rows: HiddenRows) -> tuple[torch.Tensor, ...]:
    return (rows.values, rows.scales) if isinstance(rows, QuantizedRows) else (rows,)


def _lies_in(tensor: torch.Tensor, rows: torch.Tensor) -> bool:
    return rows.data_ptr() <= tensor.data_ptr() < rows.data_ptr() + rows.nbytes
