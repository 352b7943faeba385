"""What debug mode knows of one workspace, on the device: what it has found there, and what it compares with.

Everything is a PyTorch operator in stream order, so that a captured graph checks as well, and nothing waits for the device.
"""

from __future__ import annotations

from typing import Final

import torch

from tokenferry.errors import StateError, UsageError
from tokenferry.step import StepTensors
from tokenferry.transports.base import SymmetricMemory, TransportSettings

CANARY: Final = 0xA5
LOW, HIGH, WRITTEN, OVERRUN, COUNTS, CHANGED, SCALES, TERM_SCALES, BROUGHT = range(9)
INPUTS: Final = ("hidden", "topk_idx", "topk_weights", "partial")
"""Of the sending halves, numbered from 1 in what the device found."""
COUNT_BITS: Final = 24
"""Of a number of tokens in what the device found of broken promises: rank + 1, then what it brought, then what was promised."""


class Checks:
    """The state of debug mode that a transport and its stand-in under `solo()` share."""

    def __init__(self, settings: TransportSettings, step_tensors: StepTensors, memory: SymmetricMemory | None) -> None:
        self._num_experts, self._packed = settings.config.num_experts, step_tensors.packed
        self._published = step_tensors.packed.clone()
        self._rank, self._size, self._max_tokens_per_rank = settings.group.rank, settings.group.size, settings.max_tokens_per_rank
        device = settings.group.device
        # 64 bits, as wide as an expert number: in 32 the report of 2**40 named a number that nobody had sent.
        self._found = torch.zeros(9, dtype=torch.int64, device=device)
        is_cuda = device.type == "cuda"
        self._mirror = torch.zeros(9, dtype=torch.int64, device="cpu", pin_memory=True) if is_cuda else self._found
        self._has_step = torch.zeros(1, dtype=torch.bool, device=device)
        self._rank_bits = torch.arange(1, self._size + 1, dtype=torch.int64, device=device) << 2 * COUNT_BITS
        self._canaries = None if memory is None else Canaries(memory)

    def step_was_published(self, max_tokens: int | None) -> None:
        """Whether what was published are counts of this workspace, and their sum, this rank's offset and the largest agree; and
        whether they keep this rank's promise, if it gave one."""
        with torch.no_grad():
            self._published.copy_(self._packed)
            self._has_step.fill_(True)
            told, tokens, _ = self._packed.split([3, self._size, self._size])
            wanted = torch.stack([tokens.sum(), tokens[: self._rank].sum(), tokens.max()])
            wrong = ((tokens < 0) | (tokens > self._max_tokens_per_rank)).any() | (told != wanted).any()
            self._found[COUNTS].copy_(torch.maximum(self._found[COUNTS], wrong))
            if max_tokens is not None:
                more = (self._rank_bits + (tokens.long() << COUNT_BITS) + max_tokens) * (tokens > max_tokens)
                self._found[BROUGHT].copy_(torch.maximum(self._found[BROUGHT], more.max()))

    def check_ids(self, topk_idx: torch.Tensor) -> None:
        """Whether all are expert numbers; on CUDA there is no other check of them."""
        if topk_idx.numel():
            low = (topk_idx.min() + 1).clamp(max=0)
            high = (topk_idx.max() - (self._num_experts - 1)).clamp(min=0)
            self._found[LOW].copy_(torch.minimum(self._found[LOW], low))
            self._found[HIGH].copy_(torch.maximum(self._found[HIGH], high))

    def check_scales(self, scales: torch.Tensor) -> None:
        """Whether all can be scales of quantized rows: not negative, and not infinite. A block that held a NaN has a NaN."""
        self._found[SCALES].copy_(torch.maximum(self._found[SCALES], ((scales < 0) | scales.isinf()).any()))

    def check_term_scales(self, scales: torch.Tensor) -> None:
        """The same of partial rows, of which those behind the last token's, V, may hold anything."""
        is_read = torch.arange(scales.shape[0], dtype=torch.int32, device=scales.device) < self._packed[0]
        wrong = (((scales < 0) | scales.isinf()) & is_read.unsqueeze(1)).any()
        self._found[TERM_SCALES].copy_(torch.maximum(self._found[TERM_SCALES], wrong))

    def check_unchanged(self, name: str, tensor: torch.Tensor, before: torch.Tensor) -> bool:
        """False if the host knows at once that `tensor` is not as it was; what the device finds waits for the report.

        PyTorch's counter of writes would not do: a tensor shares it with the whole buffer that it is a slice of, and kernels,
        numpy and inference mode do not count.
        """
        changed = (_bytes(tensor) != _bytes(before)).any()
        if not changed.is_cuda:
            return not changed
        self._found[CHANGED].copy_(torch.maximum(self._found[CHANGED], changed * (INPUTS.index(name) + 1)))
        return True

    def look(self) -> None:
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
            UsageError: an expert number that there is not, a scale that there cannot be, or a rank that brought more tokens than
                this one promised.
            StateError: a step's tensors were written, or memory where no region of the symmetric buffer lies; or a step's counts
                cannot be; or the inputs of a sending half were changed before the receiving half.
        """
        if wait:
            self.look()
        found = (self._found if wait else self._mirror).tolist()
        if not any(found):
            return
        low, high, written, overrun, counts, changed, scales, term_scales, brought = found
        said = self._canaries.describe(overrun) if overrun and self._canaries is not None else ""
        self._start_anew()
        if low or high:
            wrong = low - 1 if low else high + self._num_experts - 1
            raise UsageError(f"topk_idx held {wrong}, but expert numbers are -1 (none) to {self._num_experts - 1}")
        if scales or term_scales:
            name = "hidden" if scales else "partial"
            raise UsageError(f"{name} held a scale below zero, or an infinite one: quantized rows have scales > 0, or NaN")
        if written:
            raise StateError("the tensors of a step were written on the device; read or clone them only")
        if counts:
            raise StateError(
                f"a step published counts that do not fit one another, or exceed {self._max_tokens_per_rank} rows a rank: "
                "memory of the workspace was overwritten"
            )
        if brought:
            raise _promise_broken(brought)
        if changed:
            raise input_changed(INPUTS[changed - 1])
        raise StateError(f"{said}, was written: a kernel stored outside of its tensor")

    def _start_anew(self) -> None:
        if self._found.is_cuda and not torch.cuda.is_current_stream_capturing():
            # Copies to the mirror that are on their way would report the same once more.
            torch.cuda.current_stream(self._found.device).synchronize()
        self._found.zero_()
        self._mirror.zero_()
        self._published.copy_(self._packed)
        if self._canaries is not None:
            self._canaries.restore()

    def forget_memory(self) -> None:
        """Lets go of the symmetric buffer, which is being closed."""
        self._canaries = None


class Canaries:
    """A known byte before, between and behind the regions of a symmetric buffer, where nobody may write."""

    def __init__(self, memory: SymmetricMemory) -> None:
        self._buffer, self._layout = memory.buffer, memory.layout
        device = self._buffer.device
        bytes_between = [byte for gap in self._layout.gaps for byte in gap]
        self._places = torch.tensor(bytes_between, dtype=torch.int64, device=device)
        self._numbers = torch.arange(1, 1 + len(bytes_between), dtype=torch.int32, device=device)
        self.restore()

    def restore(self) -> None:
        self._buffer[self._places] = CANARY

    def last_written(self) -> torch.Tensor:
        """int32 scalar on the device: the number of the last byte that is not as it was, from 1; 0: all are."""
        return ((self._buffer[self._places] != CANARY) * self._numbers).max()

    def describe(self, number: int) -> str:
        place = [byte for gap in self._layout.gaps for byte in gap][number - 1]
        there = {name: region for name, region in self._layout.regions.items() if region.num_bytes}  # scales are not, mostly
        before = [name for name, region in there.items() if region.end <= place]
        after = [name for name, region in there.items() if region.offset > place]
        return (
            f"byte {place} of the symmetric buffer, behind {(before or ['control'])[-1]!r} and before {(after or ['end'])[0]!r}"
        )


def input_changed(name: str) -> StateError:
    """What the receiving half, or the next report, raises if the input `name` of the sending half was written in between."""
    return StateError(
        f"{name} was changed between the two halves; it belongs to the call until its _end has returned: write to another "
        "tensor, or call the whole operation"
    )


def _promise_broken(brought: int) -> UsageError:
    rest, promised = divmod(brought, 1 << COUNT_BITS)
    number, count = divmod(rest, 1 << COUNT_BITS)
    return UsageError(
        f"rank {number - 1} brought {count} tokens to a step for which this rank had promised max_tokens={promised}; give "
        "begin_step the most that any rank brings, padding included, or no max_tokens: without debug mode the results are right, "
        "and slower"
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory: NaNs compare too, and a gradient does not matter."""
    return tensor.detach().reshape(-1).view(torch.uint8)
