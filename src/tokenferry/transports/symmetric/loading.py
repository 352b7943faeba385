"""Compiles and loads every kernel that a workspace may launch, on all ranks together, before anybody waits for a peer.

Loading a module waits for the device. A kernel that was loaded while another one waited for a peer could deadlock, so that
nothing is loaded later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch

from tokenferry.dispatched import FLOAT8, term_bytes
from tokenferry.errors import TransportUnavailableError
from tokenferry.kernels import fp8_rows
from tokenferry.kernels.abort import SIGNATURE as ABORT_SIGNATURE
from tokenferry.kernels.abort import abort_kernel
from tokenferry.kernels.combine import COUNTING_SIGNATURE, NO_LOADS, combine_kernel
from tokenferry.kernels.combine import SIGNATURE as COMBINE_SIGNATURE
from tokenferry.kernels.control_words import SIGNATURE as ADD_SIGNATURE
from tokenferry.kernels.control_words import add_kernel
from tokenferry.kernels.counts import SIGNATURE as COUNTS_SIGNATURE
from tokenferry.kernels.counts import counts_kernel
from tokenferry.kernels.dispatch import SIGNATURE as DISPATCH_SIGNATURE
from tokenferry.kernels.dispatch import dispatch_kernel
from tokenferry.kernels.launch import DTYPES, KernelSpec, KernelStore, Launch, has_pdl, specify
from tokenferry.transports.base import TransportSettings
from tokenferry.transports.symmetric.buffer import SymmetricBuffer
from tokenferry.transports.symmetric.layout import MAX_PROGRAMS, Layout
from tokenferry.transports.symmetric.regions import initialise
from tokenferry.transports.symmetric.tuning import MAX_REGISTERS, Cut, FewTokens, Tuning, choose_grid, max_registers_of

INDEX_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What callers may pass: of expert numbers, and of weights and partial rows. Of float8 terms they may pass float8 rows too."""

Given = tuple[torch.dtype, torch.dtype, bool]
"""What a dispatch is given: the dtypes of topk_idx and of topk_weights, and whether its rows are quantized already."""


@dataclass(frozen=True, kw_only=True)
class RowSpecs:
    """What `RowKernels` are compiled for. `grid`: programs of a launch."""

    dispatch: dict[Given, KernelSpec]
    dispatch_alone: dict[Given, KernelSpec]
    combine: dict[torch.dtype, KernelSpec]
    grid: int

    @property
    def all(self) -> tuple[KernelSpec, ...]:
        """Each kernel, some of them twice."""
        return (*self.dispatch.values(), *self.dispatch_alone.values(), *self.combine.values())


@dataclass(frozen=True, kw_only=True)
class RowKernels:
    """The kernels that move rows, cut into programs in one way.

    Attributes:
        dispatch: by what it is given.
        dispatch_alone: the same without multicast, for `solo`: a multicast store reaches every rank, whatever peers the kernel
            is given.
        combine: by the dtype of the partial rows.
        grid: programs of a launch.
    """

    dispatch: dict[Given, Launch]
    dispatch_alone: dict[Given, Launch]
    combine: dict[torch.dtype, Launch]
    grid: int

    @property
    def resident(self) -> int:
        """The most programs of any of them that the device holds at once."""
        launches = (*self.dispatch.values(), *self.dispatch_alone.values(), *self.combine.values())
        return min(launch.resident for launch in launches)


@dataclass(frozen=True)
class LoadedKernels:
    """Everything that a workspace may launch.

    Attributes:
        rows: their grid is the same on all ranks.
        few: for steps to which this rank brings few rows. Slots need no agreement, and in bulk rounds its CTAs see to the flags
            of all CTAs that a launch of `rows` has.
        few_dispatch, few_combine: for how many rows, in how many programs; see `FewTokens`.
    """

    counts: Launch
    abort: Launch
    add: Launch
    rows: RowKernels
    few: RowKernels | None
    few_dispatch: tuple[Cut, ...]
    few_combine: tuple[Cut, ...]


@dataclass(frozen=True)
class Loaded:
    """What `load_together` returns. `mirror`: int64 [1] of the host, which on CUDA gets a copy of the abort record."""

    mirror: torch.Tensor
    kernels: LoadedKernels


