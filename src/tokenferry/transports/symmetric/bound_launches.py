"""The launches of one rank, with every argument in place that never changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenferry.dispatched import FLOAT8
from tokenferry.kernels.control_block import MODE_BOTH, MODE_RECEIVE, MODE_SEND
from tokenferry.kernels.launch import BoundLaunch
from tokenferry.step import StepTensors
from tokenferry.transports.base import TransportSettings
from tokenferry.transports.symmetric.buffer import SymmetricBuffer
from tokenferry.transports.symmetric.layout import Layout
from tokenferry.transports.symmetric.loading import Given, LoadedKernels, RowKernels

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
class RowLaunches:
    """Of dispatch and combine each mode has a launch of its own, since one that only sends, or only receives, is given less.

    `dispatch` and `dispatch_send` take SUPPLIED, `dispatch_receive` the last two of these; `combine` and `combine_receive` take
    SUMMED, `combine_send` SUMMED without `out_ptr` and `num_out`. See SCALES and LOADS too.
    """

    dispatch: dict[Given, BoundLaunch]
    dispatch_send: dict[Given, BoundLaunch]
    dispatch_receive: dict[Given, BoundLaunch]
    combine: dict[torch.dtype, BoundLaunch]
    combine_send: dict[torch.dtype, BoundLaunch]
    combine_receive: dict[torch.dtype, BoundLaunch]


@dataclass(frozen=True, kw_only=True)
class BoundLaunches:
    """Everything that a rank launches while steps go well.

    Attributes:
        counts: takes num_tokens, flags and num_real.
        few, fewest: for steps to which this rank brings at most `few_tokens`, or at most `fewest_tokens` rows.
    """

    counts: BoundLaunch
    rows: RowLaunches
    few: RowLaunches
    few_tokens: int
    fewest: RowLaunches
    fewest_tokens: int

    def rows_for(self, num_tokens: int) -> RowLaunches:
        """Those for a step to which this rank brings so many rows."""
        if num_tokens <= self.fewest_tokens:
            return self.fewest
        return self.few if num_tokens <= self.few_tokens else self.rows


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

    def bind(rows: RowKernels) -> RowLaunches:
        return _bind_rows(rows, dispatch_fixed, combine_fixed, alone=view.size == 1, counts_loads=counts_loads)

    rows = bind(kernels.rows)
    return BoundLaunches(
        counts=kernels.counts.bind({**common, **published}, ("num_tokens", "flags", "num_real"), grid=1),
        rows=rows,
        few=rows if kernels.few is None else bind(kernels.few),
        few_tokens=kernels.few_tokens,
        fewest=rows if kernels.fewest is None else bind(kernels.fewest),
        fewest_tokens=kernels.fewest_tokens,
    )


def _bind_rows(
    kernels: RowKernels, dispatch_fixed: dict[str, int], combine_fixed: dict[str, int], *, alone: bool, counts_loads: bool
) -> RowLaunches:
    dispatches = kernels.dispatch_alone if alone else kernels.dispatch

    def dispatch(varying: tuple[str, ...], **fixed: int) -> dict[Given, BoundLaunch]:
        given = {**dispatch_fixed, **fixed}
        return {key: launch.bind(given, varying, grid=kernels.grid) for key, launch in dispatches.items()}

    loads = (LOADS,) if counts_loads else ()

    def combine(varying: tuple[str, ...], **fixed: int) -> dict[torch.dtype, BoundLaunch]:
        given = {**combine_fixed, **fixed}
        without_scales = {**given, **dict.fromkeys(SCALES, 0)}
        return {
            key: launch.bind(given, (*varying, *SCALES, *loads), grid=kernels.grid)
            if key == FLOAT8
            else launch.bind(without_scales, (*varying, *loads), grid=kernels.grid)
            for key, launch in kernels.combine.items()
        }

    nothing_supplied = dict.fromkeys(SUPPLIED[:5], 0)
    return RowLaunches(
        dispatch=dispatch(SUPPLIED, mode=MODE_BOTH),
        dispatch_send=dispatch(SUPPLIED, mode=MODE_SEND),
        dispatch_receive=dispatch(SUPPLIED[5:], **nothing_supplied, mode=MODE_RECEIVE),
        combine=combine(SUMMED, mode=MODE_BOTH),
        combine_send=combine(("partial_ptr", "num_partial", "is_in_place", "layer"), out_ptr=0, num_out=0, mode=MODE_SEND),
        combine_receive=combine(SUMMED, mode=MODE_RECEIVE),
    )
