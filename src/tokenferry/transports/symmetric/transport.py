"""Symmetric memory as transport: kernels of our own store rows into the peers' buffers. No host synchronisation.

The protocol is in docs/symmetric.md; what crosses is in `kernels.wire`, where it lies in `layout`.
"""

from __future__ import annotations

import ctypes
from dataclasses import asdict
from itertools import product

import torch

from tokenferry.errors import TransportUnavailableError
from tokenferry.kernels import wire
from tokenferry.kernels.abort import SIGNATURE as ABORT_SIGNATURE
from tokenferry.kernels.abort import abort_kernel
from tokenferry.kernels.combine import SIGNATURE as COMBINE_SIGNATURE
from tokenferry.kernels.combine import combine_kernel
from tokenferry.kernels.counts import SIGNATURE as COUNTS_SIGNATURE
from tokenferry.kernels.counts import counts_kernel
from tokenferry.kernels.dispatch import SIGNATURE as DISPATCH_SIGNATURE
from tokenferry.kernels.dispatch import dispatch_kernel
from tokenferry.kernels.launch import (
    DTYPES,
    PROGRAMS_PER_SM,
    Launch,
    Tuning,
    check_addresses,
    prepare,
    tuning_for,
)
from tokenferry.step import StepRequest, StepTensors
from tokenferry.transports.base import AbortRecord, Gathered, TransportSettings, closed_meanwhile
from tokenferry.transports.symmetric.buffer import SymmetricBuffer
from tokenferry.transports.symmetric.layout import MAX_PROGRAMS, Layout, Region, plan
from tokenferry.transports.symmetric.rank_kernels import Kernels, Place, Rounds, Solo, Views

