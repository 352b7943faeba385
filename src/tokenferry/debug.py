"""Debug mode (TOKENFERRY_DEBUG=1): poison and checks on the device, around the calls of an open transport.

Everything is a PyTorch operator in stream order, so that a captured graph checks as well, and nothing waits for the device.
What was found is raised by the next `begin_step` or `check`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import torch

from tokenferry.errors import StateError, UsageError
from tokenferry.step import StepTensors
from tokenferry.transports.base import Gathered, Transport, TransportSettings
from tokenferry.transports.symmetric import SymmetricTransport
from tokenferry.transports.symmetric_layout import CANARY_BYTES, Region

CANARY: Final = 0xA5
LOW, HIGH, WRITTEN, OVERRUN = range(4)


class Watch:
    """Watches one transport. Its methods are replaced on the object; it has the same type and answers as before.

    Poison, on symmetric transports alone, where tensors are the workspace's own: `combine_input()` is NaN when a dispatch
    returns it, and the gathered rows and weights are NaN as soon as their combine begins. Not earlier: a fast peer may have
    stored the next rows by then.

    Checks: expert numbers (on CUDA there is no other check of them), users' writes to the step's tensors, and a few bytes
    behind each region of the symmetric buffer, which nobody may write.
    """

    def __init__(self, transport: Transport, settings: TransportSettings, step_tensors: StepTensors) -> None:
        self._num_experts, self._packed = settings.config.num_experts, step_tensors.packed
        self._published = step_tensors.packed.clone()
        device = settings.group.device
        self._found = torch.zeros(4, dtype=torch.int32, device=device)
        self._mirror = torch.zeros(4, dtype=torch.int32, pin_memory=True) if device.type == "cuda" else self._found
        self._has_step = torch.zeros(1, dtype=torch.bool, device=device)
        self._canaries: tuple[torch.Tensor, torch.Tensor] | None = None
        if isinstance(transport, SymmetricTransport):
            self._set_canaries(transport)
        self._watch(transport)

    def _set_canaries(self, transport: SymmetricTransport) -> None:
        layout, buffer = transport._layout, transport._buffer.tensor
        regions = [getattr(layout, each.name) for each in dataclasses.fields(layout)]
        ends = [region.end for region in regions if isinstance(region, Region)]
        places = torch.tensor([end + byte for end in ends for byte in range(CANARY_BYTES)], device=buffer.device)
        buffer[places] = CANARY
        self._canaries = buffer, places

    def _watch(self, transport: Any) -> None:
        def replace(name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
            if hasattr(transport, name):
                setattr(transport, name, make(getattr(transport, name)))

        replace("begin_step", self._begin_step)
        replace("dispatch_begin", self._sends)
        replace("solo", self._solo)
        replace("close", self._close)
        if isinstance(transport, SymmetricTransport) or hasattr(transport, "_layout"):
            replace("dispatch", lambda call: self._receives(self._sends(call), transport))
            replace("dispatch_end", lambda call: self._receives(call, transport))
            replace("combine", lambda call: self._combines(call, transport))
            replace("combine_begin", lambda call: self._combines(call, transport))

    def _begin_step(self, call: Callable[..., None]) -> Callable[..., None]:
        def begin_step(*args: Any) -> None:
            self._look()
            call(*args)
            with torch.no_grad():
                self._published.copy_(self._packed)
                self._has_step.fill_(True)

        return begin_step

    def _sends(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def dispatch(layer: int, hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Any:
            if topk_idx.numel():
                low = (topk_idx.min() + 1).clamp(-(2**31), 0).to(torch.int32)
                high = (topk_idx.max() - (self._num_experts - 1)).clamp(0, 2**31 - 1).to(torch.int32)
                self._found[LOW].copy_(torch.minimum(self._found[LOW], low))
                self._found[HIGH].copy_(torch.maximum(self._found[HIGH], high))
            self._look()
            return call(layer, hidden, topk_idx, topk_weights)

        return dispatch

    def _receives(self, call: Callable[..., Gathered], transport: Any) -> Callable[..., Gathered]:
        def dispatch_end(*args: Any) -> Gathered:
            gathered = call(*args)
            transport.combine_input().fill_(torch.nan)
            return gathered

        return dispatch_end

    def _combines(self, call: Callable[..., Any], transport: Any) -> Callable[..., Any]:
        def combine(partial: torch.Tensor) -> Any:
            gathered: Gathered = transport._views.gathered
            rows = gathered.hidden_RH
            if rows.data_ptr() <= partial.data_ptr() < rows.data_ptr() + rows.nbytes:
                partial = partial.clone()
            rows.fill_(torch.nan)
            gathered.topk_weights_RK.fill_(torch.nan)
            self._look()
            return call(partial)

        return combine

    def _solo(self, call: Callable[[], Any]) -> Callable[[], Any]:
        def solo() -> Any:
            alone = call()
            if "solo" not in vars(alone):
                self._watch(alone)
            return alone

        return solo

    def _close(self, call: Callable[[], None]) -> Callable[[], None]:
        def close() -> None:
            self._canaries = None  # or the buffer would be kept
            call()

        return close

    def _look(self) -> None:
        """Compares, on the device, and sends what was found to the host."""
        written = (self._packed != self._published).any() & self._has_step
        self._found[WRITTEN : WRITTEN + 1].copy_(torch.maximum(self._found[WRITTEN], written.to(torch.int32)))
        if self._canaries is not None:
            buffer, places = self._canaries
            overrun = (buffer[places] != CANARY).any().to(torch.int32)
            self._found[OVERRUN].copy_(torch.maximum(self._found[OVERRUN], overrun))
        if self._mirror is not self._found:
            self._mirror.copy_(self._found, non_blocking=True)

    def report(self, *, wait: bool = False) -> None:
        """Raises what was found so far; with `wait`, what the device has found by now. The next report starts anew.

        Raises:
            UsageError: an expert number that there is not.
            StateError: a step's tensors were written, or memory behind a region of the symmetric buffer.
        """
        if wait:
            self._look()
        low, high, written, overrun = (self._found if wait else self._mirror).tolist()
        if not (low or high or written or overrun):
            return
        self._found.zero_()
        self._mirror.zero_()
        self._published.copy_(self._packed)
        if self._canaries is not None:
            buffer, places = self._canaries
            buffer[places] = CANARY
        if low or high:
            wrong = low - 1 if low else high + self._num_experts - 1
            raise UsageError(f"topk_idx held {wrong}, but expert numbers are -1 (none) to {self._num_experts - 1}")
        if written:
            raise StateError("the tensors of a step were written on the device; read or clone them only")
        raise StateError("memory behind a region of the symmetric buffer was written: a kernel stored beyond its tensor")
