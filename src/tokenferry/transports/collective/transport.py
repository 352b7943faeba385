"""`torch.distributed` as transport: gloo on CPUs, NCCL on GPUs, within a node or across nodes.

Hidden rows, ids and weights travel as they are, straight into the gathered tensors, in one call of the library where it has one
for several tensors. Combine is an exchange (each rank sends every owner its rows) and a float32 sum in rank order, because a
library's reduce-scatter has an order of its own. Of two ranks it does the same with equal counts: two terms have one order.

Legend: T rows of this rank, R gathered rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from tokenferry.dispatched import HiddenRows, PartialRows, empty_terms
from tokenferry.errors import PeerError, PeerFailedError, Phase, StateError
from tokenferry.reference import in_combine_dtype, in_format, pad_rows
from tokenferry.step import FLAG_DONE, Announced, StepRequest, StepTensors
from tokenferry.transports.base import AbortRecord, Gathered, Transport, TransportSettings, closed_meanwhile
from tokenferry.transports.busy import BusyBoard, WaitClock
from tokenferry.transports.collective.gloo import GlooCommunicator
from tokenferry.transports.collective.messages import (
    CommunicationError,
    Communicator,
    Header,
    Pending,
)
from tokenferry.transports.collective.nccl import NcclCommunicator
from tokenferry.transports.collective.reducing import most_reduced_bytes
from tokenferry.transports.collective.rows import message_of, row_work, rows_of, wire_rows
from tokenferry.transports.collective.waits import CollectiveWaits
from tokenferry.transports.local import LocalTransport
from tokenferry.transports.settling import agree_on_record, known_record

STEP, DISPATCH, COMBINE, ANNOUNCE = 0, 1, 2, 3
"""Operations, in the order in which a rank goes through them within a layer. Announcing stands apart, so that a rank which
announces beside one which begins a step is found: they would bring different numbers of rows."""

RECORD_GRACE_S = 0.3
"""How long a broken connection waits for the abort record that explains it: the reporter writes it just after it closes."""


@dataclass
class _Dispatch:
    """A dispatch under way."""

    pending: Pending
    gathered: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Hidden rows, ids, weights."""
    sent: tuple[torch.Tensor, ...]
    """Kept alive until they have left, though the caller may drop them."""


@dataclass
class _Combine:
    """A combine under way: `received` is [EP, T, H], the ranks' terms but this one's, which is `own`; or [T, H], their sum, and
    then `own` is None. `sent` is kept alive until it has left."""

    pending: Pending
    received: torch.Tensor
    own: torch.Tensor | None
    sent: torch.Tensor


