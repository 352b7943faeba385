"""How the ranks of a group open a transport together.

They compare what they bring, so that a difference is an error here and not a hang later, agree on a transport, and try to open
it. If one rank cannot, all of them reject that transport with that rank's reason, and try the next.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from tokenferry import topology
from tokenferry.config import MoEConfig
from tokenferry.dispatched import SAME, RowFormat
from tokenferry.errors import ConfigError, PeerError, PeerFailedError, Phase, TransportUnavailableError, UsageError
from tokenferry.groups import EPGroup
from tokenferry.lifecycle import PROGRESS, logged
from tokenferry.step import StepTensors
from tokenferry.transports.base import PROTOCOL_VERSION, Transport, TransportFactory, TransportSettings
from tokenferry.transports.collective.transport import CollectiveTransport
from tokenferry.transports.counting import CountingTransport
from tokenferry.transports.debug import DebugTransport
from tokenferry.transports.local import LocalTransport
from tokenferry.transports.selection import SYMMETRIC, TRANSPORTS, Accepted, Decision, Rejected, agree, choose, decide
from tokenferry.transports.symmetric import layout as symmetric_layout

_log = logging.getLogger(__name__)

_FAREWELL_S: Final = 2.0
"""How long a rank waits for answers once a peer has failed it: that peer's may never come, and it was waited for already."""


@dataclass(frozen=True)
class Opened:
    """What a workspace stands on.

    Attributes:
        name: of the transport among the decisions, or of the object that was given.
        settings: those that it was opened with. The name is that of the attempt which succeeded, as the transport's words in the
            group's channel are.
        decisions: for every candidate, those that failed to open included.
    """

    name: str
    transport: Transport
    settings: TransportSettings
    decisions: tuple[Decision, ...]


@contextmanager
def telling_the_others(group: EPGroup) -> Iterator[None]:
    """Around what a rank does before it opens its workspace, such as loading its part of a model.

    An exception in the block goes on, and the ranks that wait for this one in `Workspace(...)` raise `PeerFailedError` at once:
    they waited `open_timeout_s` once, for a rank that had failed after seconds. Afterwards all ranks may try again.
    """
    try:
        yield
    except BaseException as error:
        with logged("the other ranks could not be told of it"):
            group.channel.give_up(f"{group.unique_name('workspace')}/open", f"{type(error).__name__}: {error}")
        raise


# --- by name ----------------------------------------------------------------------------------------------------------