def load_together(
    settings: TransportSettings,
    layout: Layout,
    tuning: Tuning,
    few: FewTokens | None,
    buffer: SymmetricBuffer,
    *,
    multicast: bool,
) -> Loaded:
    """Fills the buffer, loads the kernels, and agrees on their grid. Nobody goes on before everybody is ready.

    All ranks have the same grid, since in bulk rounds each CTA tells the CTA with the same index at every peer.

    Raises:
        TransportUnavailableError: on every rank, naming the rank that failed and why.
        PeerTimeoutError: a rank did not come.
    """
    loaded: Loaded | None = None
    failure: Exception | None = None
    try:
        loaded = _load(settings, layout, tuning, few, buffer, multicast)
    except Exception as error:  # noqa: BLE001  # compilers raise anything
        failure = error
    told = [
        0 if loaded is None else loaded.kernels.rows.grid,
        None if failure is None else f"{type(failure).__name__}: {failure}",
    ]
    answers = settings.group.channel.exchange(f"{settings.name}/loaded", told, settings.open_timeout_s)
    for rank, (_, reason) in enumerate(answers):
        if reason is not None:
            raise TransportUnavailableError(f"symmetric memory: rank {rank} failed to load its kernels: {reason}") from failure
    assert loaded is not None, "nobody failed"
    return Loaded(loaded.mirror, _with_grid(loaded.kernels, min(grid for grid, _ in answers)))


def _load(
    settings: TransportSettings,
    layout: Layout,
    tuning: Tuning,
    few: FewTokens | None,
    buffer: SymmetricBuffer,
    multicast: bool,
) -> Loaded:
    """This rank's part, with the grid that it would choose."""
    device, is_cuda = settings.group.device, settings.group.device.type == "cuda"
    mirror = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=is_cuda)
    initialise(settings, buffer, layout, mirror.data_ptr() if is_cuda else 0)
    pdl = int(has_pdl(device))
    telemetry = int(settings.recorder is not None)
    lanes = max(32, 1 << (settings.group.size - 1).bit_length())
    counts = specify(counts_kernel, COUNTS_SIGNATURE, {"LANES": lanes, "TELEMETRY": telemetry, "PDL": pdl}, num_warps=1)
    abort = specify(abort_kernel, ABORT_SIGNATURE, {"PDL": 0}, num_warps=1)
    add = specify(add_kernel, ADD_SIGNATURE, {"PDL": 0}, num_warps=1)
    row_specs = specify_rows(settings, tuning, multicast=multicast)
    few_specs = None if few is None else specify_rows(settings, few.tuning, multicast=multicast, flag_block=tuning.block)
    store = KernelStore(device)
    store.load_all([counts, abort, add, *row_specs.all, *(() if few_specs is None else few_specs.all)])
    rows = load_row_kernels(store, row_specs)
    kernels = LoadedKernels(
        counts=store.load(counts),
        abort=store.load(abort),
        add=store.load(add),
        rows=rows,
        few=None if few_specs is None else load_row_kernels(store, few_specs),
        few_dispatch=() if few is None else few.dispatch,
        few_combine=() if few is None else few.combine,
    )
    grid = choose_grid(settings, layout, tuning, rows.resident, is_virtual=buffer.is_virtual)
    return Loaded(mirror, _with_grid(kernels, grid))


def _with_grid(kernels: LoadedKernels, grid: int) -> LoadedKernels:
    """Launches for few tokens have no more CTAs than there are flags: each of them sets one at least, behind what it has sent."""
    most = grid if kernels.few is None else min(grid, kernels.few.resident)

    def within(cuts: tuple[Cut, ...]) -> tuple[Cut, ...]:
        return tuple(replace(cut, max_programs=min(cut.max_programs, most)) for cut in cuts)

    few_dispatch, few_combine = within(kernels.few_dispatch), within(kernels.few_combine)
    return replace(kernels, rows=replace(kernels.rows, grid=grid), few_dispatch=few_dispatch, few_combine=few_combine)


