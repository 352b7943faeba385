"""What ranks tell one another while a workspace opens, so that a difference or a failure is an error there, not a hang later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenferry import topology
from tokenferry.errors import ConfigError, Phase, TransportUnavailableError
from tokenferry.groups import EPGroup
from tokenferry.lifecycle import logged
from tokenferry.step import StepTensors
from tokenferry.transports import selection
from tokenferry.transports.base import PROTOCOL_VERSION, Transport, TransportSettings
from tokenferry.transports.open import open_transport
from tokenferry.transports.symmetric.layout import MAX_TIMEOUT_S


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


def open_together(name: str, settings: TransportSettings, step_tensors: StepTensors, phase: Phase) -> Transport:
    """Opens the transport; if that fails on one rank, all ranks raise and name it."""
    transport, failure = None, None
    try:
        transport = open_transport(name, settings, step_tensors)
    except Exception as error:  # noqa: BLE001 - whatever it is, the peers must hear of it and not wait
        failure = error
    told = None if failure is None else [time.time(), f"{type(failure).__name__}: {failure}"]
    answers = settings.group.channel.exchange(f"{settings.name}/opened", told, settings.open_timeout_s, phase=phase)
    failed = sorted((*answer, rank) for rank, answer in enumerate(answers) if answer is not None)
    if not failed and transport is not None:
        return transport
    if transport is not None:
        transport.close()
    _, text, rank = failed[0]  # the first in time: the others may have failed for want of it
    raise TransportUnavailableError(f"transport {name!r} could not be opened on rank {rank}: {text}") from failure


def agree_to_open(settings: TransportSettings, requested: str, phase: Phase) -> tuple[tuple[selection.Decision, ...], str]:
    """Compares what the ranks bring, so that a difference is an error here and not a hang later."""
    config = settings.config
    own = selection.decide(settings.group, requested, config, settings.max_tokens_per_rank, settings.combine_dtype)
    offer: dict[str, Any] = {
        "protocol version": PROTOCOL_VERSION,
        "group size": settings.group.size,
        "hidden_size": config.hidden_size,
        "num_experts": config.num_experts,
        "topk": config.topk,
        "dtype": str(config.dtype),
        "max_tokens_per_rank": settings.max_tokens_per_rank,
        "combine_dtype": str(settings.combine_dtype),
        "index_dtype": str(settings.index_dtype),
        "combine_order": settings.combine_order,
        "counts": settings.counts,
        "transport": requested,
        "device type": settings.group.device.type,
    }
    decisions = [[isinstance(d, selection.Accepted), d.name, d.reason] for d in own]
    machine = topology.machine_id(settings.group.device.type)
    answers = settings.group.channel.exchange(
        f"{settings.name}/open",
        {
            "offer": offer,
            "decisions": decisions,
            "machine": machine,
            "timeout_s": settings.timeout_s,
        },
        settings.open_timeout_s,
        phase=phase,
    )
    for rank, answer in enumerate(answers):
        for key, value in offer.items():
            if answer["offer"].get(key) != value:
                raise ConfigError(
                    f"{key} differs between ranks: rank {settings.group.rank} has {value!r}, "
                    f"rank {rank} has {answer['offer'].get(key)!r}; open the workspace with equal settings"
                )
    per_rank = [
        [selection.Accepted(name, reason) if ok else selection.Rejected(name, reason) for ok, name, reason in answer["decisions"]]
        for answer in answers
    ]
    agreed = selection.agree(per_rank, [answer["machine"] for answer in answers])
    chosen = selection.choose(requested, agreed)
    if chosen in selection.SYMMETRIC:
        _check_timeouts([answer["timeout_s"] for answer in answers])
    return agreed, chosen


def _check_timeouts(timeouts_s: list[float]) -> None:
    """Every rank looks at all of them: one that raised alone would leave the others waiting."""
    for rank, timeout_s in enumerate(timeouts_s):
        if timeout_s > MAX_TIMEOUT_S:
            raise ConfigError(
                f"timeout_s is {timeout_s} on rank {rank}, but {MAX_TIMEOUT_S} at most on symmetric transports; lower it"
            )
