"""A transport around another one that counts what it moves, for telemetry, and names its calls for profilers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch

from tokenferry import env
from tokenferry.ambient import plain_torch
from tokenferry.dispatched import HiddenRows, PartialRows
from tokenferry.errors import ConfigError
from tokenferry.kernels.wait_board import NUM_LAYERS
from tokenferry.step import StepRequest, StepTensors
from tokenferry.telemetry import Recorder
from tokenferry.transports.base import Gathered, Transport, TransportSettings
from tokenferry.transports.wrapper import TransportWrapper

SHOWN_ON: Final = ("cpu",)
"""Device types on which tests have shown telemetry to be right. For GPUs its kernels compile; the only run, on two of them on
2026-11-26, ended in a crash before it had a result: in all likelihood pinned memory was given back after the stream that had
copied to it was gone. No pinned memory is used since, and no run has followed."""
RANGES = ("tokenferry.begin_step", "tokenferry.dispatch", "tokenferry.combine")
"""Names of the NVTX ranges; those of rounds are followed by the layer, as in tokenferry.dispatch[3]. Halves of a call are named
like the whole, and a range holds what its call launches, not what runs meanwhile."""


def wants_telemetry(asked: bool | None, device: torch.device) -> bool:
    """Whether a workspace on `device` counts. None: as the environment says.

    Raises:
        ConfigError: it shall, on a device on which no run has shown it to be right.
    """
    wanted = env.read(env.TelemetrySettings).enabled if asked is None else bool(asked)
    if wanted and device.type not in SHOWN_ON:
        raise ConfigError(
            f"telemetry is not to be had on {device.type} yet: no run on a GPU has shown it to be right, and the first one "
            "crashed; open the workspace without it (telemetry=False, TOKENFERRY_TELEMETRY not set), or on CPUs"
        )
    return wanted


def new_recorder(settings: TransportSettings) -> Recorder:
    """Counters that begin at zero, for one opening of a workspace."""
    group, config = settings.group, settings.config
    with plain_torch(group.device):
        row_bytes = settings.dispatch_format.wire_bytes(config)
        return Recorder(group.rank, group.size, config.num_experts, row_bytes, group.device)


class CountingTransport(TransportWrapper):
    """The same transport, counted. See `Recorder`: what its kernels count themselves is left to them.

    Args:
        inner: open on this rank. No rank may launch anything before all have made their wrapper: see `DebugTransport`.
    """

    def __init__(self, inner: Transport, recorder: Recorder, settings: TransportSettings, step_tensors: StepTensors) -> None:
        super().__init__(inner)
        self._recorder, self._step_tensors = recorder, step_tensors
        self._device, self._layer, self._num_tokens = settings.group.device, -1, 0
        self._is_cuda = self._device.type == "cuda"
        self._reader: _Reader | None = None
        self._count: Any = None
        if self._is_cuda:
            from tokenferry.kernels.launch import has_pdl, prepare  # here: Triton is not everywhere
            from tokenferry.kernels.load_counts import BLOCK, NUM_WARPS, SIGNATURE, load_counts_kernel

            self._reader = _Reader(self._device)
            recorder.read = self._reader
            constants = {"K": settings.config.topk, "BLOCK": BLOCK, "PDL": int(has_pdl(self._device))}
            names = {torch.int32: "*i32", torch.int64: "*i64"}
            signature = {**SIGNATURE, "topk_idx": names[settings.index_dtype]}
            launch = prepare(load_counts_kernel, signature, constants, NUM_WARPS, self._device)
            fixed = {
                "valid_tokens": step_tensors.packed,
                "loads": recorder.loads,
                "num_experts": settings.config.num_experts,
            }
            self._count = launch.bind(fixed, ("topk_idx", "num_rows", "layer"))
            torch.cuda.current_stream(self._device).synchronize()

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
        with self._range(RANGES[2], self._layer):
            return super().combine(partial, out)

    def combine_begin(self, partial: PartialRows) -> None:
        with self._range(RANGES[2], self._layer):
            super().combine_begin(partial)

    def combine_end(self, out: torch.Tensor | None = None) -> torch.Tensor:
        with self._range(RANGES[2], self._layer):
            return super().combine_end(out)

    def close(self) -> None:
        self._recorder.close()
        if self._reader is not None:
            self._reader.close()
        super().close()

    # --- how --------------------------------------------------------------------------------------------------------

    def _counted(self, layer: int, gathered: Gathered) -> Gathered:
        recorder = self._recorder
        self._layer = layer
        if not recorder.is_on:
            return gathered
        counts = self.inner.tokens_per_rank
        if counts is None:  # a transport whose host knows none: of a rank alone they are its own, of more nobody's in particular
            counts = (self._num_tokens,) if recorder.size == 1 else ()
        recorder.came(layer, counts)
        if recorder.counts_ids:
            ids = gathered.topk_idx_RK
            if self._count is not None:
                num_rows = ids.shape[0]
                programs = max(1, min(8, -(-num_rows * ids.shape[1] // 1024)))
                self._count(programs, ids, num_rows, min(layer, NUM_LAYERS - 1))
            else:
                self._count_here(layer, ids)
        return gathered

    def _count_here(self, layer: int, ids: torch.Tensor) -> None:
        """On CPUs. Rows behind V hold -1."""
        loads = self._recorder.loads[min(layer, NUM_LAYERS - 1)]
        named = ids.flatten().to(torch.int64)
        named = named[(named >= 0) & (named < loads.shape[0])]
        loads += torch.bincount(named, minlength=loads.shape[0])

    @contextlib.contextmanager
    def _range(self, name: str, layer: int = -1) -> Iterator[None]:
        if not self._is_cuda:
            yield
            return
        torch.cuda.nvtx.range_push(f"{name}[{layer}]" if layer >= 0 else name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


class _Reader:
    """Copies counters to the host on a stream of its own: a reader waits for the copy alone, and no step for the reader.

    Not to pinned memory: as that is given back, torch records an event on the stream that copied to it, which may be gone.
    """

    def __init__(self, device: torch.device) -> None:
        from tokenferry.transports.symmetric.side_stream import SideStream

        self._side = SideStream(device)

    def __call__(self, tensor: torch.Tensor) -> list[Any]:
        """As a list, by value."""
        with self._side.current():
            return tensor.cpu().tolist()

    def close(self) -> None:
        """The stream is gone then."""
        self._side.close()


__all__ = ["RANGES", "CountingTransport", "new_recorder", "wants_telemetry"]
