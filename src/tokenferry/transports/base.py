"""The seam between a workspace and what moves its rows.

A transport gets arguments that the dispatcher has checked, in an order that the workspace has checked. Shape suffixes:
T rows of this rank (T' of them supplied), R gathered rows, H hidden, K top-k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from tokenferry.config import MoEConfig
from tokenferry.dispatched import SAME, HiddenRows, LoadsToCount, PartialRows, RowFormat
from tokenferry.errors import PeerError, PeerFailedError, PeerTimeoutError, StateError
from tokenferry.groups import EPGroup
from tokenferry.step import Announced, StepRequest, StepTensors
from tokenferry.telemetry.recorder import Recorder
from tokenferry.transports.symmetric.layout import Layout

CombineOrder = Literal["rank", "any"]
Counts = Literal["uneven", "equal"]

PROTOCOL_VERSION = 5
"""Raised when ranks of an older release could not understand this one; compared when a workspace opens."""


@dataclass(frozen=True, kw_only=True)
class TransportSettings:
    """All that a transport is opened with. `name` is agreed between the ranks and unique to this workspace and generation."""

    config: MoEConfig
    group: EPGroup
    max_tokens_per_rank: int
    combine_dtype: torch.dtype
    combine_order: CombineOrder
    counts: Counts
    timeout_s: float
    open_timeout_s: float
    """Of this opening: a reset may have one of its own."""
    longest_wait_s: float
    """What signs of life of busy ranks can make of a time-out."""
    max_ctas: int | None
    name: str
    generation: int
    debug: bool = False
    index_dtype: torch.dtype = torch.int32
    """Of the gathered expert numbers."""
    result_dtype: torch.dtype = torch.bfloat16
    """Of combined rows: of each sum, rounded once."""
    dispatch_format: RowFormat = SAME
    """Of rows while they travel, and as a dispatch returns them."""
    recorder: Recorder | None = None
    """Where waits are noted; None without telemetry."""


@dataclass(frozen=True)
class Gathered:
    """All ranks' rows, as in `Dispatched`."""

    hidden_RH: Any
    """A tensor, or `QuantizedRows` where the format says so."""
    topk_idx_RK: torch.Tensor
    topk_weights_RK: torch.Tensor
    loads: LoadsToCount | None = None
    """With telemetry."""


@dataclass(frozen=True)
class SymmetricMemory:
    """The memory that the peers of a symmetric transport write to: debug mode watches it, tests and benchmarks look at it.

    Attributes:
        buffer: this rank's whole buffer, uint8.
        layout: what lies where in it.
        is_virtual: whether the ranks are threads that share one GPU.
    """

    buffer: torch.Tensor
    layout: Layout
    is_virtual: bool


