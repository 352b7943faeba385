"""The counts of one step: how many rows every rank brings, as device tensors at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenferry.errors import CapacityError, DeviceError, DtypeError, ShapeError, StateError, UsageError

FLAG_DONE = 1
"""This rank has no work of its own left; it takes part for the others' sake."""
FLAG_FAILED = 2
"""This rank gave up in this step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One model forward. The tensors are int32, shared by all steps of a workspace, and not to be written.

    Attributes:
        index: the step's number, from 1.
        num_tokens: T, this rank's rows.
        num_real_tokens: rows of T that carry tokens: an int, or a device int32[1] read when the kernels run.
        valid_tokens: [1] V, all ranks' rows.
        rank_token_offset: [1] where this rank's rows start among the V.
        max_tokens: [1] the largest T of a rank.
        tokens_per_rank: [EP] every rank's T.
        flags_per_rank: [EP] bit 0: done, bit 1: failed.
        max_expert_rows: most rows that an expert can get, by the promise given to this rank's `begin_step`: `max_tokens`·EP.
            None: there is no promise.
    """

    index: int
    num_tokens: int
    num_real_tokens: int | torch.Tensor
    valid_tokens: torch.Tensor
    rank_token_offset: torch.Tensor
    max_tokens: torch.Tensor
    tokens_per_rank: torch.Tensor
    flags_per_rank: torch.Tensor
    max_expert_rows: int | None = None

    @property
    def summary(self) -> torch.Tensor:
        """[3] `valid_tokens`, `rank_token_offset` and `max_tokens` as one tensor, at the same fixed address."""
        return self.valid_tokens.as_strided((3,), (1,))

    def all_done(self) -> bool:
        """Whether every rank had set its done flag. Waits for the device: for idle ranks, not for the hot path."""
        return bool((self.flags_per_rank & FLAG_DONE).bool().all().item())


@dataclass(frozen=True)
class StepRequest:
    """What one rank brings to `begin_step`."""

    index: int
    num_tokens: int
    num_real_tokens: int | torch.Tensor
    done: bool = False
    equal: bool = False
    """Every rank promises the same `num_tokens`: nothing need be exchanged."""
    max_tokens: int | None = None
    """This rank's host promises that no rank brings more. Not exchanged: ranks need not give the same, or any."""

    @property
    def flags(self) -> int:
        """The flag bits of the packet."""
        return FLAG_DONE if self.done else 0


@dataclass(frozen=True)
class Announced:
    """What all ranks will bring to the next step, known to the host.

    Attributes:
        tokens_per_rank: in rank order.
        all_done: every rank had set its done flag.
    """

    tokens_per_rank: tuple[int, ...]
    all_done: bool


