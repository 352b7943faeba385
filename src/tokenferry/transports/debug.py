"""Debug mode (TOKENFERRY_DEBUG=1): poison and checks on the device, around the calls of an open transport.

Everything is a PyTorch operator in stream order, so that a captured graph checks as well, and nothing waits for the device.
What was found is raised by the next `begin_step` or `check`, which then waits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Final

import torch

from tokenferry.errors import StateError, UsageError
from tokenferry.step import StepTensors
from tokenferry.transports.base import Gathered, Transport, TransportSettings
from tokenferry.transports.symmetric.layout import Layout
from tokenferry.transports.symmetric.rank_kernels import RankKernels
from tokenferry.transports.symmetric.transport import SymmetricTransport

CANARY: Final = 0xA5
LOW, HIGH, WRITTEN, OVERRUN, COUNTS, CHANGED = range(6)
INPUTS: Final = ("hidden", "topk_idx", "topk_weights", "partial")
"""Of the sending halves, numbered from 1 in what the device found."""


def _poison(gathered: Gathered) -> None:
    gathered.hidden_RH.fill_(torch.nan)
    gathered.topk_weights_RK.fill_(torch.nan)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory: NaNs compare too, and a gradient does not matter."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _lies_in(tensor: torch.Tensor, rows: torch.Tensor) -> bool:
    return rows.data_ptr() <= tensor.data_ptr() < rows.data_ptr() + rows.nbytes


def _changed(name: str) -> StateError:
    return StateError(
        f"{name} was changed between the two halves; it belongs to the call until its _end has returned: write to another "
        "tensor, or call the whole operation"
    )


class _Canaries:
    """A known byte wherever no region lies."""

    def __init__(self, buffer: torch.Tensor, layout: Layout) -> None:
        self._buffer, self._layout = buffer, layout
        self._places = torch.tensor([byte for gap in layout.gaps for byte in gap], device=buffer.device)
        self._numbers = torch.arange(1, 1 + len(self._places), dtype=torch.int32, device=buffer.device)
        self.restore()

    def restore(self) -> None:
        self._buffer[self._places] = CANARY

    def last_written(self) -> torch.Tensor:
        """int32 scalar on the device: the number of the last byte that is not as it was, from 1; 0: all are."""
        return ((self._buffer[self._places] != CANARY) * self._numbers).max()

    def describe(self, number: int) -> str:
        place = [byte for gap in self._layout.gaps for byte in gap][number - 1]
        before = [name for name, region in self._layout.regions.items() if region.end <= place]
        after = [name for name, region in self._layout.regions.items() if region.offset > place]
        return (
            f"byte {place} of the symmetric buffer, behind {(before or ['control'])[-1]!r} and before {(after or ['end'])[0]!r}"
        )


class Watch:
    """Watches one transport. Its methods are replaced on the object; it has the same type and answers as before.

    Poison, on symmetric transports alone, where tensors are the workspace's own: `combine_input()` is NaN when a dispatch
    returns it; the gathered rows and weights are NaN from opening on, and again as soon as their combine begins. Not
    earlier: a fast peer may have stored the next rows by then.

    On `local` what a dispatch returns are copies, so that a write to them does not reach the caller's own rows.

    Checks: that what a sending half was given stays as it is until the receiving half, whoever writes to it, by a copy of it;
    expert numbers (on CUDA there is no other check of them), the counts that a step publishes, users' writes to
    the step's tensors, and the bytes before, between and behind the regions of the symmetric buffer, which nobody may write.
    """

    def __init__(self, transport: Transport, settings: TransportSettings, step_tensors: StepTensors) -> None:
        self._num_experts, self._packed = settings.config.num_experts, step_tensors.packed
        self._published = step_tensors.packed.clone()
        self._rank, self._size, self._max_tokens_per_rank = settings.group.rank, settings.group.size, settings.max_tokens_per_rank
        device = settings.group.device
        # 64 bits, as wide as an expert number: in 32 the report of 2**40 named a number that nobody had sent.
        self._found = torch.zeros(6, dtype=torch.int64, device=device)
        self._mirror = torch.zeros(6, dtype=torch.int64, pin_memory=True) if device.type == "cuda" else self._found
        self._has_step = torch.zeros(1, dtype=torch.bool, device=device)
        self._canaries: _Canaries | None = None
        self._held: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        if isinstance(transport, SymmetricTransport):
            self._canaries = _Canaries(transport._buffer.tensor, transport._layout)
        if isinstance(transport, RankKernels):
            _poison(transport.fixed_rows)  # peers store here only after they have this rank's count
        self._watch(transport)
        if device.type == "cuda":  # steps may begin on another stream
            torch.cuda.current_stream(device).synchronize()
        if isinstance(transport, SymmetricTransport) and transport._buffer.is_virtual:
            # Taking pinned memory may wait for the device, where a faster rank's first kernel would wait for this rank already.
            settings.group.channel.barrier(f"{settings.name}/watched", settings.open_timeout_s)

    def _watch(self, transport: Any) -> None:
        """A method that is replaced refers to its object weakly: what `solo` makes has to go when its block ends."""
        here = weakref.ref(transport)

        def replace(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
            original = getattr(type(transport), name, None)
            if original is not None:
                replaced = make(original)
                setattr(transport, name, lambda *args: replaced(here(), *args))

        replace("begin_step", self._begin_step)
        replace("dispatch_begin", lambda call: self._holds(self._sends(call), ("hidden", "topk_idx", "topk_weights")))
        replace("dispatch_end", self._returns_held)
        replace("combine_begin", lambda call: self._holds(call, ("partial",)))
        replace("combine_end", self._returns_held)
        replace("solo", self._solo)
        replace("close", self._close)
        if isinstance(transport, RankKernels):
            replace("dispatch", lambda call: self._receives(self._sends(call)))
            replace("dispatch_end", lambda call: self._receives(self._returns_held(call)))
            replace("combine", self._combines)
            replace("combine_begin", lambda call: self._holds(self._combines(call), ("partial",)))

    def _holds(self, call: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
        """Keeps what a sending half was given, and a copy of it. Not what lies in the gathered rows: these are the workspace's
        own again from `combine_begin` on, and are poisoned there."""

        def begin(transport: Any, *args: Any) -> Any:
            own = transport.fixed_rows.hidden_RH if isinstance(transport, RankKernels) else None
            given = zip(names, args[-len(names) :], strict=True)
            held = [(name, tensor, tensor.clone()) for name, tensor in given if own is None or not _lies_in(tensor, own)]
            result = call(transport, *args)
            self._held = held
            return result

        return begin

    def _returns_held(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The receiving half: what the sending half was given must be as it was. What has left may be either, so that the
        workspace is broken and the peers are told. On CUDA the next report says it, and breaks nothing.

        PyTorch's counter of writes would not do: a tensor shares it with the whole buffer that it is a slice of, and kernels,
        numpy and inference mode do not count.
        """

        def end(transport: Any, *args: Any) -> Any:
            held, self._held = self._held, []
            for name, tensor, before in held:
                changed = (_bytes(tensor) != _bytes(before)).any()
                if changed.is_cuda:
                    self._found[CHANGED].copy_(torch.maximum(self._found[CHANGED], changed * (INPUTS.index(name) + 1)))
                elif changed:
                    transport.launched = True
                    raise _changed(name)
            return call(transport, *args)

        return end

    def _begin_step(self, call: Callable[..., None]) -> Callable[..., None]:
        def begin_step(transport: Any, *args: Any) -> None:
            self._look()
            call(transport, *args)
            with torch.no_grad():
                self._published.copy_(self._packed)
                self._has_step.fill_(True)
                self._check_counts()

        return begin_step

    def _check_counts(self) -> None:
        """Whether what was published are counts of this workspace, and their sum, this rank's offset and the largest agree."""
        told, tokens, _ = self._packed.split([3, self._size, self._size])
        wanted = torch.stack([tokens.sum(), tokens[: self._rank].sum(), tokens.max()])
        wrong = ((tokens < 0) | (tokens > self._max_tokens_per_rank)).any() | (told != wanted).any()
        self._found[COUNTS].copy_(torch.maximum(self._found[COUNTS], wrong))

    def _sends(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def dispatch(transport: Any, layer: int, hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Any:
            if topk_idx.numel():
                low = (topk_idx.min() + 1).clamp(max=0)
                high = (topk_idx.max() - (self._num_experts - 1)).clamp(min=0)
                self._found[LOW].copy_(torch.minimum(self._found[LOW], low))
                self._found[HIGH].copy_(torch.maximum(self._found[HIGH], high))
            self._look()
            return call(transport, layer, hidden, topk_idx, topk_weights)

        return dispatch

    def _receives(self, call: Callable[..., Gathered]) -> Callable[..., Gathered]:
        def dispatch_end(transport: Any, *args: Any) -> Gathered:
            gathered = call(transport, *args)
            transport.combine_input().fill_(torch.nan)
            return gathered

        return dispatch_end

    def _combines(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def combine(transport: Any, partial: torch.Tensor) -> Any:
            gathered: Gathered = transport.fixed_rows
            if _lies_in(partial, gathered.hidden_RH):
                partial = partial.clone()
            _poison(gathered)
            self._look()
            return call(transport, partial)

        return combine

    def _solo(self, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def solo(transport: Any) -> Any:
            alone = call(transport)
            if "solo" not in vars(alone):
                self._watch(alone)
            return alone

        return solo

    def _close(self, call: Callable[[Any], None]) -> Callable[[Any], None]:
        def close(transport: Any) -> None:
            self._canaries = None  # or the buffer would be kept
            call(transport)

        return close

    def _look(self) -> None:
        """Compares, on the device, and sends what was found to the host."""
        written = (self._packed != self._published).any() & self._has_step
        self._found[WRITTEN : WRITTEN + 1].copy_(torch.maximum(self._found[WRITTEN], written))
        if self._canaries is not None:
            self._found[OVERRUN].copy_(torch.maximum(self._found[OVERRUN], self._canaries.last_written()))
        if self._mirror is not self._found:
            self._mirror.copy_(self._found, non_blocking=True)

    def report(self, *, wait: bool = False) -> None:
        """Raises what was found so far; with `wait`, what the device has found by now. The next report starts anew.

        Raises:
            UsageError: an expert number that there is not.
            StateError: a step's tensors were written, or memory where no region of the symmetric buffer lies; or a step's counts
                cannot be; or the inputs of a sending half were changed before the receiving half.
        """
        if wait:
            self._look()
        low, high, written, overrun, counts, changed = (self._found if wait else self._mirror).tolist()
        if not (low or high or written or overrun or counts or changed):
            return
        if self._found.is_cuda and not torch.cuda.is_current_stream_capturing():
            # Copies to the mirror that are on their way would report the same once more.
            torch.cuda.current_stream(self._found.device).synchronize()
        said = self._canaries.describe(overrun) if overrun and self._canaries is not None else ""
        self._found.zero_()
        self._mirror.zero_()
        self._published.copy_(self._packed)
        if self._canaries is not None:
            self._canaries.restore()
        if low or high:
            wrong = low - 1 if low else high + self._num_experts - 1
            raise UsageError(f"topk_idx held {wrong}, but expert numbers are -1 (none) to {self._num_experts - 1}")
        if written:
            raise StateError("the tensors of a step were written on the device; read or clone them only")
        if counts:
            raise StateError(
                f"a step published counts that do not fit one another, or exceed {self._max_tokens_per_rank} rows a rank: "
                "memory of the workspace was overwritten"
            )
        if changed:
            raise _changed(INPUTS[changed - 1])
        raise StateError(f"{said}, was written: a kernel stored outside of its tensor")
