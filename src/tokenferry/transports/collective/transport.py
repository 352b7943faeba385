"""`torch.distributed` as transport: gloo on CPUs, NCCL on GPUs, within a node or across nodes.

Two messages a layer each way at most: the hidden rows, and the ids and weights packed in one. Combine is an exchange (each
rank sends every owner its rows) and a float32 sum in rank order, because a library's reduce-scatter has an order of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from tokenferry.errors import PeerError, PeerFailedError, Phase, StateError
from tokenferry.reference import pad_rows, sum_in_rank_order
from tokenferry.step import FLAG_DONE, Announced, StepRequest, StepTensors
from tokenferry.transports.base import AbortRecord, Gathered, Transport, TransportSettings, closed_meanwhile, mask_padding
from tokenferry.transports.collective.gloo import GlooCommunicator
from tokenferry.transports.collective.messages import (
    CommunicationError,
    Communicator,
    Header,
    Pending,
    pack_routing,
    unpack_routing,
)
from tokenferry.transports.collective.nccl import NcclCommunicator
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
    hidden_RH: torch.Tensor
    routing_R2K: torch.Tensor
    sent: tuple[torch.Tensor, ...]
    """Kept alive until they have left, though the caller may drop them."""


@dataclass
class _Combine:
    """A combine under way: `terms[r]` are rank r's rows for this rank. `sent` is kept alive until it has left."""

    pending: Pending
    terms: list[torch.Tensor]
    sent: torch.Tensor


