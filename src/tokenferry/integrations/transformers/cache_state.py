"""What the host keeps of a static cache: whether a recorded forward still fits it, and what each replay has to count up.

A replay changes what lies on the device and nothing else. Of most layers of a `StaticCache` that is all there is. Layers with a
sliding window count their tokens on the host as well, and do other work once the window is full: a graph is of one of the two
phases. What is not known is seen by comparing the layers before and after the recording, and is refused.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

COUNTER: Final = "cumulative_length_int"
"""Where layers with a sliding window count tokens on the host."""

_PLAIN: Final = (torch.Tensor, bool, int, float, str, torch.dtype, torch.device, type(None))
_BY_IDENTITY: Final = (torch.Tensor, dict)

Phase = tuple[bool, ...]
"""For each layer with a sliding window: whether it is full."""


class NotRecordable(Exception):
    """Why a forward cannot be recorded, or replayed."""


def check_kind(cache: Any) -> StaticCache:
    """The cache, if forwards on it can be recorded.

    Raises:
        NotRecordable: with the reason.
    """
    if type(cache) is not StaticCache:
        raise NotRecordable(f"its cache is a {type(cache).__name__}, which grows or moves, and not a StaticCache")
    if cache.offloading:
        raise NotRecordable("its cache is offloaded to the host")
    return cache


def is_plain(cache: Any) -> bool:
    """Whether all that its layers know of their length lies on the device, so that a recorded forward can make its own mask."""
    return type(cache) is StaticCache and all(type(layer) is StaticLayer for layer in cache.layers)


def phase_of(cache: StaticCache) -> Phase:
    """See `Phase`."""
    layers: list[Any] = cache.layers
    return tuple(layer.cumulative_length_int >= layer.max_cache_len for layer in layers if hasattr(layer, COUNTER))


class HostState:
    """All that the host keeps of a cache's layers, at one moment.

    Raises:
        NotRecordable: they keep something whose changes would not be seen.
    """

    def __init__(self, cache: StaticCache) -> None:
        self._held: list[tuple[str, dict[Any, Any], dict[Any, Any]]] = []
        """The layer's kind, a dictionary of it (of its attributes, or one that is an attribute), and a copy of that."""
        for layer in cache.layers:
            kind, attributes = type(layer).__name__, vars(layer)
            for holder in (attributes, *(value for value in attributes.values() if type(value) is dict)):
                for name, value in holder.items():
                    if not isinstance(value, _PLAIN) and (holder is not attributes or type(value) is not dict):
                        raise NotRecordable(f"`{name}` of a {kind} of its cache is a {type(value).__name__}")
                self._held.append((kind, holder, dict(holder)))

    def restore(self) -> None:
        """Undoes what a recording that failed has changed. What lies on the device has not changed."""
        for _, holder, values in self._held:
            holder.clear()
            holder.update(values)

    def replays(self, after: HostState) -> ReplayedState:
        """What replays of the forward between the two moments have to look at.

        Raises:
            NotRecordable: the forward changes something on the host that a replay would not change.
        """
        counters, fixed = [], []
        for (kind, holder, before), (_, other, now) in zip(self._held, after._held, strict=True):
            for name in before.keys() | now.keys():
                old, new = before.get(name), now.get(name)
                if name == COUNTER and isinstance(old, int) and new == old + 1:
                    counters.append(holder)
                elif holder is other and (old is new if isinstance(new, _BY_IDENTITY) else old == new):
                    fixed.append((holder, name, new))
                else:
                    raise NotRecordable(f"each forward changes `{name}` of a {kind} of its cache, on the host")
        return ReplayedState(counters, fixed)


class ReplayedState:
    """What a recorded forward relies on in its cache."""

    def __init__(self, counters: list[dict[Any, Any]], fixed: list[tuple[dict[Any, Any], Any, Any]]) -> None:
        self._counters = counters
        self._objects = [each for each in fixed if isinstance(each[2], _BY_IDENTITY)]
        self._values = [each for each in fixed if not isinstance(each[2], _BY_IDENTITY)]

    def holds(self) -> bool:
        """Whether the cache still has the tensors that were recorded: reordering one for beams, say, puts others in their
        place."""
        return all(holder.get(name) is value for holder, name, value in self._objects) and all(
            holder.get(name) == value for holder, name, value in self._values
        )

    def advance(self) -> None:
        """Counts what one replay has added."""
        for holder in self._counters:
            holder[COUNTER] += 1
