"""Which transport: a decision, with its reason, for every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tokenferry.errors import ConfigError, TransportUnavailableError
from tokenferry.groups import EPGroup

TRANSPORTS = ("local", "nvls", "p2p", "collective")
"""All transports, in the order in which `auto` prefers them."""


@dataclass(frozen=True)
class Accepted:
    """The transport would serve this group here."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: accepted, {self.reason}"


@dataclass(frozen=True)
class Rejected:
    """The transport cannot serve this group here."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: rejected, {self.reason}"


Decision = Accepted | Rejected


def decide(group: EPGroup) -> tuple[Decision, ...]:
    """A decision for every transport, in order of preference, as this rank alone sees it."""
    return (_local(group), *_symmetric(group), _collective(group))


def _local(group: EPGroup) -> Decision:
    if group.size == 1:
        return Accepted("local", "a group of one needs no communication")
    return Rejected("local", f"the group has {group.size} ranks; local serves one")


def _symmetric(group: EPGroup) -> tuple[Decision, Decision]:
    reason = "symmetric memory is not part of this release"
    return Rejected("nvls", reason), Rejected("p2p", reason)


def _collective(group: EPGroup) -> Decision:
    if not dist.is_available():
        return Rejected("collective", "this build of torch has no torch.distributed")
    backend = "NCCL" if group.device.type == "cuda" else "gloo"
    present = dist.is_nccl_available() if backend == "NCCL" else dist.is_gloo_available()
    if not present:
        return Rejected("collective", f"this build of torch has no {backend}")
    return Accepted("collective", f"{backend} on {group.device.type.upper()} tensors")


def agree(per_rank: Sequence[Sequence[Decision]]) -> tuple[Decision, ...]:
    """One decision a transport for the whole group: rejected if a rank rejects it, with that rank's reason."""
    agreed: list[Decision] = []
    for decisions in zip(*per_rank, strict=True):
        refusals = [(rank, d) for rank, d in enumerate(decisions) if isinstance(d, Rejected)]
        if not refusals:
            agreed.append(decisions[0])
        else:
            rank, refusal = refusals[0]
            where = "" if len(refusals) == len(decisions) else f" (on rank {rank})"
            agreed.append(Rejected(refusal.name, refusal.reason + where))
    return tuple(agreed)


def choose(requested: str, decisions: Sequence[Decision]) -> str:
    """The transport to open: the first that is accepted, or the one asked for.

    Raises:
        ConfigError: no transport of that name.
        TransportUnavailableError: the one asked for was rejected, or all were.
    """
    if requested != "auto":
        by_name = {decision.name: decision for decision in decisions}
        if requested not in by_name:
            raise ConfigError(f"transport must be 'auto' or one of {', '.join(TRANSPORTS)}, got {requested!r}")
        if isinstance(by_name[requested], Rejected):
            raise TransportUnavailableError(f"transport {requested!r} cannot serve this group:", decisions)
        return requested
    for decision in decisions:
        if isinstance(decision, Accepted):
            return decision.name
    raise TransportUnavailableError("no transport can serve this group:", decisions)


def default_device() -> torch.device:
    """Where a group of this machine would live: the current GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