class CollectiveTransport(Transport):
    """See `Transport`. R = V with uneven counts (known to the host, once a step), EP·T with equal counts."""

    name = "collective"

    def __init__(self, settings: TransportSettings, step_tensors: StepTensors) -> None:
        self._settings, self._step_tensors = settings, step_tensors
        self._request = StepRequest(0, 0, 0)
        self._counts = [0] * settings.group.size
        self._announced: list[Header] | None = None
        self._layer, self._operation, self._num_supplied = -1, STEP, 0
        self._dispatch: _Dispatch | None = None
        self._combine: _Combine | None = None
        self._combine_input: torch.Tensor | None = None
        self._aborted = False
        self._communicator = _open_communicator(settings)

    @property
    def nbytes(self) -> int:
        return self._step_tensors.nbytes

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
        """Only the step's counts are kept; rows live in tensors of the call."""
        return (3 + 2 * ep_size) * 4

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
            self._counts = [request.num_tokens] * self._settings.group.size
            self._step_tensors.publish_equal(request.num_tokens, request.flags)
            return
        if headers is None:
            headers = self._exchange_headers()
        self._counts = [header.num_tokens for header in headers]
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
        try:
            headers = self._communicator.exchange_headers(self._header())
        except CommunicationError as error:
            raise self._peer_error(error) from error
        self._compare(headers)
        return headers

    # --- dispatch ---------------------------------------------------------------------------------------------------

    def dispatch_begin(self, layer: int, hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        self._layer, self._operation = layer, DISPATCH
        self._num_supplied = hidden.shape[0]
        if self._num_supplied < self._request.num_tokens:
            hidden, topk_idx, topk_weights = pad_rows(hidden, topk_idx, topk_weights, self._request.num_tokens)
        routing = pack_routing(mask_padding(topk_idx, self._request.num_real_tokens), topk_weights)
        gathered_hidden = hidden.new_empty((sum(self._counts), hidden.shape[1]))
        gathered_routing = routing.new_empty((sum(self._counts), routing.shape[1]))
        hidden_parts, routing_parts = gathered_hidden.split(self._counts), gathered_routing.split(self._counts)
        rank, size = self._settings.group.rank, self._settings.group.size
        pending = self._start([(hidden, routing)] * size, list(zip(hidden_parts, routing_parts, strict=True)))
        hidden_parts[rank].copy_(hidden)
        routing_parts[rank].copy_(routing)
        self._dispatch = _Dispatch(pending, gathered_hidden, gathered_routing, (hidden, routing))

    def dispatch_end(self) -> Gathered:
        self.launched = True
        dispatch, self._dispatch = self._dispatch, None
        assert dispatch is not None, "the workspace orders the halves"
        self._finish(dispatch.pending)
        idx, weights = unpack_routing(dispatch.routing_R2K)
        return Gathered(dispatch.hidden_RH, idx.to(self._settings.index_dtype), weights)

    # --- combine ----------------------------------------------------------------------------------------------------

    def combine_input(self) -> torch.Tensor:
        if self._combine_input is None:
            shape = (sum(self._counts), self._settings.config.hidden_size)
            with torch.inference_mode(False):  # a later layer of the step may fill it outside of the mode
                self._combine_input = torch.empty(shape, dtype=self._settings.combine_dtype, device=self._settings.group.device)
        return self._combine_input

    def combine_begin(self, partial: torch.Tensor) -> None:
        self._operation = COMBINE
        rank, size = self._settings.group.rank, self._settings.group.size
        rows = partial.to(self._settings.combine_dtype)
        if self._settings.combine_order == "any" and len(set(self._counts)) == 1 and self._counts[0]:
            reduced = rows.new_empty((self._counts[rank], rows.shape[1]))
            pending = self._reduce_scatter(reduced, rows)
            if pending is not None:
                self._combine = _Combine(pending, [reduced], rows)
                return
        outgoing = rows.split(self._counts)
        own_rows = self._counts[rank]
        terms = [
            outgoing[rank] if peer == rank else outgoing[rank].new_empty((own_rows, partial.shape[1])) for peer in range(size)
        ]
        pending = self._start([(rows,) for rows in outgoing], [(term,) for term in terms])
        self._combine = _Combine(pending, terms, rows)

    def combine_end(self) -> torch.Tensor:
        self.launched = True
        combine, self._combine = self._combine, None
        assert combine is not None, "the workspace orders the halves"
        self._finish(combine.pending)
        terms = [term[: self._num_supplied] for term in combine.terms]
        return sum_in_rank_order(terms).to(self._settings.config.dtype)

    # --- peers ------------------------------------------------------------------------------------------------------

    @property
    def _phase(self) -> Phase:
        """Of the operation under way."""
        return "not-entered" if self._operation in (STEP, ANNOUNCE) else "data-missing"

    def _header(self) -> Header:
        request = self._request
        generation = self._settings.generation
        return Header(self._operation, request.index, self._layer, generation, request.num_tokens, request.flags)

    def _start(self, outgoing: list[tuple[torch.Tensor, ...]], incoming: list[tuple[torch.Tensor, ...]]) -> Pending:
        self.launched = True
        try:
            return self._communicator.start(self._header(), outgoing, incoming)
        except CommunicationError as error:
            raise self._peer_error(error) from error

    def _reduce_scatter(self, out: torch.Tensor, rows: torch.Tensor) -> Pending | None:
        """The library's own, where it has one that is faster than the ordered exchange."""
        had_launched, self.launched = self.launched, True
        try:
            pending = self._communicator.reduce_scatter(out, rows)
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
        record = AbortRecord(error.rank, rank, phase, self._request.index, self._layer, error.waited_s, reason)
        return self._settle(record, grace_s=RECORD_GRACE_S if has_failed else 0.0)

    def _settle(self, record: AbortRecord, grace_s: float = 0.0) -> PeerError:
        if self._aborted:  # this rank dropped the connections itself: no peer is to blame
            raise closed_meanwhile()
        try:
            agreed = agree_on_record(self._settings, record, grace_s)
        finally:
            self._communicator.abort()
        return agreed.error_for(self._settings.group.rank)

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
        self._communicator.abort()
        self._dispatch = self._combine = self._combine_input = None


def _open_communicator(settings: TransportSettings) -> Communicator:
    group = settings.group
    store = group.rendezvous.under(f"{settings.name}/communicator")
    if group.device.type == "cpu":
        return GlooCommunicator(store.store, group.rank, group.size, settings.timeout_s, settings.open_timeout_s)
    return NcclCommunicator(store, group, settings.timeout_s, settings.open_timeout_s, lambda: known_record(settings))