INDEX_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class SymmetricTransport(Rounds):
    """See `Transport`. R = C·EP, whatever the counts; tensors of a `Gathered` are views of the buffer."""

    def __init__(
        self,
        settings: TransportSettings,
        step_tensors: StepTensors,
        *,
        multicast: bool = False,
        slot_rows: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        group, config = settings.group, settings.config
        layout = plan(
            config,
            group.size,
            settings.max_tokens_per_rank,
            settings.combine_dtype,
            multicast=multicast,
            slot_rows=slot_rows,
            index_dtype=settings.index_dtype,
        )
        tuning = tuning or _tuning(settings, layout)
        buffer = SymmetricBuffer(group, layout.num_bytes, f"{settings.name}/memory", settings.open_timeout_s)
        check_addresses(buffer.peers)
        if multicast and group.size > 1 and not buffer.multicast_address:
            buffer.close()
            raise TransportUnavailableError("nvls: the symmetric memory has no multicast address here; use transport='p2p'")
        self._observer: wire.Observer | None = None
        self._mirror, kernels, grid = _prepare_together(settings, layout, tuning, buffer, multicast and group.size > 1)
        views = _views(settings, buffer, layout)
        address = buffer.address
        state, block = address + wire.STATE, address + layout.block.offset
        place = Place(group.rank, group.size, state, block, buffer.table_address, buffer.multicast_address)
        super().__init__(settings, step_tensors, buffer, layout, kernels, views, place, grid)
        self.name = "nvls" if multicast else "p2p"
        state, block = address + wire.SOLO_STATE, address + layout.solo_block.offset
        self._alone = Place(0, 1, state, block, buffer.own_table_address, 0)
        is_cpu = group.device.type == "cpu"
        self._is_cpu = is_cpu
        self._aborted = False
        self._record = ctypes.c_int64.from_address(address if is_cpu else self._mirror.data_ptr())

    # --- operations: look at the record first, without asking the device --------------------------------------------

    def begin_step(self, request: StepRequest, layer: int) -> None:
        self._raise_known()
        super().begin_step(request, layer)
        self._raise_after()

    def dispatch(self, layer: int, hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Gathered:
        self._raise_known()
        gathered = super().dispatch(layer, hidden, topk_idx, topk_weights)
        self._raise_after()
        return gathered

    def dispatch_begin(self, layer: int, hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        self._raise_known()
        super().dispatch_begin(layer, hidden, topk_idx, topk_weights)

    def dispatch_end(self) -> Gathered:
        self._raise_known()
        gathered = super().dispatch_end()
        self._raise_after()
        return gathered

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        self._raise_known()
        combined = super().combine(partial)
        self._raise_after()
        return combined

    def combine_begin(self, partial: torch.Tensor) -> None:
        self._raise_known()
        super().combine_begin(partial)

    def combine_end(self) -> torch.Tensor:
        self._raise_known()
        combined = super().combine_end()
        self._raise_after()
        return combined

    def solo(self) -> Rounds:
        return self.at(self._alone, Solo)

    # --- peers ------------------------------------------------------------------------------------------------------

    def _raise_known(self) -> None:
        word = self._record.value
        if word:
            raise self._settled(word)

    def _raise_after(self) -> None:
        if self._is_cpu:  # the launch is over here, and so is its waiting
            self._raise_known()

    def _settled(self, word: int) -> Exception:
        """The error that the whole group agrees on: two ranks may have given up at the same moment."""
        if self._aborted:  # the record is this rank's own, and no peer is to blame
            return closed_meanwhile()
        record = wire.Record.unpack(word)
        settings, step = self._settings, record.step_near(self._request.index)
        reason = f"rank {record.rank} gave up" if record.phase == "failed" else ""
        phase = "data-missing" if record.phase == "failed" else record.phase
        if record.phase != "failed" and record.reporter == settings.group.rank:
            elsewhere = settings.group.waiting.who_waits_elsewhere(record.rank, settings.name)
            phase, reason = (phase, reason) if elsewhere is None else ("counts-disagree", elsewhere)
        mine = AbortRecord(record.rank, record.reporter, phase, step, record.layer, settings.timeout_s, reason)
        agreed = AbortRecord(**settings.group.channel.claim(f"{settings.name}/abort", asdict(mine)))
        return agreed.error_for(settings.group.rank)

    def check(self) -> None:
        self._raise_known()
        if not self._is_cpu:
            word = int(self._buffer.tensor[:8].view(torch.int64).item())
            if word:
                raise self._settled(word)

    def fail(self, reason: str) -> None:
        settings = self._settings
        rank = settings.group.rank
        mine = AbortRecord(rank, rank, "data-missing", self._request.index, self._layer, 0.0, reason)
        try:
            settings.group.channel.claim(f"{settings.name}/abort", asdict(mine))
        finally:
            self._abort(wire.Record(rank, rank, "failed", self._request.index, self._layer))

    def abort(self) -> None:
        rank = self._settings.group.rank
        self._aborted = True
        self._abort(wire.Record(rank, rank, "failed", self._request.index, self._layer))

    def _abort(self, record: wire.Record) -> None:
        """Writes the record to every rank, from a stream of its own: this rank's may be waiting for a peer."""
        args = (1, self._buffer.table_address, self._settings.group.size, record.pack())
        if self._is_cpu:
            # Not by the kernel: another thread may be inside one, and the interpreter runs one at a time in a process.
            wire.claim_records(self._buffer.peers, record.pack())
            return
        stream = torch.cuda.Stream(self._settings.group.device)
        with torch.cuda.stream(stream):
            self._kernels.abort(*args)
        stream.synchronize()

    def observe(self, observer: wire.Observer) -> None:
        """Shows every packet to `observer`. In the interpreter alone."""
        assert wire.INTERPRETED, "a GPU cannot call Python"
        self._observer = observer
        ctypes.c_int64.from_address(self._buffer.address + wire.OBSERVER.value).value = id(observer)

    def close(self) -> None:
        super().close()
        if not self._is_cpu:  # this rank's kernels end by themselves: every wait in them is bounded
            device = self._settings.group.device
            if self._buffer.is_virtual:
                torch.cuda.current_stream(device).synchronize()
            else:
                torch.cuda.synchronize(device)
        self._record = ctypes.c_int64(0)
        self._buffer.close()
        self._views = _no_views()


def load_kernels(settings: TransportSettings, tuning: Tuning, multicast: bool) -> Kernels:
    """Compiles and loads every variant that the arguments of this workspace can ask for."""
    config, device = settings.config, settings.group.device
    pdl = int(not wire.INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9)
    row_bytes = config.hidden_size * config.dtype.itemsize
    wire_bytes = config.hidden_size * settings.combine_dtype.itemsize
    lanes = max(32, 1 << (settings.group.size - 1).bit_length())
    switch_sum = (
        multicast and settings.combine_order == "any" and settings.combine_dtype == torch.float32 and wire_bytes % 16 == 0
    )

    def dispatch(idx: torch.dtype, weights: torch.dtype, multicast: bool) -> Launch:
        constants = {
            "ROW_WORDS": row_bytes // 4,
            "K": config.topk,
            "IDX": DTYPES[idx],
            "WEIGHTS": DTYPES[weights],
            "OUT_IDX": DTYPES[settings.index_dtype],
            "WORDS": 4 if row_bytes % 16 == 0 else 2,
            "BLOCK": tuning.block,
            "MULTICAST": int(multicast),
            "MAX_PROGRAMS": MAX_PROGRAMS,
            "PDL": pdl,
        }
        return prepare(dispatch_kernel, DISPATCH_SIGNATURE, constants, tuning.num_warps, device)

    def combine(partial: torch.dtype) -> Launch:
        constants = {
            "H": config.hidden_size,
            "PARTIAL": DTYPES[partial],
            "WIRE": DTYPES[settings.combine_dtype],
            "OUT": DTYPES[config.dtype],
            "WORDS": 4 if wire_bytes % 16 == 0 else 2,
            "BLOCK": tuning.block,
            "SWITCH_SUM": int(switch_sum),
            "MAX_PROGRAMS": MAX_PROGRAMS,
            "PDL": pdl,
        }
        return prepare(combine_kernel, COMBINE_SIGNATURE, constants, tuning.num_warps, device)

    kinds = tuple(product(INDEX_DTYPES, FLOAT_DTYPES))
    alone = {(idx, weights): dispatch(idx, weights, False) for idx, weights in kinds}
    return Kernels(
        prepare(counts_kernel, COUNTS_SIGNATURE, {"LANES": lanes, "PDL": pdl}, 1, device),
        prepare(abort_kernel, ABORT_SIGNATURE, {"PDL": 0}, 1, device),
        {(idx, weights): dispatch(idx, weights, True) for idx, weights in kinds} if multicast else alone,
        alone,
        {partial: combine(partial) for partial in FLOAT_DTYPES},
    )


def _prepare_together(
    settings: TransportSettings, layout: Layout, tuning: Tuning, buffer: SymmetricBuffer, multicast: bool
) -> tuple[torch.Tensor, Kernels, int]:
    """Fills the buffer, loads the kernels, and agrees on their grid: the same on all ranks, since in bulk rounds each program
    tells its like. Nobody goes on before everybody is ready. Raises on every rank if one is not. Returns the mirror first: where
    the host sees the abort record without asking the device."""
    mirror, kernels, wanted, failure = None, None, 0, None
    is_cuda = settings.group.device.type == "cuda"
    try:
        mirror = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=is_cuda)
        _initialise(settings, buffer, layout, mirror.data_ptr() if is_cuda else 0)
        kernels = load_kernels(settings, tuning, multicast)
        launches = (*kernels.dispatch.values(), *kernels.dispatch_alone.values(), *kernels.combine.values())
        resident = min(launch.resident for launch in launches)
        wanted = _grid(settings, layout, tuning, resident, buffer.is_virtual)
    except Exception as error:  # noqa: BLE001  # compilers raise anything
        failure = error
    told = [wanted, None if failure is None else f"{type(failure).__name__}: {failure}"]
    answers = settings.group.channel.exchange(f"{settings.name}/loaded", told, settings.open_timeout_s)
    for rank, (_, reason) in enumerate(answers):
        if reason is not None:
            buffer.close()
            raise TransportUnavailableError(f"symmetric memory: rank {rank} failed to load its kernels: {reason}") from failure
    assert kernels is not None and mirror is not None, "nobody failed"
    return mirror, kernels, min(grid for grid, _ in answers)


def _initialise(settings: TransportSettings, buffer: SymmetricBuffer, layout: Layout, mirror: int) -> None:
    """Fills the control block and empties the slots. The buffer is zero elsewhere."""
    control = torch.zeros(wire.CONTROL_BYTES // 8, dtype=torch.int64, device="cpu")
    control[wire.TIMEOUT_NS.value // 8] = int(settings.timeout_s * 1e9)
    control[wire.MIRROR.value // 8] = mirror
    control[wire.PEER_TABLE.value // 8] = buffer.table_address
    control[wire.GROUP_SIZE.value // 8] = settings.group.size  # little-endian; the upper half is DIRTY_ROWS
    buffer.tensor[: wire.CONTROL_BYTES].copy_(control.view(torch.uint8))
    for region in (layout.dispatch_slots, layout.combine_slots, layout.topk_idx):
        buffer.tensor[region.offset : region.end].fill_(0xFF)
    if settings.group.device.type == "cuda":
        torch.cuda.current_stream(settings.group.device).synchronize()


def _views(settings: TransportSettings, buffer: SymmetricBuffer, layout: Layout) -> Views:
    config = settings.config
    rows = settings.max_tokens_per_rank * settings.group.size

    def view(region: Region, dtype: torch.dtype, columns: int) -> torch.Tensor:
        return buffer.tensor[region.offset : region.offset + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)

    gathered = Gathered(
        view(layout.hidden, config.dtype, config.hidden_size),
        view(layout.topk_idx, settings.index_dtype, config.topk),
        view(layout.topk_weights, torch.float32, config.topk),
    )
    return Views(gathered, view(layout.terms, settings.combine_dtype, config.hidden_size))


def _no_views() -> Views:
    empty = torch.empty(0, dtype=torch.uint8, device="cpu")
    return Views(Gathered(empty, empty, empty), empty)


def _num_packets(settings: TransportSettings, layout: Layout) -> int:
    """Packets that the largest rank of a step in slots sends, or gets back."""
    config = settings.config
    largest = max(config.dtype.itemsize, settings.combine_dtype.itemsize)
    return layout.slot_rows * (config.hidden_size * largest // 16 + config.topk * 2 // 4 + 1)


def _tuning(settings: TransportSettings, layout: Layout) -> Tuning:
    if settings.group.device.type == "cpu":
        return Tuning(num_warps=8, max_programs=1)
    num_sms = torch.cuda.get_device_properties(settings.group.device).multi_processor_count
    if settings.max_tokens_per_rank > layout.slot_rows:
        return Tuning(num_warps=16, max_programs=PROGRAMS_PER_SM * num_sms)
    return tuning_for(_num_packets(settings, layout), num_sms)


def _grid(settings: TransportSettings, layout: Layout, tuning: Tuning, resident: int, is_virtual: bool) -> int:
    """Programs of a dispatch or combine launch, from C and EP alone: a graph is captured at one count and replayed at another."""
    if settings.group.device.type == "cpu":
        return 1
    limit = min(tuning.max_programs, resident, MAX_PROGRAMS)
    if settings.max_ctas is not None:
        limit = min(limit, settings.max_ctas)
    if is_virtual:  # every rank's programs must be on the GPU at once, and the next kernel's wait there too
        limit = max(1, limit // (2 * settings.group.size))
    if settings.max_tokens_per_rank > layout.slot_rows:
        return limit
    blocks = -(-_num_packets(settings, layout) // tuning.block) + 1
    return max(1, min(limit, blocks * max(1, settings.group.size - 1)))