def specify_rows(settings: TransportSettings, tuning: Tuning, *, multicast: bool, flag_block: int = 0) -> RowSpecs:
    """Every variant that the arguments of this workspace can ask for. `flag_block`: see `dispatch_kernel`."""
    cut: dict[str, object] = {"BLOCK": tuning.block, "MAX_PROGRAMS": MAX_PROGRAMS, "FLAG_BLOCK": flag_block}
    cut |= {"PDL": int(has_pdl(settings.group.device)), "SPLIT": 0 if flag_block else tuning.split}
    cut["TELEMETRY"] = int(settings.recorder is not None)

    def dispatches(multicast: bool) -> dict[Given, KernelSpec]:
        quantized = (False, True) if settings.dispatch_format.is_quantized else (False,)
        return {
            given: specify(
                dispatch_kernel,
                DISPATCH_SIGNATURE,
                _dispatch_constants(settings, *given, multicast) | cut,
                num_warps=tuning.num_warps,
                max_registers=MAX_REGISTERS,
            )
            for given in product(INDEX_DTYPES, FLOAT_DTYPES, quantized)
        }

    partials = (*FLOAT_DTYPES, FLOAT8) if settings.combine_dtype == FLOAT8 else FLOAT_DTYPES
    signature, loads = COMBINE_SIGNATURE, NO_LOADS
    if settings.recorder is not None:
        signature, loads = COUNTING_SIGNATURE, {"TOPK": settings.config.topk, "IDS": DTYPES[settings.index_dtype]}
    return RowSpecs(
        dispatch=dispatches(multicast),
        dispatch_alone=dispatches(multicast=False),
        combine={
            partial: specify(
                combine_kernel,
                signature,
                _combine_constants(settings, partial, multicast) | cut | loads,
                num_warps=tuning.num_warps,
                max_registers=max_registers_of(settings, tuning),
            )
            for partial in partials
        },
        grid=tuning.max_programs,
    )


def load_row_kernels(store: KernelStore, specs: RowSpecs) -> RowKernels:
    """Compiles and loads what is not in the store yet."""
    return RowKernels(
        dispatch={given: store.load(spec) for given, spec in specs.dispatch.items()},
        dispatch_alone={given: store.load(spec) for given, spec in specs.dispatch_alone.items()},
        combine={partial: store.load(spec) for partial, spec in specs.combine.items()},
        grid=specs.grid,
    )


def _dispatch_constants(
    settings: TransportSettings, idx: torch.dtype, weights: torch.dtype, is_quantized: bool, multicast: bool
) -> dict[str, object]:
    row_format, config = settings.dispatch_format, settings.config
    row_bytes = row_format.wire_bytes(config)
    as_it_is = fp8_rows.BYTES if row_format.name == "bytes" else fp8_rows.SAME
    on_the_way = fp8_rows.QUANTIZED if is_quantized else fp8_rows.QUANTIZE
    return {
        "FORMAT": (on_the_way if row_format.is_quantized else as_it_is).value,
        "H": config.hidden_size,
        "HIDDEN": DTYPES[config.dtype],
        "POWER_OF_TWO": int(row_format.power_of_two_scales),
        "ROW_WORDS": row_bytes // 4,
        "K": config.topk,
        "IDX": DTYPES[idx],
        "WEIGHTS": DTYPES[weights],
        "OUT_IDX": DTYPES[settings.index_dtype],
        "WORDS": 4 if row_bytes % 16 == 0 else 2,
        "MULTICAST": int(multicast),
    }


def _combine_constants(settings: TransportSettings, partial: torch.dtype, multicast: bool) -> dict[str, object]:
    wire_bytes = term_bytes(settings.config.hidden_size, settings.combine_dtype)
    return {
        "H": settings.config.hidden_size,
        "PARTIAL": DTYPES[partial],
        "WIRE": DTYPES[settings.combine_dtype],
        "OUT": DTYPES[settings.result_dtype],
        "WORDS": 4 if wire_bytes % 16 == 0 else 2,
        "SWITCH_SUM": int(multicast and sums_in_the_switch(settings)),
    }


def sums_in_the_switch(settings: TransportSettings) -> bool:
    """Whether bulk rounds of `nvls` read the switch's sums."""
    is_whole_packets = settings.config.hidden_size * settings.combine_dtype.itemsize % 16 == 0
    return settings.combine_order == "any" and settings.combine_dtype == torch.float32 and is_whole_packets