class Transport(ABC):
    """Moves rows. One step at a time; within it, dispatch and combine alternate strictly.

    The dispatcher has checked the arguments, and the workspace the order of calls. Whoever writes a transport of their own
    implements the abstract members; the others have defaults, which are right for one that gains nothing from doing better. To
    change what another transport does, derive from `wrapper.TransportWrapper`: docs/transports.md has an example.
    """

    name: str
    """As in `Workspace.transport` and in the decisions."""

    launched: bool = False
    """Whether the operation under way has launched or sent something, or dropped what it cannot get back: if it then raises, the
    workspace is broken; if not, it stands where it stood. Set before that happens; the caller clears it before each operation."""

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it holds for as long as it is open."""

    @property
    def fixed_rows(self) -> Gathered | None:
        """What every dispatch returns, if that is always the same tensors."""
        return None

    @property
    def rows_per_token(self) -> int | None:
        """The number n for which every dispatch returns R = n * T rows. None where R depends on the other ranks' counts, or
        `fixed_rows` says it."""
        return None

    @property
    def counts_pass_through_hosts(self) -> bool:
        """Whether the ranks' counts pass through their hosts. Then `announce` exchanges them, a graph holds steps of equal counts
        alone, and is warmed up with the peers."""
        return False

    @property
    def tokens_per_rank(self) -> tuple[int, ...] | None:
        """The counts of the step under way, where the host knows them. None where only the device does."""
        return None

    @property
    def memory(self) -> SymmetricMemory | None:
        """The memory that its peers write to. None where they write to none."""
        return None

    @property
    def innermost(self) -> Transport:
        """The transport inside all wrappers, for tests and measurements of one kind of transport."""
        return self

    # --- a step -----------------------------------------------------------------------------------------------------

    def announce(self, request: StepRequest) -> Announced | None:
        """Exchanges every rank's counts for the next step ahead of it, so that the hosts know them; `begin_step` of the same
        request then need not. None, with nothing sent, where this transport's ranks choose alone."""
        return None

    @abstractmethod
    def begin_step(self, request: StepRequest, layer: int) -> None:
        """Exchanges counts and publishes them in the step tensors."""

    @abstractmethod
    def dispatch_begin(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """Starts to send [T', H], [T', K] int32 or int64, [T', K] float; T' <= T. Keeps the tensors until `dispatch_end`. Hidden
        rows are what the dispatch format takes: quantized or yet to be, or bytes."""

    @abstractmethod
    def dispatch_end(self) -> Gathered:
        """Everybody's rows."""

    @abstractmethod
    def combine_input(self) -> PartialRows:
        """[R, H] in `combine_dtype`, to be filled by the experts; the same memory until the next step. `QuantizedRows` of
        float8."""

    @abstractmethod
    def combine_begin(self, partial: PartialRows) -> None:
        """Starts to send the partial rows to their owners, [R, H]; where `fixed_rows` says R, any number of rows from this rank's
        T to R, of which V must be there. Keeps the tensor until `combine_end`. With float8 terms they may be `QuantizedRows`."""

    @abstractmethod
    def combine_end(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The combined [T', H] in `result_dtype`: a new tensor, or `out`, which has this shape and dtype, is contiguous, and
        overlaps neither the partial rows nor the gathered ones."""

    def dispatch(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Gathered:
        """Both halves, with nothing between."""
        self.dispatch_begin(layer, hidden, topk_idx, topk_weights)
        return self.dispatch_end()

    def combine(self, partial: PartialRows, out: torch.Tensor | None = None) -> torch.Tensor:
        """Both halves, with nothing between."""
        self.combine_begin(partial)
        return self.combine_end(out)

    def counts_in_combine(self, loads: LoadsToCount) -> bool:
        """With telemetry: whether the next combine adds the expert numbers of the dispatch under way to `loads`, within what it
        launches anyway. If not, whoever asks must. Nothing is added while the recorder is stopped, by a graph neither."""
        return False

    def watching_replay(self) -> AbstractContextManager[None]:
        """Around the launch of a graph that was captured with this transport: what was announced is used up by it, and a peer
        that does not come is noticed as in an eager call."""
        return nullcontext()

    def watching_step(self) -> AbstractContextManager[None]:
        """Around a step of an engine, which may replay graphs captured with this transport and then wait for the device, with no
        call of this transport: a peer that does not come is noticed, and the device is not left waiting for it."""
        return nullcontext()

    @abstractmethod
    def solo(self) -> Transport:
        """One of the same shapes that communicates with nobody, for warm-up and capture. It lives on what this one holds."""

    # --- peers ------------------------------------------------------------------------------------------------------

    def give_sign_of_life(self) -> None:
        """Tells peers that wait, and do not look into the store for it, that this rank is busy and alive. From any thread, also
        while a graph is captured; waits for nothing. One thread at a time calls it, or `set_timeout`."""
        return

    def set_timeout(self, timeout_s: float) -> None:
        """How long a peer may be late from now on, in waits under way and in captured graphs too. From any thread, one at a time.

        Raises:
            ConfigError: it cannot wait so long; nothing has changed.
        """
        return

    @abstractmethod
    def check(self) -> None:
        """Raises the `PeerError` that has occurred, if any."""

    def check_known(self) -> None:
        """Raises the `PeerError` that lies in this host's memory already, if any. Where there is none it asks neither the device
        nor a peer, and takes about a microsecond. From any thread."""
        return

    @abstractmethod
    def fail(self, reason: str) -> None:
        """Tells the peers that this rank gives up."""

    @abstractmethod
    def abort(self) -> None:
        """Ends the waiting of the threads that are inside, which get StateError, since the workspace is being closed; tells the
        peers, who wait for what these threads did. Nothing is released. Never waits for a peer; from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Releases everything, once what this rank has launched has ended; waits for nothing else of a peer. No thread is inside,
        unless within this very call."""


class TransportFactory(Protocol):
    """What `Workspace(transport=...)` takes beside a name. Every rank gives one of the same `name`.

    It opens a transport anew at each opening and each reset, so that it must not keep one. It may serve several workspaces.
    """

    @property
    def name(self) -> str:
        """Becomes `Workspace.transport`, and is compared between the ranks."""

    def open(self, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
        """Opens a transport, on all ranks of `settings.group` together. What is named in the group's store or channel begins
        with `settings.name`, which no other workspace and no earlier attempt has. To open one of tokenferry's own within it, call
        `opening.open_transport`.

        Raises:
            ConfigError: no transport of this kind can serve these settings; raised by `Workspace(...)` on every rank.
            PeerError: another rank is the cause; raised as it is.
            Exception: it cannot be opened here; `Workspace(...)` raises TransportUnavailableError on every rank.
        """


def closed_meanwhile() -> StateError:
    """What a thread raises that was inside when another one closed the workspace."""
    return StateError("the workspace was closed by another thread while this call was inside; open a new Workspace")


@dataclass(frozen=True)
class AbortRecord:
    """Why a group gave up: written once, by the first who noticed, and believed by all."""

    rank: int
    reporter: int
    phase: str
    step: int
    layer: int
    waited_s: float
    reason: str = ""
    """Empty for a rank that is late; else what it failed with."""
    detail: str = ""
    """What else is known of a rank that is late."""

    def error_for(self, rank: int) -> PeerError:
        """What `rank` raises: the blamed rank itself learns that it was given up."""
        phase = self.phase
        if rank == self.rank and rank != self.reporter:
            reason = self.reason or f"rank {self.reporter} waited {self.waited_s:.1f} s for this rank ({phase}) and gave up"
            return PeerFailedError(self.rank, reason, self.step, phase)  # type: ignore[arg-type]
        if self.reason:
            return PeerFailedError(self.rank, self.reason, self.step, phase)  # type: ignore[arg-type]
        return PeerTimeoutError(self.rank, phase, self.step, self.layer, self.waited_s, self.detail)  # type: ignore[arg-type]


def empty_like_routing(settings: TransportSettings, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of -1 and weights of zero for rows that carry nothing."""
    topk, device = settings.config.topk, settings.group.device
    return (
        torch.full((num_rows, topk), -1, dtype=torch.int32, device=device),
        torch.zeros((num_rows, topk), dtype=torch.float32, device=device),
    )


def mask_padding(topk_idx: torch.Tensor, num_real_tokens: int | torch.Tensor) -> torch.Tensor:
    """`topk_idx` as a new int32 tensor with -1 in the padding rows, and for a number that no int32 holds.

    Reads a device scalar on the device.
    """
    masked = topk_idx.to(torch.int32, copy=True)
    if topk_idx.dtype != torch.int32:
        masked.masked_fill_(masked != topk_idx, -1)  # cut off, 2**32 + 3 would be expert 3
    if isinstance(num_real_tokens, int):
        if num_real_tokens < masked.shape[0]:
            masked[num_real_tokens:] = -1
        return masked
    rows = torch.arange(masked.shape[0], device=masked.device, dtype=torch.int32)
    return masked.masked_fill_((rows >= num_real_tokens).unsqueeze(1), -1)


__all__ = [
    "PROTOCOL_VERSION",
    "AbortRecord",
    "Announced",
    "CombineOrder",
    "Counts",
    "Gathered",
    "StepRequest",
    "StepTensors",
    "SymmetricMemory",
    "Transport",
    "TransportFactory",
    "TransportSettings",
    "closed_meanwhile",
    "empty_like_routing",
    "mask_padding",
]
