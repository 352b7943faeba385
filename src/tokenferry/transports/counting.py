"""A transport around another one that counts what it moves, for telemetry, and names its calls for profilers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

import torch

from tokenferry import env
from tokenferry.ambient import plain_torch
from tokenferry.dispatched import HiddenRows, LoadsToCount, PartialRows, term_bytes
from tokenferry.errors import ConfigError
from tokenferry.graph_capture import is_capturing
from tokenferry.kernels.wait_board import NUM_LAYERS
from tokenferry.lifecycle import Lease
from tokenferry.step import StepRequest, StepTensors
from tokenferry.telemetry import Recorder
from tokenferry.transports.base import Gathered, Transport, TransportSettings
from tokenferry.transports.wrapper import TransportWrapper

RANGES: Final = ("tokenferry.begin_step", "tokenferry.dispatch", "tokenferry.combine")
"""Names of the NVTX ranges; those of rounds are followed by the layer, as in tokenferry.dispatch[3]. Halves of a call are named
like the whole, and a range holds what its call launches, not what runs meanwhile."""


def wants_telemetry(asked: bool | None) -> bool:
    """Whether a workspace counts. None: as the environment says.

    Raises:
        ConfigError: it is neither a bool nor None. The string "0" was telemetry.
    """
    if asked is None:
        return env.read(env.TelemetrySettings).enabled
    if not isinstance(asked, bool):
        raise ConfigError(f"telemetry must be True, False or None, got {asked!r}")
    return asked


def new_recorder(settings: TransportSettings) -> Recorder:
    """Counters that begin at zero, for one opening of a workspace."""
    group, config = settings.group, settings.config
    with plain_torch(group.device):
        row_bytes = settings.dispatch_format.wire_bytes(config)
        of_term = term_bytes(config.hidden_size, settings.combine_dtype)
        experts = group.expert_range(config.num_experts)
        return Recorder(group.rank, group.size, config.num_experts, row_bytes, of_term, group.device, experts)


class CountingTransport(TransportWrapper):
    """The same transport, counted. See `Recorder`: what its kernels count themselves is left to them.

    Args:
        inner: open on this rank. No rank may launch anything before all have made their wrapper: see `DebugTransport`.
    """

    def __init__(self, inner: Transport, recorder: Recorder, settings: TransportSettings, step_tensors: StepTensors) -> None:
        super().__init__(inner)
        self._recorder, self._step_tensors = recorder, step_tensors
        self._device, self._layer, self._num_tokens = settings.group.device, -1, 0
        self.names_ranges = self._device.type == "cuda"
        """Whether calls stand in NVTX ranges."""
        self._uncounted: tuple[torch.Tensor, LoadsToCount] | None = None
        """Numbers and counters of the dispatch under way. They are looked at before its combine: experts may have counted."""
        self._reader = _Reader(self._device) if self._device.type == "cuda" else None
        self._count: Any = None
        self._block, self._max_programs = 1, 1
        if self._reader is not None:
            recorder.read, recorder.write, recorder.relaxed = self._reader.read, self._reader.write, self._reader.relaxed
            self._count = self._counting_launch(settings)
            torch.cuda.current_stream(self._device).synchronize()

    def _counting_launch(self, settings: TransportSettings) -> Any:
        from tokenferry.kernels.launch import has_pdl, prepare  # here: Triton is not everywhere
        from tokenferry.kernels.load_counts import BLOCK, MAX_PROGRAMS, NUM_WARPS, SIGNATURE, load_counts_kernel

        self._block, self._max_programs = BLOCK, MAX_PROGRAMS
        constants = {"K": settings.config.topk, "BLOCK": BLOCK, "PDL": int(has_pdl(self._device))}
        names = {torch.int32: "*i32", torch.int64: "*i64"}
        signature = {**SIGNATURE, "topk_idx": names[settings.index_dtype]}
        launch = prepare(load_counts_kernel, signature, constants, NUM_WARPS, self._device)
        fixed = {
            "valid_tokens": self._step_tensors.packed,
            "loads": self._recorder.load_words,
            "num_experts": settings.config.num_experts,
        }
        return launch.bind(fixed, ("topk_idx", "num_rows", "layer"))

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes + self._recorder.nbytes

    def begin_step(self, request: StepRequest, layer: int) -> None:
        self._num_tokens = request.num_tokens
        with self._range(RANGES[0]):
            super().begin_step(request, layer)
        self._recorder.is_in_step(request.index, request.num_tokens)

    def dispatch(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Gathered:
        with self._range(RANGES[1], layer):
            return self._counted(layer, super().dispatch(layer, hidden, topk_idx, topk_weights))

    def dispatch_begin(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        with self._range(RANGES[1], layer):
            super().dispatch_begin(layer, hidden, topk_idx, topk_weights)
        self._layer = layer

    def dispatch_end(self) -> Gathered:
        with self._range(RANGES[1], self._layer):
            return self._counted(self._layer, super().dispatch_end())

    def combine(self, partial: PartialRows, out: torch.Tensor | None = None) -> torch.Tensor:
        self._count_ids()
        with self._range(RANGES[2], self._layer):
            return super().combine(partial, out)

    def combine_begin(self, partial: PartialRows) -> None:
        self._count_ids()
        with self._range(RANGES[2], self._layer):
            super().combine_begin(partial)

    def combine_end(self, out: torch.Tensor | None = None) -> torch.Tensor:
        with self._range(RANGES[2], self._layer):
            return super().combine_end(out)

    def close(self) -> None:
        self._recorder.close()
        self._uncounted = None
        if self._reader is not None:
            self._reader.close()
        super().close()

    # --- how --------------------------------------------------------------------------------------------------------

    def _counted(self, layer: int, gathered: Gathered) -> Gathered:
        """What has come is noted, all but the loads: see `_count_ids`."""
        recorder = self._recorder
        self._layer = layer
        counts = self.inner.tokens_per_rank
        if counts is None:  # a transport whose host knows none: of a rank alone they are its own, of more nobody's in particular
            counts = (self._num_tokens,) if recorder.size == 1 else ()
        recorder.came(layer, counts)
        loads = LoadsToCount(recorder.load_words, 1 + min(layer, NUM_LAYERS - 1) * recorder.loads.shape[1])
        self._uncounted = gathered.topk_idx_RK, loads
        return Gathered(gathered.hidden_RH, gathered.topk_idx_RK, gathered.topk_weights_RK, loads)

    def _count_ids(self) -> None:
        """Counts the expert numbers of the dispatch under way, unless experts of our own have: their table has the numbers, which
        costs no launch. Nor does it cost one where the combine can. Another launch is before the combine in the stream's order,
        behind which peers write over the numbers."""
        uncounted, self._uncounted = self._uncounted, None
        if uncounted is None or uncounted[1].taken or not self._recorder.counts_ids:
            return
        if not (self._recorder.is_on or is_capturing(self._device)):  # a graph may be replayed when it is on: kernels look
            return
        (ids, loads), layer = uncounted, min(self._layer, NUM_LAYERS - 1)
        if self.inner.counts_in_combine(loads):
            return
        if self._count is None:
            self._count_here(layer, ids)
        else:
            num_rows = ids.shape[0]
            programs = max(1, min(self._max_programs, -(-num_rows * ids.shape[1] // self._block)))
            self._count(programs, ids, num_rows, layer)
            if self.fixed_rows is None:  # theirs is the memory of another stream, perhaps, and nobody else may keep them
                ids.record_stream(torch.cuda.current_stream(self._device))

    def _count_here(self, layer: int, ids: torch.Tensor) -> None:
        """On CPUs. Rows behind V hold -1."""
        loads = self._recorder.loads[layer]
        named = ids.flatten().to(torch.int64)
        named = named[(named >= 0) & (named < loads.shape[0])]
        loads += torch.bincount(named, minlength=loads.shape[0])

    @contextlib.contextmanager
    def _range(self, name: str, layer: int = -1) -> Iterator[None]:
        if not self.names_ranges:
            yield
            return
        torch.cuda.nvtx.range_push(f"{name}[{layer}]" if layer >= 0 else name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


class _Reader:
    """Copies counters to and from the host on a stream of its own: a reader waits for the copy alone, and no step for the reader.

    Not by pinned memory: as that is given back, torch records an event on the stream that copied to it, which may be gone. Nor
    by a kernel, which may have to be loaded, and loading waits for all kernels that wait for a peer.
    """

    def __init__(self, device: torch.device) -> None:
        from tokenferry.transports.symmetric.side_stream import SideStream

        self._side = SideStream(device)
        self._lease = Lease(self._side)  # another thread may read while the workspace closes: the stream must outlive the copy

    def read(self, tensor: torch.Tensor) -> list[Any]:
        """As a list, by value.

        Raises:
            StateError: the workspace is closed.
        """
        with self._lease as side, side.current():
            return tensor.cpu().tolist()

    def write(self, tensor: torch.Tensor, number: int) -> None:
        """To a tensor of one.

        Raises:
            StateError: the workspace is closed.
        """
        with self._lease as side, side.current():
            tensor.copy_(torch.tensor([number], dtype=torch.int64, device="cpu"))

    def relaxed(self) -> AbstractContextManager[None]:
        """See `Recorder.relaxed`."""
        return self._side.relaxed()

    def close(self) -> None:
        """The stream is gone then, or as soon as nobody uses it."""
        self._lease.end()


__all__ = ["RANGES", "CountingTransport", "new_recorder", "wants_telemetry"]
