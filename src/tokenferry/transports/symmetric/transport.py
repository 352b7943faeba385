"""Symmetric memory as transport: our own kernels store rows straight into the peers' buffers, without host synchronisation.

The protocol is in docs/symmetric.md; what crosses is in `kernels.wire`, and where it lies is in `layout`.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Final

import torch

from tokenferry.dispatched import HiddenRows, PartialRows
from tokenferry.errors import ConfigError, TransportUnavailableError
from tokenferry.graph_capture import is_capturing
from tokenferry.kernels import wire
from tokenferry.kernels.control_block import (
    BOARD_OFFSET,
    COUNTERS_OFFSET,
    LIMITS_OFFSET,
    OBSERVER_OFFSET,
    RECORD_OFFSET,
    SIGNS_OFFSET,
    SOLO_COUNTERS_OFFSET,
    Record,
)
from tokenferry.kernels.launch import check_addresses
from tokenferry.kernels.wire_interpreter import Observer, add_to_words, claim_records
from tokenferry.step import StepRequest, StepTensors
from tokenferry.transports.base import AbortRecord, Gathered, TransportSettings, closed_meanwhile
from tokenferry.transports.busy import BusyBoard
from tokenferry.transports.settling import agree_on_record
from tokenferry.transports.symmetric.bound_launches import RankView, Resources
from tokenferry.transports.symmetric.buffer import SymmetricBuffer
from tokenferry.transports.symmetric.layout import MAX_TIMEOUT_S, Layout, plan
from tokenferry.transports.symmetric.loading import load_together, sums_in_the_switch
from tokenferry.transports.symmetric.rank_kernels import RankKernels, SoloKernels
from tokenferry.transports.symmetric.regions import RegionTensors, limits_of
from tokenferry.transports.symmetric.side_stream import SideStream
from tokenferry.transports.symmetric.tuning import FewTokens, Tuning, choose_few_tokens, choose_tuning

_REASONS: Final = {
    "failed": "rank {0.rank} gave up",
    "too-few-rows": "combine in layer {0.layer} was given fewer partial rows than the ranks bring tokens",
}
"""What a rank has failed with that blames itself in a record."""


class SymmetricTransport(RankKernels):
    """See `Transport`. R = C * EP, whatever the counts. The tensors of a `Gathered` are views of the buffer.

    Args:
        multicast: dispatch by multicast stores (`nvls`); without, by plain stores to each peer (`p2p`).
        slot_rows, tuning, few: to be measured with others than those that `layout` and `tuning` choose. With a tuning of your own
            there are no launches for few tokens, unless you give these too.

    Raises:
        TransportUnavailableError: on every rank, naming the rank that failed and why.
        ConfigError: rows that symmetric memory does not serve (see `layout.plan`).
        PeerTimeoutError: a rank did not come.
    """

    def __init__(
        self,
        settings: TransportSettings,
        step_tensors: StepTensors,
        *,
        multicast: bool = False,
        slot_rows: int | None = None,
        tuning: Tuning | None = None,
        few: FewTokens | None = None,
    ) -> None:
        group = settings.group
        layout = plan(
            settings.config,
            group.size,
            settings.max_tokens_per_rank,
            settings.combine_dtype,
            multicast=multicast,
            slot_rows=slot_rows,
            index_dtype=settings.index_dtype,
            dispatch_format=settings.dispatch_format,
        )
        buffer = SymmetricBuffer(group, layout.num_bytes, f"{settings.name}/memory", settings.open_timeout_s)
        self._is_cpu = group.device.type == "cpu"
        self._side: SideStream | None = None
        try:
            check_addresses(buffer.addresses)
            if multicast and group.size > 1 and not buffer.multicast_address:
                raise TransportUnavailableError("nvls: the symmetric memory has no multicast address here; use transport='p2p'")
            multicast_rows = multicast and group.size > 1
            if tuning is None:
                tuning = choose_tuning(settings, layout)
                few = None if multicast_rows and sums_in_the_switch(settings) else choose_few_tokens(settings, layout, tuning)
            self._side = None if self._is_cpu else SideStream(group.device)
            loaded = load_together(settings, layout, tuning, few, buffer, multicast=multicast_rows)
        except BaseException:
            if self._side is not None:
                self._side.close()
            buffer.close()
            raise
        resources = Resources(settings, step_tensors, buffer, layout, loaded.kernels)
        super().__init__(resources, _view_in_group(settings, buffer, layout), RegionTensors.of(settings, buffer, layout))
        self.name = "nvls" if multicast else "p2p"
        self._solo_view = _view_alone(buffer, layout)
        self._mirror = loaded.mirror
        self._aborted = False
        self._observer: Observer | None = None
        watched = buffer.address + RECORD_OFFSET if self._is_cpu else self._mirror.data_ptr()
        self._record = ctypes.c_int64.from_address(watched)
        if settings.recorder is not None:
            settings.recorder.take_switch(self._let_kernels_count)

    # --- operations: look at the record first, without asking the device --------------------------------------------

    def begin_step(self, request: StepRequest, layer: int) -> None:
        self._raise_known()
        super().begin_step(request, layer)
        self._raise_after()

    def dispatch(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Gathered:
        self._raise_known()
        gathered = super().dispatch(layer, hidden, topk_idx, topk_weights)
        self._raise_after()
        return gathered

    def dispatch_begin(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        self._raise_known()
        super().dispatch_begin(layer, hidden, topk_idx, topk_weights)

    def dispatch_end(self) -> Gathered:
        self._raise_known()
        gathered = super().dispatch_end()
        self._raise_after()
        return gathered

    def combine(self, partial: PartialRows, out: torch.Tensor | None = None) -> torch.Tensor:
        self._raise_known()
        combined = super().combine(partial, out)
        self._raise_after()
        return combined

    def combine_begin(self, partial: PartialRows) -> None:
        self._raise_known()
        super().combine_begin(partial)

    def combine_end(self, out: torch.Tensor | None = None) -> torch.Tensor:
        self._raise_known()
        combined = super().combine_end(out)
        self._raise_after()
        return combined

    def solo(self) -> RankKernels:
        return SoloKernels(self._resources, self._solo_view, self._regions)

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
        record = Record.unpack(word)
        settings, step = self._settings, record.step_near(self._request.index)
        reason = _REASONS.get(record.phase, "").format(record)
        phase = "data-missing" if reason else record.phase
        if not reason and record.reporter == settings.group.rank:
            elsewhere = settings.group.waiting.who_waits_elsewhere(record.rank, settings.name)
            phase, reason = (phase, reason) if elsewhere is None else ("counts-disagree", elsewhere)
        detail = BusyBoard(settings).in_words(record.reporter)
        mine = AbortRecord(record.rank, record.reporter, phase, step, record.layer, settings.timeout_s, reason, detail)
        return agree_on_record(settings, mine).error_for(settings.group.rank)

    def check_known(self) -> None:
        """The kernel that gives up, or that finds a record as it begins, copies the record to a word of the host before it ends:
        who has synchronised with it sees the word."""
        self._raise_known()

    def check(self) -> None:
        self._raise_known()
        if not self._is_cpu:
            word = int(self._buffer.tensor[RECORD_OFFSET : RECORD_OFFSET + 8].view(torch.int64).item())
            if word:
                raise self._settled(word)

    def give_sign_of_life(self) -> None:
        group = self._settings.group
        self._add_to_words(self._buffer.table_address, group.size, group.rank, SIGNS_OFFSET, 1)

    def set_timeout(self, timeout_s: float) -> None:
        if timeout_s > MAX_TIMEOUT_S:
            raise ConfigError(f"timeout_s is {timeout_s}, but {MAX_TIMEOUT_S} at most on symmetric transports; lower it")
        settings = replace(self._settings, timeout_s=timeout_s)
        lacking = limits_of(settings) - limits_of(self._settings)
        self._add_to_words(self._buffer.own_table_address, 1, -1, LIMITS_OFFSET, lacking)
        self._settings = settings

    def _let_kernels_count(self, on: bool) -> None:
        """Kernels find the address of the board in their counters, or nothing."""
        recorder = self._settings.recorder
        assert recorder is not None and recorder.board is not None, "it was made as the workspace opened"
        address = recorder.board.data_ptr()
        offset = COUNTERS_OFFSET + BOARD_OFFSET
        self._add_to_words(self._buffer.own_table_address, 1, -1, offset, address if on else -address)

    def _add_to_words(self, table_address: int, size: int, skipped: int, offset: int, amount: int) -> None:
        """See `add_kernel`. Not by the kernel on CPUs, as in `_abort`."""
        if self._side is None:
            table = (ctypes.c_int64 * size).from_address(table_address)
            add_to_words([address + offset for place, address in enumerate(table) if place != skipped], amount)
            return
        with self._side.current():
            self._resources.kernels.add(1, table_address, size, skipped, offset, amount)

    def fail(self, reason: str) -> None:
        settings = self._settings
        rank = settings.group.rank
        mine = AbortRecord(rank, rank, "data-missing", self._request.index, self._layer, 0.0, reason)
        try:
            agree_on_record(settings, mine)
        finally:
            self._abort(Record(rank, rank, "failed", self._request.index, self._layer))

    def abort(self) -> None:
        rank = self._settings.group.rank
        self._aborted = True
        self._abort(Record(rank, rank, "failed", self._request.index, self._layer))

    def _abort(self, record: Record) -> None:
        """Writes the record to every rank, from a stream of its own: this rank's may be waiting for a peer."""
        if self._is_cpu:
            # Not by the kernel: another thread may be inside one, and the interpreter runs one at a time in a process.
            claim_records(self._buffer.addresses, record.pack())
            return
        args = (1, self._buffer.table_address, self._settings.group.size, record.pack())
        device = self._settings.group.device
        may_wait = not is_capturing(device)  # CUDA refuses to wait while the calling thread captures a graph
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            self._resources.kernels.abort(*args)
        if may_wait:
            stream.synchronize()

    def observe(self, observer: Observer) -> None:
        """Shows every packet to `observer`. In the interpreter alone."""
        assert wire.INTERPRETED, "a GPU cannot call Python"
        self._observer = observer
        ctypes.c_int64.from_address(self._buffer.address + OBSERVER_OFFSET).value = id(observer)

    def close(self) -> None:
        super().close()
        if not self._is_cpu:  # this rank's kernels end by themselves: every wait in them is bounded
            device = self._settings.group.device
            if self._buffer.is_virtual:
                torch.cuda.current_stream(device).synchronize()
            else:
                torch.cuda.synchronize(device)
        if self._side is not None:
            self._side.close()
        self._record = ctypes.c_int64(0)
        self._buffer.close()
        self._regions = RegionTensors.none()


def _view_in_group(settings: TransportSettings, buffer: SymmetricBuffer, layout: Layout) -> RankView:
    return RankView(
        rank=settings.group.rank,
        size=settings.group.size,
        counters_ptr=buffer.address + COUNTERS_OFFSET,
        step_counts_ptr=buffer.address + layout.step_counts.offset,
        peer_table_ptr=buffer.table_address,
        multicast_ptr=buffer.multicast_address,
    )


def _view_alone(buffer: SymmetricBuffer, layout: Layout) -> RankView:
    return RankView(
        rank=0,
        size=1,
        counters_ptr=buffer.address + SOLO_COUNTERS_OFFSET,
        step_counts_ptr=buffer.address + layout.solo_step_counts.offset,
        peer_table_ptr=buffer.own_table_address,
        multicast_ptr=0,
    )
