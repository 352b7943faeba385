"""One rank's rounds over symmetric memory: which kernel is launched when, with which arguments. Nothing here looks at a peer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenferry.kernels import wire
from tokenferry.kernels.launch import Bound, Launch
from tokenferry.step import StepRequest, StepTensors
from tokenferry.transports.base import Gathered, SymmetricMemory, Transport, TransportSettings
from tokenferry.transports.symmetric.buffer import SymmetricBuffer
from tokenferry.transports.symmetric.layout import Layout


@dataclass(frozen=True)
class Kernels:
    """Everything that a workspace may launch, loaded."""

    counts: Launch
    abort: Launch
    dispatch: dict[tuple[torch.dtype, torch.dtype], Launch]
    """By dtype of topk_idx and of topk_weights."""
    dispatch_alone: dict[tuple[torch.dtype, torch.dtype], Launch]
    """The same without multicast, for `solo`: a multicast store reaches every rank, whoever the kernel takes its peers for."""
    combine: dict[torch.dtype, Launch]
    """By dtype of the partial rows."""


@dataclass(frozen=True)
class Views:
    """The regions that callers see, as tensors."""

    gathered: Gathered
    terms_RH: torch.Tensor


@dataclass(frozen=True)
class Place:
    """Who the kernels run as: this rank among its peers, or rank 0 of 1 in `solo`.

    Everything by which a kernel could reach another rank stands here. Once `solo` kept the group's table of buffers and its
    multicast address: the warm-up rows of rank 1 lay in rank 0's gathered ids, and over multicast in every peer's slots.

    Attributes:
        peers: address of the table of buffers, `size` of them.
        cast: of the multicast mapping, 0 if there is none or nobody to reach.
    """

    rank: int
    size: int
    state: int
    block: int
    peers: int
    cast: int


class Rounds(Transport):
    """Issues the kernels of one rank. What `Solo` and `SymmetricTransport` share: nothing here looks at a peer's state."""

    name = "solo"

    def __init__(
        self,
        settings: TransportSettings,
        step_tensors: StepTensors,
        buffer: SymmetricBuffer,
        layout: Layout,
        kernels: Kernels,
        views: Views,
        place: Place,
        grid: int,
    ) -> None:
        self._settings, self._step_tensors, self._buffer, self._layout = settings, step_tensors, buffer, layout
        self._kernels, self._views, self._place, self._grid = kernels, views, place, grid
        self._request = StepRequest(0, 0, 0)
        self._layer, self._num_supplied = -1, 0
        self._partial: torch.Tensor | None = None
        self._sent_dtypes = torch.int64, torch.float32
        self._sending: tuple[torch.Tensor, ...] = ()
        config = settings.config
        self._dispatch_alignment = 16 if config.hidden_size * config.dtype.itemsize % 16 == 0 else 8
        self._num_real = place.state + wire.STATE_NUM_REAL.value
        self._terms_address = views.terms_RH.data_ptr()
        self._counts, self._dispatches, self._combines = self._bind()

    def _bind(self) -> tuple[Bound, dict[tuple[torch.dtype, torch.dtype], Bound], dict[torch.dtype, Bound]]:
        """The launches, with all arguments in place that never change."""
        place, layout, buffer, kernels = self._place, self._layout, self._buffer, self._kernels
        group = self._settings.group
        common = {
            "own": buffer.address,
            "peers": place.peers,
            "rank": place.rank,
            "size": place.size,
            "state": place.state,
            "block": place.block,
        }
        counts = kernels.counts.bind(
            1,
            **common,
            public=self._step_tensors.packed.data_ptr(),
            public_rank=group.rank,
            public_size=group.size,
            generation=self._settings.generation,
        )
        rows = {**common, "counts": layout.counts.offset, "slot_rows": layout.slot_rows}
        dispatch = {
            **rows,
            "cast": place.cast,
            "arrived": layout.arrived.offset,
            "slots": layout.dispatch_slots.offset,
            "slot_bytes": layout.dispatch_slot_bytes,
            "out_hidden": layout.hidden.offset,
            "out_idx": layout.topk_idx.offset,
            "out_weights": layout.topk_weights.offset,
        }
        combine = {
            **rows,
            "cast": place.cast,
            "ready": layout.ready.offset,
            "slots": layout.combine_slots.offset,
            "slot_bytes": layout.combine_slot_bytes,
            "terms": layout.terms.offset,
        }
        dispatches = kernels.dispatch if place.size > 1 else kernels.dispatch_alone
        return (
            counts,
            {dtypes: launch.bind(self._grid, **dispatch) for dtypes, launch in dispatches.items()},
            {dtype: launch.bind(self._grid, **combine) for dtype, launch in kernels.combine.items()},
        )

    def at(self, place: Place, kind: type[Rounds] | None = None) -> Rounds:
        """The same buffer and kernels, run from another place: alone, or for measurements."""
        return (kind or Rounds)(
            self._settings, self._step_tensors, self._buffer, self._layout, self._kernels, self._views, place, self._grid
        )

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes + self._step_tensors.nbytes

    @property
    def fixed_rows(self) -> Gathered:
        """See `Transport`."""
        return self._views.gathered

    @property
    def memory(self) -> SymmetricMemory:
        return SymmetricMemory(self._buffer.tensor, self._layout, self._buffer.is_virtual)

    def begin_step(self, request: StepRequest, layer: int) -> None:
        self._request = request
        place = self._place
        if isinstance(request.num_real_tokens, int):
            known_real, self._num_real = request.num_real_tokens, place.state + wire.STATE_NUM_REAL.value
        else:  # read when the kernels run
            known_real, self._num_real = 0, request.num_real_tokens.data_ptr()
        self.launched = True
        self._counts(request.num_tokens, request.flags, known_real)

    def dispatch(self, layer: int, hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Gathered:
        self._send_rows(layer, hidden, topk_idx, topk_weights, wire.WHOLE)
        return self._views.gathered

    def dispatch_begin(self, layer: int, hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        self._sending = (hidden, topk_idx, topk_weights)  # kept: another stream may get the memory of what the caller drops
        self._send_rows(layer, hidden, topk_idx, topk_weights, wire.SEND.value)
        self._sent_dtypes = topk_idx.dtype, topk_weights.dtype

    def dispatch_end(self) -> Gathered:
        self.launched = True
        self._dispatches[self._sent_dtypes](0, 0, 0, 0, self._num_real, self._layer, wire.RECEIVE.value)
        for tensor in self._sending:
            if tensor.is_cuda:  # it may have been made on another stream, which would hand its memory on at once
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self._sending = ()
        return self._views.gathered

    def _send_rows(self, layer: int, hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, part: int) -> None:
        self._layer, self._num_supplied = layer, hidden.shape[0]
        address = hidden.data_ptr()
        if address % self._dispatch_alignment:
            hidden = hidden.clone()
            address = hidden.data_ptr()
        self.launched = True
        self._dispatches[topk_idx.dtype, topk_weights.dtype](
            address, topk_idx.data_ptr(), topk_weights.data_ptr(), self._num_supplied, self._num_real, layer, part
        )

    def combine_input(self) -> torch.Tensor:
        return self._views.terms_RH

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        return self._combine(_aligned(partial), wire.WHOLE)

    def combine_begin(self, partial: torch.Tensor) -> None:
        self._partial = partial = _aligned(partial)
        self.launched = True
        self._combines[partial.dtype](partial.data_ptr(), self._is_in_place(partial), 0, 0, self._layer, wire.SEND.value)

    def combine_end(self) -> torch.Tensor:
        partial = self._partial
        assert partial is not None, "the workspace orders the halves"
        combined = self._combine(partial, wire.RECEIVE.value)
        self._partial = None
        if partial.is_cuda:  # it may be a copy of our own, made on the stream of `combine_begin`
            partial.record_stream(torch.cuda.current_stream(partial.device))
        return combined

    def _combine(self, partial: torch.Tensor, part: int) -> torch.Tensor:
        settings, num_rows = self._settings, self._num_supplied
        config = settings.config
        out = torch.empty((num_rows, config.hidden_size), dtype=config.dtype, device=settings.group.device)
        in_place = self._is_in_place(partial)
        self.launched = True
        self._combines[partial.dtype](partial.data_ptr(), in_place, out.data_ptr(), num_rows, self._layer, part)
        return out

    def _is_in_place(self, partial: torch.Tensor) -> bool:
        return partial.data_ptr() == self._terms_address and partial.dtype == self._settings.combine_dtype

    def check(self) -> None:
        return

    def solo(self) -> Rounds:
        return self

    def fail(self, reason: str) -> None:
        return

    def abort(self) -> None:
        return

    def close(self) -> None:
        self._partial, self._sending = None, ()


class Solo(Rounds):
    """Rounds of this rank alone. The experts' terms go elsewhere: a slow peer may still fetch the last step's."""

    def combine_input(self) -> torch.Tensor:
        terms_RH = self._views.terms_RH
        if terms_RH.data_ptr() == self._layout.terms.offset + self._buffer.address:
            with torch.inference_mode(False):  # a later layer may fill it outside of the mode
                terms_RH = torch.empty_like(terms_RH)
            self._views = Views(self._views.gathered, terms_RH)
        return terms_RH


def _aligned(partial: torch.Tensor) -> torch.Tensor:
    """Partial rows that packets can be loaded from."""
    return partial.clone() if partial.data_ptr() % 16 else partial