class CollectiveTransport(Transport):
    """See `Transport`. R = V with uneven counts (known to the host, once a step), EP·T with equal counts."""

    name = "collective"

    def __init__(self, settings: TransportSettings, step_tensors: StepTensors) -> None:
        self._settings, self._step_tensors = settings, step_tensors
        self._request = StepRequest(0, 0, 0)
        self._counts, self._are_equal, self._first_row = [0] * settings.group.size, True, 0
        self._announced: list[Header] | None = None
        self._layer, self._operation, self._num_supplied = -1, STEP, 0
        self._dispatch: _Dispatch | None = None
        self._combine: _Combine | None = None
        self._combine_input: PartialRows | None = None
        self._aborted = False
        self._per_token = step_tensors.per_token()
        self._rows = row_work(settings)
        self._most_reduced_bytes = most_reduced_bytes(settings)
        self._busy = BusyBoard(settings)
        self._communicator = _open_communicator(settings, WaitClock(self._busy.num_peers_signs, settings.longest_wait_s))
        self._waits = CollectiveWaits(settings.recorder, settings.group.device)
        self._communicator.on_wait = self._waits.by_message

    @property
    def nbytes(self) -> int:
        return self._step_tensors.nbytes + self._per_token.nbytes

    @property
    def rows_per_token(self) -> int | None:
        return self._settings.group.size if self._settings.counts == "equal" else None

    @property
    def counts_pass_through_hosts(self) -> bool:
        return True

    @property
    def tokens_per_rank(self) -> tuple[int, ...]:
        """The step's counts, which this transport knows on the host."""
        return tuple(self._counts)

    @staticmethod
    def required_bytes(ep_size: int) -> int:
        """Only the step's counts are kept, and what they are made from; rows live in tensors of the call."""
        return 2 * (3 + 2 * ep_size) * 4

    # --- step -------------------------------------------------------------------------------------------------------

    def begin_step(self, request: StepRequest, layer: int) -> None:
        headers = self._announced
        own = self._settings.group.rank
        is_equal = self._settings.counts == "equal" or request.equal
        if not is_equal and headers is not None and headers[own].num_tokens != request.num_tokens:
            raise StateError(
                f"begin_step: {headers[own].num_tokens} tokens were announced but {request.num_tokens} come; the peers count on "
                "the announced number"
            )
        self._request, self._layer, self._operation = request, layer, STEP
        self._combine_input = None
        if is_equal:
            self._announced = None
            self._counts, self._are_equal = [request.num_tokens] * self._settings.group.size, True
            self._first_row = own * request.num_tokens
            self._step_tensors.publish_equal(request.num_tokens, request.flags, self._per_token)
            return
        if headers is None:
            headers = self._exchange_headers()
        self._counts = [header.num_tokens for header in headers]
        self._are_equal, self._first_row = len(set(self._counts)) == 1, sum(self._counts[:own])
        self._step_tensors.publish(self._counts, [header.flags for header in headers])
        self._announced = None

    def announce(self, request: StepRequest) -> Announced:
        """Every rank's counts for the next step, known to the host; that step's `begin_step` then exchanges nothing."""
        self._request, self._layer, self._operation = request, -1, ANNOUNCE
        headers = self._announced = self._exchange_headers()
        return Announced(tuple(header.num_tokens for header in headers), all(header.flags & FLAG_DONE for header in headers))

    def watching_replay(self) -> AbstractContextManager[None]:
        """Around the launch of a graph that was captured with this transport: a peer that does not come is noticed.

        What was announced is used up by it: an eager step after it would take the counts of this one for its own.
        """
        self.check_known()
        self._announced = None
        return self._communicator.watching_replay()

    def watching_step(self) -> AbstractContextManager[None]:
        return self._communicator.watching_step()

    def _exchange_headers(self) -> list[Header]:
        self.launched = True
        self._waits.step_begins(self._request.index)
        try:
            headers = self._communicator.exchange_headers(self._header())
        except CommunicationError as error:
            raise self._peer_error(error) from error
        self._compare(headers)
        self._waits.headers_came(headers)
        return headers

    # --- dispatch ---------------------------------------------------------------------------------------------------

    def dispatch(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Gathered:
        self._begin_dispatch(layer, hidden, topk_idx, topk_weights, overlaps=False)
        return self.dispatch_end()

    def dispatch_begin(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        self._begin_dispatch(layer, hidden, topk_idx, topk_weights, overlaps=True)

    def _begin_dispatch(
        self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor, *, overlaps: bool
    ) -> None:
        self._layer, self._operation = layer, DISPATCH
        self._waits.span_begins(DISPATCH, layer)
        self._num_supplied, real = hidden.shape[0], self._request.num_real_tokens
        hidden = in_format(hidden, self._settings.dispatch_format)
        if self._num_supplied < self._request.num_tokens:
            hidden, topk_idx, topk_weights = pad_rows(hidden, topk_idx, topk_weights, self._request.num_tokens)
        gathered = wire_rows(self._settings, sum(self._counts))
        size = self._settings.group.size
        slots = [rows.narrow(0, self._first_row, self._request.num_tokens) for rows in gathered]
        message = message_of(hidden)
        own = (message, topk_idx, topk_weights)
        if not self._rows.travels_as_it_is(topk_idx, topk_weights, real):
            own = (message, slots[1], slots[2])
            self._rows.write_routing(slots[1], slots[2], topk_idx, topk_weights, real)
        pending = self._gather(gathered, own, overlaps=overlaps) if self._are_equal and self._counts[0] else None
        if pending is None:
            parts = [rows.split(self._counts) for rows in gathered]
            pending = self._start([own] * size, list(zip(*parts, strict=True)))
            for slot, rows in zip(slots, own, strict=True):
                if rows is not slot:
                    slot.copy_(rows)
        self._dispatch = _Dispatch(pending, gathered, own)

    def dispatch_end(self) -> Gathered:
        self.launched = True
        dispatch, self._dispatch = self._dispatch, None
        assert dispatch is not None, "the workspace orders the halves"
        self._finish(dispatch.pending)
        self._waits.span_ends()
        message, idx, weights = dispatch.gathered
        return Gathered(rows_of(message, self._settings), idx, weights)

    # --- combine ----------------------------------------------------------------------------------------------------

    def combine_input(self) -> PartialRows:
        if self._combine_input is None:
            settings = self._settings
            with torch.inference_mode(False):  # a later layer of the step may fill it outside of the mode
                self._combine_input = empty_terms(
                    sum(self._counts), settings.config.hidden_size, settings.combine_dtype, settings.group.device
                )
        return self._combine_input

    def combine(self, partial: PartialRows, out: torch.Tensor | None = None) -> torch.Tensor:
        self._begin_combine(partial, overlaps=False, out=out)
        return self.combine_end(out)

    def combine_begin(self, partial: PartialRows) -> None:
        self._begin_combine(partial, overlaps=True)

    def _begin_combine(self, partial: PartialRows, *, overlaps: bool, out: torch.Tensor | None = None) -> None:
        self._operation = COMBINE
        self._waits.span_begins(COMBINE, self._layer)
        rank, size = self._settings.group.rank, self._settings.group.size
        rows = message_of(in_combine_dtype(partial, self._settings.combine_dtype))
        own_rows, hidden_size = self._counts[rank], rows.shape[1]
        num_bytes = own_rows * hidden_size * rows.element_size()
        if self._are_equal and 0 < num_bytes <= self._most_reduced_bytes:
            fits = out is not None and out.dtype == rows.dtype and out.shape[0] == own_rows
            reduced = out if out is not None and fits else rows.new_empty((own_rows, hidden_size))
            pending = self._reduce_scatter(reduced, rows, overlaps=overlaps)
            if pending is not None:
                self._combine = _Combine(pending, reduced, None, rows)
                return
        outgoing = rows.split(self._counts)
        terms = rows.new_empty((size, own_rows, hidden_size))
        pending = self._start([(rows,) for rows in outgoing], [(term,) for term in terms.unbind()])
        self._combine = _Combine(pending, terms, outgoing[rank], rows)

    def combine_end(self, out: torch.Tensor | None = None) -> torch.Tensor:
        self.launched = True
        combine, self._combine = self._combine, None
        assert combine is not None, "the workspace orders the halves"
        self._finish(combine.pending)
        self._waits.span_ends()
        if combine.own is None:
            combined = combine.received[: self._num_supplied]
            if out is None:
                return combined.to(self._settings.result_dtype)
            return out if combine.received is out else out.copy_(combined)
        return self._rows.sum_terms(combine.received, combine.own, self._num_supplied, out)

    # --- peers ------------------------------------------------------------------------------------------------------

    @property
    def _phase(self) -> Phase:
        """Of the operation under way."""
        return "not-entered" if self._operation in (STEP, ANNOUNCE) else "data-missing"

    def _header(self) -> Header:
        request = self._request
        generation = self._settings.generation
        place = (self._operation, request.index, self._layer, generation)
        return Header(*place, request.num_tokens, request.flags, self._waits.now_ns())

    def _start(self, outgoing: list[tuple[torch.Tensor, ...]], incoming: list[tuple[torch.Tensor, ...]]) -> Pending:
        self.launched = True
        try:
            return self._communicator.start(self._header(), outgoing, incoming)
        except CommunicationError as error:
            raise self._peer_error(error) from error

    def _gather(self, gathered: tuple[torch.Tensor, ...], own: tuple[torch.Tensor, ...], *, overlaps: bool) -> Pending | None:
        """The library's own, where it has one that is faster than messages to each."""
        return self._try(lambda: self._communicator.all_gather(gathered, own, overlaps=overlaps))

    def _reduce_scatter(self, out: torch.Tensor, rows: torch.Tensor, *, overlaps: bool) -> Pending | None:
        """The library's own, where it has one that is faster than the ordered exchange."""
        return self._try(lambda: self._communicator.reduce_scatter(out, rows, overlaps=overlaps))

    def _try(self, start: Callable[[], Pending | None]) -> Pending | None:
        had_launched, self.launched = self.launched, True
        try:
            pending = start()
        except CommunicationError as error:
            raise self._peer_error(error) from error
        if pending is None:
            self.launched = had_launched
        return pending

    def _finish(self, pending: Pending) -> None:
        try:
            headers = pending.headers()
            if headers is not None:
                self._compare(headers)
            pending.finish()
        except CommunicationError as error:
            raise self._peer_error(error) from error

    def _compare(self, headers: list[Header]) -> None:
        """Raises if a rank is at another place than this one: the rank that stands alone is blamed, of two the one behind."""
        positions = [header.position() for header in headers]
        if len(set(positions)) == 1:
            return
        rank = self._settings.group.rank
        odd = min(range(len(positions)), key=lambda r: (positions.count(positions[r]), positions[r]))
        names = ("begin_step", "dispatch", "combine", "announce")
        told = "; ".join(f"rank {r} is in {names[h.operation]} of step {h.step}, layer {h.layer}" for r, h in enumerate(headers))
        record = AbortRecord(odd, rank, "counts-disagree", self._request.index, self._layer, 0.0, f"counts disagree: {told}")
        raise self._settle(record)

    def _peer_error(self, error: CommunicationError) -> PeerError:
        """Turns what the communicator noticed into the error that the whole group agrees on."""
        phase: Phase = self._phase
        reason, has_failed = error.reason, bool(error.reason)
        rank = self._settings.group.rank
        elsewhere = self._settings.group.waiting.who_waits_elsewhere(error.rank, self._settings.name, grace=not has_failed)
        if elsewhere is not None:
            phase, reason = "counts-disagree", elsewhere
        detail = "" if has_failed else self._busy.in_words(rank)
        record = AbortRecord(error.rank, rank, phase, self._request.index, self._layer, error.waited_s, reason, detail)
        return self._settle(record, grace_s=RECORD_GRACE_S if has_failed else 0.0)

    def _settle(self, record: AbortRecord, grace_s: float = 0.0) -> PeerError:
        if self._aborted:  # this rank dropped the connections itself: no peer is to blame
            raise closed_meanwhile()
        try:
            agreed = agree_on_record(self._settings, record, grace_s)
        finally:
            self._communicator.abort()
        return agreed.error_for(self._settings.group.rank)

    def set_timeout(self, timeout_s: float) -> None:
        self._communicator.timeout_s = timeout_s

    def fail(self, reason: str) -> None:
        rank = self._settings.group.rank
        self._settle(AbortRecord(rank, rank, self._phase, self._request.index, self._layer, 0.0, reason))

    def check_known(self) -> None:
        """What a call has not raised itself the communicator's watchdog has found. A peer's abort record it looks for while it
        waits; beside that, a record is seen by `check` and by the next call."""
        try:
            self._communicator.raise_if_broken()
        except CommunicationError as error:
            raise self._peer_error(error) from error

    def check(self) -> None:
        self.check_known()
        try:
            known = known_record(self._settings)
        except PeerFailedError as lost:
            self._communicator.abort()
            raise PeerFailedError(lost.rank, lost.reason, self._request.index, self._phase) from lost
        if known is not None:
            self._communicator.abort()
            raise known.error_for(self._settings.group.rank)

    def solo(self) -> LocalTransport:
        return LocalTransport(self._settings, self._step_tensors)

    def abort(self) -> None:
        self._aborted = True
        self._communicator.abort()

    def close(self) -> None:
        try:
            if not self._aborted:
                self._communicator.let_launched_end()
        finally:  # whoever interrupts the wait has closed it all the same
            self._communicator.abort()
            self._dispatch = self._combine = self._combine_input = None


def _open_communicator(settings: TransportSettings, clock: WaitClock) -> Communicator:
    group = settings.group
    store = group.rendezvous.under(f"{settings.name}/communicator")
    if group.device.type == "cpu":
        return GlooCommunicator(store.store, group.rank, group.size, settings.timeout_s, settings.open_timeout_s, clock)
    return NcclCommunicator(store, group, settings.timeout_s, settings.open_timeout_s, lambda: known_record(settings), clock)