def open_transport(name: str, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
    """Opens the transport `name`, on all ranks of the group together. Called by name, and by transports of your own.

    Raises:
        ConfigError: no transport of that name ("auto" is none), or a time-out that it does not serve.
        TransportUnavailableError: it cannot serve this group, as this rank sees it, or could not be opened.
        PeerTimeoutError, PeerFailedError: another rank did not come, or died.
    """
    if name not in TRANSPORTS:
        raise ConfigError(f"transport must be one of {', '.join(TRANSPORTS)}, got {name!r}")
    for decision in _decide(name, settings):
        if decision.name == name and isinstance(decision, Rejected):
            raise TransportUnavailableError(str(decision))
    if name in SYMMETRIC and settings.timeout_s > symmetric_layout.MAX_TIMEOUT_S:
        raise ConfigError(_too_long(settings.timeout_s, settings.group.rank))
    if name == "local":
        return LocalTransport(settings, step_tensors)
    if name in SYMMETRIC:
        from tokenferry.transports.symmetric.transport import SymmetricTransport  # imports Triton, which a CPU may do without

        return SymmetricTransport(settings, step_tensors, multicast=name == "nvls")
    return CollectiveTransport(settings, step_tensors)


def required_bytes(
    name: str,
    config: MoEConfig,
    ep_size: int,
    max_tokens_per_rank: int,
    combine_dtype: torch.dtype,
    index_dtype: torch.dtype = torch.int32,
    dispatch_format: RowFormat = SAME,
) -> int:
    """Bytes that a rank's workspace holds for as long as it is open."""
    if name in SYMMETRIC:
        return symmetric_layout.required_bytes(
            config, ep_size, max_tokens_per_rank, combine_dtype, name == "nvls", index_dtype, dispatch_format
        )
    return LocalTransport.required_bytes(ep_size) if name == "local" else CollectiveTransport.required_bytes(ep_size)


# --- together ---------------------------------------------------------------------------------------------------------


def open_together(
    requested: str | TransportFactory, settings: TransportSettings, step_tensors: StepTensors, phase: Phase
) -> Opened:
    """Opens the transport asked for or, with "auto", the first that opens on every rank.

    Raises:
        ConfigError: a setting differs between ranks, or does not go with the transport; on every rank.
        TransportUnavailableError: nothing could be opened; on every rank, `.decisions` has the reasons.
        PeerTimeoutError, PeerFailedError: another rank did not come, or died. That says nothing against the transport.
    """
    decisions, timeouts_s = _compare_offers(requested, settings, phase)
    wanted = requested if isinstance(requested, str) else requested.name
    failure: Exception | None = None
    attempt = 0
    while True:
        try:
            name = choose(wanted, decisions)
        except TransportUnavailableError as error:
            raise error from failure
        factory = _ByName(name) if isinstance(requested, str) else requested
        if isinstance(requested, str) and name in SYMMETRIC:
            _check_timeouts(timeouts_s)
        # What a failed attempt has left in the store, or in a registry of torch's, must not meet the next one.
        mine = settings if attempt == 0 else replace(settings, name=f"{settings.name}/attempt.{attempt}")
        logging.getLogger(PROGRESS).info("opening a workspace over %s", factory.name)
        transport, failure = _open_here(factory, mine, step_tensors)
        try:
            reason = _first_reason(factory.name, failure, mine, phase)
        except BaseException:
            _close(transport)
            raise
        if reason is None and transport is not None:
            return Opened(name, transport, mine, decisions)
        _close(transport)
        rejected = Rejected(name, reason or "")
        decisions = tuple(rejected if decision.name == name else decision for decision in decisions)
        if wanted == "auto":
            _log.warning("workspace %s: %s; trying the next transport", settings.name, rejected)
            _log.debug("workspace %s: why %s could not be opened here", settings.name, name, exc_info=failure)
            failure = None  # its frames hold what the attempt had allocated
        attempt += 1


@dataclass(frozen=True)
class _ByName:
    """The factory of one of our own transports."""

    name: str

    def open(self, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
        return open_transport(self.name, settings, step_tensors)


def _compare_offers(
    requested: str | TransportFactory, settings: TransportSettings, phase: Phase
) -> tuple[tuple[Decision, ...], list[float]]:
    """The decisions that all ranks agree on, and every rank's time-out."""
    group = settings.group
    if isinstance(requested, str):
        asked = requested
        own = _decide(requested, settings)
    else:
        asked = f"the object {requested.name!r}"
        own = (Accepted(requested.name, "a transport object, as asked for"),)
    offer = _offer(settings, asked)
    told = {
        "offer": offer,
        "decisions": [[isinstance(decision, Accepted), decision.name, decision.reason] for decision in own],
        "machine": topology.machine_id(group.device.type),
        "timeout_s": settings.timeout_s,
    }
    answers = group.channel.exchange(f"{settings.name}/open", told, settings.open_timeout_s, phase=phase)
    for rank, answer in enumerate(answers):
        for key, value in offer.items():
            if answer["offer"].get(key) != value:
                raise ConfigError(
                    f"{key} differs between ranks: rank {group.rank} has {value!r}, "
                    f"rank {rank} has {answer['offer'].get(key)!r}; open the workspace with equal settings"
                )
    per_rank = [
        [Accepted(name, reason) if ok else Rejected(name, reason) for ok, name, reason in answer["decisions"]]
        for answer in answers
    ]
    agreed = agree(per_rank, [answer["machine"] for answer in answers])
    return agreed, [answer["timeout_s"] for answer in answers]


def _decide(requested: str, settings: TransportSettings) -> tuple[Decision, ...]:
    """As this rank alone sees it."""
    return decide(
        settings.group,
        requested,
        settings.config,
        settings.max_tokens_per_rank,
        settings.combine_dtype,
        settings.dispatch_format,
    )


def _offer(settings: TransportSettings, transport: str) -> dict[str, Any]:
    """What has to be equal on all ranks, by the name that the user knows it by."""
    config = settings.config
    return {
        "protocol version": PROTOCOL_VERSION,
        "group size": settings.group.size,
        "hidden_size": config.hidden_size,
        "num_experts": config.num_experts,
        "topk": config.topk,
        "dtype": str(config.dtype),
        "max_tokens_per_rank": settings.max_tokens_per_rank,
        "combine_dtype": str(settings.combine_dtype),
        "index_dtype": str(settings.index_dtype),
        "dispatch_format": str(settings.dispatch_format.resolved(config)),
        "result_dtype": str(settings.result_dtype),
        "combine_order": settings.combine_order,
        "counts": settings.counts,
        "telemetry (or TOKENFERRY_TELEMETRY)": settings.recorder is not None,
        "transport": transport,
        "device type": settings.group.device.type,
    }


def _check_timeouts(timeouts_s: list[float]) -> None:
    """Every rank looks at all of them: one that raised alone would leave the others waiting."""
    for rank, timeout_s in enumerate(timeouts_s):
        if timeout_s > symmetric_layout.MAX_TIMEOUT_S:
            raise ConfigError(_too_long(timeout_s, rank))


def _too_long(timeout_s: float, rank: int) -> str:
    longest_s = symmetric_layout.MAX_TIMEOUT_S
    return f"timeout_s is {timeout_s} on rank {rank}, but {longest_s} at most on symmetric transports; lower it"


def _open_here(
    factory: TransportFactory, settings: TransportSettings, step_tensors: StepTensors
) -> tuple[Transport | None, Exception | None]:
    """This rank's part: an open transport, or why there is none."""
    transport: Transport | None = None
    try:
        opened = factory.open(settings, step_tensors)
        if not callable(getattr(opened, "begin_step", None)):  # the commonest mistake is to return nothing
            raise ConfigError(f"its open() returned {opened!r}, which is no open Transport")
        transport = opened
        if settings.recorder is not None:
            settings.recorder.transport = factory.name
            transport = CountingTransport(transport, settings.recorder, settings, step_tensors)
        if settings.debug:
            transport = DebugTransport.around(transport, settings, step_tensors)
        return transport, None
    except Exception as error:  # noqa: BLE001 - whatever it is, the peers must hear of it and not wait
        _close(transport)
        return None, error
    except BaseException as error:  # such as Ctrl-C
        _close(transport)
        with logged("the other ranks could not be told of it"):
            settings.group.channel.give_up(f"{settings.name}/opened", f"{type(error).__name__}: {error}")
        raise


def _first_reason(name: str, failure: Exception | None, settings: TransportSettings, phase: Phase) -> str | None:
    """Why the transport cannot be opened, in the words of the first rank that failed; None if all could open it.

    Raises:
        ConfigError: a rank found that the settings do not go with it.
        PeerError: a rank did not answer, or failed because another one did.
    """
    told = None
    if failure is not None:
        kind = "settings" if isinstance(failure, UsageError) else "peer" if isinstance(failure, PeerError) else "unavailable"
        told = [time.time(), kind, _in_words(failure)]
    wait_s = min(settings.open_timeout_s, _FAREWELL_S) if isinstance(failure, PeerError) else settings.open_timeout_s
    try:
        answers = settings.group.channel.exchange(f"{settings.name}/opened", told, wait_s, phase=phase)
    except PeerError:
        if isinstance(failure, PeerError):
            raise failure from None
        raise
    if isinstance(failure, PeerError):
        raise failure
    # In the order of time: the later ones may have failed for want of the first.
    failed = sorted((*answer, rank) for rank, answer in enumerate(answers) if answer is not None)
    for _, kind, text, rank in failed:
        if kind == "settings":
            raise ConfigError(f"transport {name!r} cannot be opened with these settings (rank {rank}): {text}") from failure
        if kind == "peer":
            raise PeerFailedError(rank, f"while opening transport {name!r}: {text}", 0, phase)
    return f"could not be opened on rank {failed[0][3]}: {failed[0][2]}" if failed else None


def _in_words(failure: Exception) -> str:
    """On one line, as the decisions are printed. An error that says itself what is unavailable needs no kind."""
    text = " ".join(str(failure).split())
    return text if isinstance(failure, TransportUnavailableError) else f"{type(failure).__name__}: {text}"


def _close(transport: Transport | None) -> None:
    if transport is not None:
        transport.close()