class StepTensors:
    """The one int32 tensor behind all `Step`s of a workspace: [V, offset, max, T_0 .. T_EP-1, flags_0 .. flags_EP-1]."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self._rank, self._size = rank, size
        self.packed = torch.zeros(3 + 2 * size, dtype=torch.int32, device=device)
        self._views = self.packed.split([1, 1, 1, size, size])  # made once: five slices take eight microseconds

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.packed.nbytes

    @property
    def num_writes(self) -> int:
        """Writes by PyTorch operators so far, through whatever view; kernels and replayed graphs do not count."""
        return 0 if self.packed.is_inference() else self.packed._version

    def check_unwritten(self, step: Step, num_writes: int) -> None:
        """Raises StateError if the tensors were written since `step` was published, when `num_writes` was their number."""
        more = self.num_writes - num_writes
        if more:
            raise StateError(f"the tensors of step {step.index} were written {more} times; read or clone them only")

    def publish(self, tokens_per_rank: Sequence[int], flags_per_rank: Sequence[int]) -> None:
        """Writes host-known counts. One copy, in stream order."""
        offset = sum(tokens_per_rank[: self._rank])
        values = [sum(tokens_per_rank), offset, max(tokens_per_rank), *tokens_per_rank, *flags_per_rank]
        self.packed.copy_(torch.tensor(values, dtype=torch.int32, device="cpu"), non_blocking=True)

    def per_token(self) -> torch.Tensor:
        """A new tensor with what `packed` holds when every rank brings one row and has no flags."""
        size = self._size
        return torch.tensor([size, self._rank, 1, *[1] * size, *[0] * size], dtype=torch.int32, device=self.packed.device)

    def publish_equal(self, num_tokens: int, flags: int, per_token: torch.Tensor | None = None) -> None:
        """Writes equal counts. Nothing comes from host memory, so that a graph may capture it; with `per_token()`, made before,
        it is one launch."""
        size = self._size
        if per_token is not None:
            torch.mul(per_token, num_tokens, out=self.packed)
            if flags:
                self.packed[3 + size :].fill_(flags)
            return
        self.packed[0].fill_(num_tokens * size)
        self.packed[1].fill_(num_tokens * self._rank)
        self.packed[2 : 3 + size].fill_(num_tokens)
        self.packed[3 + size :].fill_(flags)

    def view(self, request: StepRequest) -> Step:
        """The step as users see it."""
        valid_tokens, rank_token_offset, max_tokens, tokens_per_rank, flags_per_rank = self._views
        step = object.__new__(Step)  # as its constructor does, which takes two microseconds for a frozen class
        step.__dict__.update(
            index=request.index,
            num_tokens=request.num_tokens,
            num_real_tokens=request.num_real_tokens,
            valid_tokens=valid_tokens,
            rank_token_offset=rank_token_offset,
            max_tokens=max_tokens,
            tokens_per_rank=tokens_per_rank,
            flags_per_rank=flags_per_rank,
            max_expert_rows=None if request.max_tokens is None else request.max_tokens * self._size,
        )
        return step

    def traced(self, num_tokens: int, num_real_tokens: int | torch.Tensor | None, promised: int | None) -> Step:
        """The same for code that is being compiled: slices made there, and an index of 0, for it is not known when tracing."""
        size = self._size
        real = num_tokens if num_real_tokens is None else num_real_tokens
        valid_tokens, rank_token_offset, max_tokens, tokens_per_rank, flags_per_rank = self.packed.split([1, 1, 1, size, size])
        return Step(
            index=0,
            num_tokens=num_tokens,
            num_real_tokens=real,
            valid_tokens=valid_tokens,
            rank_token_offset=rank_token_offset,
            max_tokens=max_tokens,
            tokens_per_rank=tokens_per_rank,
            flags_per_rank=flags_per_rank,
            max_expert_rows=None if promised is None else promised * size,
        )


def checked_counts(
    num_tokens: int, num_real_tokens: int | torch.Tensor | None, max_tokens_per_rank: int, device: torch.device
) -> int | torch.Tensor:
    """What `begin_step` is given, checked.

    Returns:
        `num_real_tokens`; its default is `num_tokens`.
    """
    if not isinstance(num_tokens, int) or isinstance(num_tokens, bool):
        raise UsageError(f"num_tokens must be an int, got {num_tokens!r}")
    if num_tokens < 0:
        raise ShapeError(f"num_tokens must be an int >= 0, got {num_tokens}")
    if num_tokens > max_tokens_per_rank:
        raise CapacityError(
            f"num_tokens is {num_tokens} but the workspace was opened for {max_tokens_per_rank}; "
            f"open it with max_tokens_per_rank={num_tokens} or split the step"
        )
    if num_real_tokens is None:
        return num_tokens
    if isinstance(num_real_tokens, torch.Tensor):
        _check_scalar(num_real_tokens, device)
        return num_real_tokens
    if not isinstance(num_real_tokens, int) or isinstance(num_real_tokens, bool):
        raise UsageError(f"num_real_tokens must be an int or an int32 tensor, got {num_real_tokens!r}")
    if not 0 <= num_real_tokens <= num_tokens:
        raise CapacityError(f"num_real_tokens must lie between 0 and num_tokens, {num_tokens}; got {num_real_tokens!r}")
    return num_real_tokens


def check_promise(max_tokens: int | None, num_tokens: int, max_tokens_per_rank: int) -> None:
    """Raises UsageError or CapacityError for a `max_tokens` that no rank can promise; the others' counts are not known."""
    if max_tokens is None:
        return
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool):
        raise UsageError(f"max_tokens must be an int or None, got {max_tokens!r}")
    if not num_tokens <= max_tokens <= max_tokens_per_rank:
        raise CapacityError(
            f"max_tokens must lie between this rank's num_tokens, {num_tokens}, and the workspace's max_tokens_per_rank, "
            f"{max_tokens_per_rank}; got {max_tokens}: give the most tokens that any rank brings to this step, or None"
        )


def _check_scalar(num_real_tokens: torch.Tensor, device: torch.device) -> None:
    if num_real_tokens.dtype != torch.int32:
        raise DtypeError(f"num_real_tokens must be an int or torch.int32, got {num_real_tokens.dtype}")
    if num_real_tokens.numel() != 1:
        raise ShapeError(f"num_real_tokens must have one element, got {num_real_tokens.numel()}")
    if num_real_tokens.device != device:
        raise DeviceError(f"num_real_tokens is on {num_real_tokens.device} but the workspace is on {device}")
