"""One rank's steps over symmetric memory: which kernel is launched when, with which arguments. Nothing here looks at a peer."""

from __future__ import annotations

import torch

from tokenferry.dispatched import HiddenRows, LoadsToCount, PartialRows, QuantizedRows, empty_terms
from tokenferry.kernels.control_block import NUM_REAL_OFFSET
from tokenferry.kernels.launch import BoundLaunch
from tokenferry.step import StepRequest
from tokenferry.transports.base import Gathered, SymmetricMemory, Transport
from tokenferry.transports.symmetric.bound_launches import RankView, Resources, bind_launches
from tokenferry.transports.symmetric.loading import Given
from tokenferry.transports.symmetric.regions import RegionTensors

PACKET_BYTES = 16
"""Partial rows are loaded in packets of this size, and sums stored, at addresses that are multiples of it."""


class RankKernels(Transport):
    """Issues the kernels of one rank, which runs as `view` says. `SymmetricTransport` adds what concerns the peers."""

    name = "solo"

    def __init__(self, resources: Resources, view: RankView, regions: RegionTensors) -> None:
        settings, config = resources.settings, resources.settings.config
        self.view = view
        self._resources, self._regions = resources, regions
        self._settings, self._buffer, self._layout = settings, resources.buffer, resources.layout
        self._request = StepRequest(0, 0, 0)
        self._layer, self._num_supplied = -1, 0
        self._partial: PartialRows | None = None
        self._given: Given = (torch.int64, torch.float32, False)
        self._sending: tuple[torch.Tensor, ...] = ()
        self._dispatch_alignment = 16 if settings.dispatch_format.wire_bytes(config) % 16 == 0 else 8
        self._num_real_ptr = view.counters_ptr + NUM_REAL_OFFSET
        self._terms = terms = regions.terms_RH
        first, last = (terms.values, terms.scales) if isinstance(terms, QuantizedRows) else (terms, terms)
        self._terms_address, self._terms_end = first.data_ptr(), last.data_ptr() + _bytes_spanned(last)
        self._no_loads: tuple[int, ...] = () if settings.recorder is None else (0,)
        self._loads: tuple[int, ...] = self._no_loads
        """With telemetry: the address at which the next combine counts, 0 if it shall not."""
        self._launches = bind_launches(resources, view)
        self._dispatches, self._combines = self._launches.dispatch, self._launches.combine

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes + self._resources.step_tensors.nbytes

    @property
    def grid(self) -> int:
        """Programs of a dispatch or combine launch, the same on all ranks; fewer where this rank brings few tokens."""
        return self._resources.kernels.rows.grid

    @property
    def fixed_rows(self) -> Gathered:
        return self._regions.gathered

    @property
    def memory(self) -> SymmetricMemory:
        return SymmetricMemory(self._buffer.tensor, self._layout, self._buffer.is_virtual)

    def begin_step(self, request: StepRequest, layer: int) -> None:
        self._request = request
        if isinstance(request.num_real_tokens, int):
            known_real, self._num_real_ptr = request.num_real_tokens, self.view.counters_ptr + NUM_REAL_OFFSET
        else:  # read when the kernels run
            known_real, self._num_real_ptr = 0, request.num_real_tokens.data_ptr()
        self._dispatches = self._launches.dispatch_for(request.num_tokens)
        self._combines = self._launches.combine_for(request.num_tokens)
        self.launched = True
        self._launches.counts(request.num_tokens, request.flags, known_real)

    def dispatch(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Gathered:
        self._send_rows(self._dispatches.both, layer, hidden, topk_idx, topk_weights)
        return self._regions.gathered

    def dispatch_begin(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        parts = (hidden.values, hidden.scales) if isinstance(hidden, QuantizedRows) else (hidden,)
        self._sending = (*parts, topk_idx, topk_weights)  # kept: another stream may get the memory of what the caller drops
        self._send_rows(self._dispatches.send, layer, hidden, topk_idx, topk_weights)
        self._given = topk_idx.dtype, topk_weights.dtype, len(parts) == 2

    def dispatch_end(self) -> Gathered:
        self.launched = True
        self._dispatches.receive[self._given](self._num_real_ptr, self._layer)
        for tensor in self._sending:
            if tensor.is_cuda:  # it may have been made on another stream, which would hand its memory on at once
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self._sending = ()
        return self._regions.gathered

    def _send_rows(
        self,
        launches: dict[Given, BoundLaunch],
        layer: int,
        hidden: HiddenRows,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> None:
        self._layer, self._num_supplied = layer, hidden.shape[0]
        if isinstance(hidden, QuantizedRows):
            is_quantized, address, scales_ptr = True, hidden.values.data_ptr(), hidden.scales.data_ptr()
        else:
            is_quantized, address, scales_ptr = False, hidden.data_ptr(), 0
        if (address | scales_ptr) % self._dispatch_alignment:
            self._send_rows(launches, layer, hidden.clone(), topk_idx, topk_weights)
            return
        self.launched = True
        launches[topk_idx.dtype, topk_weights.dtype, is_quantized](
            address, scales_ptr, topk_idx.data_ptr(), topk_weights.data_ptr(), self._num_supplied, self._num_real_ptr, layer
        )

    def counts_in_combine(self, loads: LoadsToCount) -> bool:
        if self._layout.dispatch_slot_rows < self._layout.slot_rows:
            return False  # of a dispatch in bulk and a combine in slots, peers may overwrite numbers as soon as they have terms
        self._loads = (loads.words.data_ptr() + loads.first * loads.words.element_size(),)
        return True

    def _take_loads(self) -> tuple[int, ...]:
        loads, self._loads = self._loads, self._no_loads
        return loads

    def combine_input(self) -> PartialRows:
        return self._regions.terms_RH

    def combine(self, partial: PartialRows, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._combine(self._combines.both, self._readable(partial), out, self._take_loads())

    def combine_begin(self, partial: PartialRows) -> None:
        self._partial = partial = self._readable(partial)
        values, scales = _address_and_scales(partial)
        self.launched = True
        self._combines.send[partial.dtype](
            values, partial.shape[0], self._is_in_place(partial), self._layer, *scales, *self._take_loads()
        )

    def combine_end(self, out: torch.Tensor | None = None) -> torch.Tensor:
        partial = self._partial
        assert partial is not None, "the workspace orders the halves"
        combined = self._combine(self._combines.receive, partial, out, self._no_loads)
        self._partial = None
        for tensor in (partial.values, partial.scales) if isinstance(partial, QuantizedRows) else (partial,):
            if tensor.is_cuda:  # it may be a copy of our own, made on the stream of `combine_begin`
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return combined

    def _combine(
        self,
        launches: dict[torch.dtype, BoundLaunch],
        partial: PartialRows,
        wanted: torch.Tensor | None,
        loads: tuple[int, ...],
    ) -> torch.Tensor:
        settings, num_rows, out = self._settings, self._num_supplied, wanted
        if out is None or out.data_ptr() % PACKET_BYTES:
            shape = num_rows, settings.config.hidden_size
            out = torch.empty(shape, dtype=settings.result_dtype, device=settings.group.device)
        in_place = self._is_in_place(partial)
        values, scales = _address_and_scales(partial)
        self.launched = True
        launches[partial.dtype](values, partial.shape[0], in_place, out.data_ptr(), num_rows, self._layer, *scales, *loads)
        return out if wanted is None or wanted is out else wanted.copy_(out)

    def _readable(self, partial: PartialRows) -> PartialRows:
        """Partial rows that packets can be loaded from, and that no copy to the terms' regions writes over meanwhile."""
        parts = (partial.values, partial.scales) if isinstance(partial, QuantizedRows) else (partial,)
        addresses = [part.data_ptr() for part in parts]
        lies_there = any(self._terms_address <= address < self._terms_end for address in addresses)
        lies_askew = lies_there and not self._is_in_place(partial)
        return partial.clone() if lies_askew or addresses[0] % PACKET_BYTES else partial

    def _is_in_place(self, partial: PartialRows) -> bool:
        terms = self._terms
        if isinstance(partial, QuantizedRows):
            if not isinstance(terms, QuantizedRows) or partial.values.data_ptr() != terms.values.data_ptr():
                return False
            same_rows = partial.scales.stride(0) == terms.scales.stride(0) or partial.shape[0] == 1
            return same_rows and partial.scales.data_ptr() == terms.scales.data_ptr()
        return partial.data_ptr() == self._terms_address and partial.dtype == self._settings.combine_dtype

    def check(self) -> None:
        return

    def solo(self) -> RankKernels:
        return self

    def fail(self, reason: str) -> None:
        return

    def abort(self) -> None:
        return

    def close(self) -> None:
        self._partial, self._sending = None, ()


class SoloKernels(RankKernels):
    """This rank alone. The experts' terms go to a tensor of their own: a slow peer may still fetch the last step's terms."""

    def combine_input(self) -> PartialRows:
        terms_RH = self._regions.terms_RH
        if terms_RH is self._terms:
            with torch.inference_mode(False):  # a later layer may fill it outside of the mode
                terms_RH = empty_terms(terms_RH.shape[0], terms_RH.shape[1], terms_RH.dtype, terms_RH.device)
            self._regions = RegionTensors(self._regions.gathered, terms_RH)
        return terms_RH


def _bytes_spanned(tensor: torch.Tensor) -> int:
    """Of rows that may lie apart: rows of scales do."""
    return tensor.shape[0] * tensor.stride(0) * tensor.itemsize


def _address_and_scales(partial: PartialRows) -> tuple[int, tuple[int, ...]]:
    """Where the numbers are, and what a combine of quantized rows is given beside: SCALES."""
    if isinstance(partial, QuantizedRows):
        return partial.values.data_ptr(), (partial.scales.data_ptr(), partial.scales.stride(0))
    return partial.data_ptr(), ()
