"""How the ranks of a workspace agree on whom to blame: the first abort record in the store counts, for all of them."""

from __future__ import annotations

import time
from dataclasses import asdict, replace

from tokenferry.errors import PeerFailedError
from tokenferry.transports.base import AbortRecord, TransportSettings

_POLL_S = 0.01


def known_record(settings: TransportSettings) -> AbortRecord | None:
    """The record on which the ranks agreed, if there is one.

    Raises:
        PeerFailedError: the store is lost.
    """
    record = settings.group.channel.peek(_key(settings))
    return None if record is None else AbortRecord(**record)


def agree_on_record(settings: TransportSettings, record: AbortRecord, grace_s: float = 0.0) -> AbortRecord:
    """Puts `record` into the store unless a peer was first, and returns what stands there. Waits `grace_s` seconds for a peer who
    knows more. Where the store is lost, this rank goes by what it knows itself."""
    try:
        give_up_s = time.monotonic() + grace_s
        while known_record(settings) is None and time.monotonic() < give_up_s:
            time.sleep(_POLL_S)
        return AbortRecord(**settings.group.channel.claim(_key(settings), asdict(record)))
    except PeerFailedError as lost:
        return _without_store(record, lost, settings.group.rank)


def _without_store(record: AbortRecord, lost: PeerFailedError, rank: int) -> AbortRecord:
    """The record of a rank that can ask nobody. The host of the store is gone for certain; a peer that this rank misses beside it
    may have left because of that, so the host is blamed in its place. What this rank saw with its own eyes stays."""
    blamed, seen = record.rank, record.reason
    if lost.rank >= 0 and record.rank not in (lost.rank, rank) and record.phase != "counts-disagree":
        blamed = lost.rank
        seen = f"rank {record.rank} was missed ({seen or f'for {record.waited_s:.1f} s'})" if record.rank >= 0 else seen
    reasons = [seen, lost.reason] if seen and seen != lost.reason else [lost.reason]
    return replace(record, rank=blamed, reason="; ".join(reasons))


def _key(settings: TransportSettings) -> str:
    return f"{settings.name}/abort"
