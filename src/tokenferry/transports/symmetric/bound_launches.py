"""The launches of one rank, with every argument in place that never changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from tokenferry.dispatched import FLOAT8
from tokenferry.kernels.control_block import MODE_BOTH, MODE_RECEIVE, MODE_SEND
from tokenferry.kernels.launch import BoundLaunch, Launch
from tokenferry.step import StepTensors
from tokenferry.transports.base import TransportSettings
from tokenferry.transports.symmetric.buffer import SymmetricBuffer
from tokenferry.transports.symmetric.layout import Layout
from tokenferry.transports.symmetric.loading import Given, LoadedKernels, RowKernels
from tokenferry.transports.symmetric.tuning import Cut

Launches = TypeVar("Launches")

SUPPLIED = ("hidden_ptr", "scales_ptr", "topk_idx_ptr", "topk_weights_ptr", "num_supplied", "num_real_ptr", "layer")
"""What a dispatch that sends is given at every call, in this order."""
SUMMED = ("partial_ptr", "num_partial", "is_in_place", "out_ptr", "num_out", "layer")
"""What a combine that receives is given at every call, in this order. One of rows that are quantized already is given SCALES
behind these."""
SCALES = ("scales_ptr", "scale_row")
LOADS = "loads_ptr"
"""What every combine is given last of all in a workspace with telemetry."""


@dataclass(frozen=True)
class RankView:
    """As whom the kernels run: this rank among its peers, or rank 0 of 1 in `solo`.

    Everything by which a kernel could reach another rank stands here. Once `solo` kept the group's table of buffers and its
    multicast address: the warm-up rows of rank 1 lay in rank 0's gathered ids, and over multicast in every peer's slots.

    Attributes:
        counters_ptr, step_counts_ptr: of this rank's buffer, others in `solo`.
        peer_table_ptr: address of the table of buffers, which has `size` of them.
        multicast_ptr: of the multicast mapping; 0 if there is none, or nobody to reach.
    """

    rank: int
    size: int
    counters_ptr: int
    step_counts_ptr: int
    peer_table_ptr: int
    multicast_ptr: int


@dataclass(frozen=True)
class Resources:
    """What the kernels of an open workspace run on."""

    settings: TransportSettings
    step_tensors: StepTensors
    buffer: SymmetricBuffer
    layout: Layout
    kernels: LoadedKernels


@dataclass(frozen=True, kw_only=True)
class DispatchLaunches:
    """Each mode has a launch of its own, since one that only sends, or only receives, is given less: `both` and `send` take
    SUPPLIED, `receive` the last two of these. `grid`: programs of each."""

    both: dict[Given, BoundLaunch]
    send: dict[Given, BoundLaunch]
    receive: dict[Given, BoundLaunch]
    grid: int


@dataclass(frozen=True, kw_only=True)
class CombineLaunches:
    """The same of a combine: `both` and `receive` take SUMMED, `send` SUMMED without `out_ptr` and `num_out`.

    See SCALES and LOADS too.
    """

    both: dict[torch.dtype, BoundLaunch]
    send: dict[torch.dtype, BoundLaunch]
    receive: dict[torch.dtype, BoundLaunch]
    grid: int


@dataclass(frozen=True, kw_only=True)
class BoundLaunches:
    """Everything that a rank launches while steps go well.

    Attributes:
        counts: takes num_tokens, flags and num_real.
        dispatch, combine: for every step.
        few_dispatch, few_combine: for steps to which this rank brings at most so many rows, the smallest number first.
    """

    counts: BoundLaunch
    dispatch: DispatchLaunches
    combine: CombineLaunches
    few_dispatch: tuple[tuple[int, DispatchLaunches], ...] = ()
    few_combine: tuple[tuple[int, CombineLaunches], ...] = ()

    def dispatch_for(self, num_tokens: int) -> DispatchLaunches:
        """Those for a step to which this rank brings so many rows."""
        return next((launches for most, launches in self.few_dispatch if num_tokens <= most), self.dispatch)

    def combine_for(self, num_tokens: int) -> CombineLaunches:
        """See `dispatch_for`. The two need not be cut alike."""
        return next((launches for most, launches in self.few_combine if num_tokens <= most), self.combine)


def bind_launches(resources: Resources, view: RankView) -> BoundLaunches:
    """All launches of a rank that runs as `view` says."""
    settings, layout, kernels = resources.settings, resources.layout, resources.kernels
    common = {
        "buffer_ptr": resources.buffer.address,
        "peer_table_ptr": view.peer_table_ptr,
        "rank": view.rank,
        "size": view.size,
        "counters_ptr": view.counters_ptr,
        "step_counts_ptr": view.step_counts_ptr,
    }
    published = {
        "step_tensors_ptr": resources.step_tensors.packed.data_ptr(),
        "public_rank": settings.group.rank,
        "public_size": settings.group.size,
        "generation": settings.generation,
    }
    rows_fixed = {
        **common,
        "multicast_ptr": view.multicast_ptr,
        "counts_offset": layout.counts.offset,
        "num_flags": kernels.rows.grid,
    }
    dispatch_fixed = {
        **rows_fixed,
        "slot_rows": layout.dispatch_slot_rows,
        "arrived_offset": layout.arrived.offset,
        "slots_offset": layout.dispatch_slots.offset,
        "slot_bytes": layout.dispatch_slot_bytes,
        "out_hidden_offset": layout.hidden.offset,
        "out_scales_offset": layout.scales.offset,
        "out_idx_offset": layout.topk_idx.offset,
        "out_weights_offset": layout.topk_weights.offset,
    }
    combine_fixed = {
        **rows_fixed,
        "slot_rows": layout.slot_rows,
        "counted_rows": min(layout.slot_rows, layout.dispatch_slot_rows),
        "ready_offset": layout.ready.offset,
        "slots_offset": layout.combine_slots.offset,
        "slot_bytes": layout.combine_slot_bytes,
        "terms_offset": layout.terms.offset,
        "term_scales_offset": layout.term_scales.offset,
    }
    counts_loads = settings.recorder is not None
    if counts_loads:
        combine_fixed |= {"ids_offset": layout.topk_idx.offset, "num_experts": settings.config.num_experts}

    def dispatch(rows: RowKernels, grid: int) -> DispatchLaunches:
        return _bind_dispatch(rows.dispatch_alone if view.size == 1 else rows.dispatch, dispatch_fixed, grid)

    def combine(rows: RowKernels, grid: int) -> CombineLaunches:
        return _bind_combine(rows.combine, combine_fixed, grid, counts_loads=counts_loads)

    rows, few = kernels.rows, kernels.few
    return BoundLaunches(
        counts=kernels.counts.bind({**common, **published}, ("num_tokens", "flags", "num_real"), grid=1),
        dispatch=dispatch(rows, rows.grid),
        combine=combine(rows, rows.grid),
        few_dispatch=() if few is None else _by_tokens(kernels.few_dispatch, partial(dispatch, few)),
        few_combine=() if few is None else _by_tokens(kernels.few_combine, partial(combine, few)),
    )


def _by_tokens(cuts: tuple[Cut, ...], bind: Callable[[int], Launches]) -> tuple[tuple[int, Launches], ...]:
    return tuple((cut.max_tokens, bind(cut.max_programs)) for cut in cuts)


def _bind_dispatch(kernels: dict[Given, Launch], fixed: dict[str, int], grid: int) -> DispatchLaunches:
    def bind(varying: tuple[str, ...], **more: int) -> dict[Given, BoundLaunch]:
        return {key: launch.bind({**fixed, **more}, varying, grid=grid) for key, launch in kernels.items()}

    nothing_supplied = dict.fromkeys(SUPPLIED[:5], 0)
    return DispatchLaunches(
        both=bind(SUPPLIED, mode=MODE_BOTH),
        send=bind(SUPPLIED, mode=MODE_SEND),
        receive=bind(SUPPLIED[5:], **nothing_supplied, mode=MODE_RECEIVE),
        grid=grid,
    )


def _bind_combine(kernels: dict[torch.dtype, Launch], fixed: dict[str, int], grid: int, *, counts_loads: bool) -> CombineLaunches:
    loads = (LOADS,) if counts_loads else ()

    def bind(varying: tuple[str, ...], **more: int) -> dict[torch.dtype, BoundLaunch]:
        given = {**fixed, **more}
        without_scales = {**given, **dict.fromkeys(SCALES, 0)}
        return {
            key: launch.bind(given, (*varying, *SCALES, *loads), grid=grid)
            if key == FLOAT8
            else launch.bind(without_scales, (*varying, *loads), grid=grid)
            for key, launch in kernels.items()
        }

    return CombineLaunches(
        both=bind(SUMMED, mode=MODE_BOTH),
        send=bind(("partial_ptr", "num_partial", "is_in_place", "layer"), out_ptr=0, num_out=0, mode=MODE_SEND),
        receive=bind(SUMMED, mode=MODE_RECEIVE),
        grid=grid,
    )
