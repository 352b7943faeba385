"""What the host keeps of a static cache: whether a recorded forward still fits it, and what each replay has to count up.

A replay changes what lies on the device and nothing else. Of most layers of a `StaticCache` that is all there is. Layers with a
sliding window count their tokens on the host as well, and do other work once the window is full: a graph is of one of the two
phases. What is not known is seen by comparing the layers before and after the recording, and is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
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

_Place = tuple[int, str | None]
"""A layer's number; None: the dictionary of its attributes, else one that is the attribute of this name."""


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
        self._held: list[tuple[str, _Place, dict[Any, Any], dict[Any, Any]]] = []
        """The layer's kind, where a dictionary of it is, that dictionary, and a copy of it."""
        for number, layer in enumerate(cache.layers):
            kind, attributes = type(layer).__name__, vars(layer)
            inner = [name for name, value in attributes.items() if type(value) is dict]
            for place in ((number, None), *((number, name) for name in inner)):
                holder = _dictionary_at(cache, place)
                for name, value in holder.items():
                    if not isinstance(value, _PLAIN) and (holder is not attributes or type(value) is not dict):
                        raise NotRecordable(f"`{name}` of a {kind} of its cache is a {type(value).__name__}")
                self._held.append((kind, place, holder, dict(holder)))

    def restore(self) -> None:
        """Undoes what a recording that failed has changed. What lies on the device has not changed."""
        for _, _, holder, values in self._held:
            holder.clear()
            holder.update(values)

    def replays(self, after: HostState) -> ReplayedState:
        """What replays of the forward between the two moments have to look at.

        Raises:
            NotRecordable: the forward changes something on the host that a replay would not change.
        """
        counters, fixed = [], []
        for (kind, place, holder, before), (_, _, other, now) in zip(self._held, after._held, strict=True):
            for name in before.keys() | now.keys():
                old, new = before.get(name), now.get(name)
                if name == COUNTER and isinstance(old, int) and new == old + 1:
                    counters.append(place)
                elif holder is other and (old is new if isinstance(new, _BY_IDENTITY) else old == new):
                    fixed.append((place, name, new))
                else:
                    raise NotRecordable(f"each forward changes `{name}` of a {kind} of its cache, on the host")
        return ReplayedState(counters, fixed)


class ReplayedState:
    """What a recorded forward relies on in its cache. It keeps neither the cache nor its tensors alive."""

    def __init__(self, counters: list[_Place], fixed: list[tuple[_Place, Hashable, Any]]) -> None:
        self._counters = counters
        self._tensors = [(place, name, weakref.ref(value)) for place, name, value in fixed if isinstance(value, torch.Tensor)]
        self._values = [each for each in fixed if not isinstance(each[2], _BY_IDENTITY)]

    def holds(self, cache: StaticCache) -> bool:
        """Whether the cache, which was recorded, still has the tensors that were: reordering one for beams, say, puts others in
        their place."""
        try:
            return all(
                (known := tensor()) is not None and _dictionary_at(cache, place).get(name) is known
                for place, name, tensor in self._tensors
            ) and all(_dictionary_at(cache, place).get(name) == value for place, name, value in self._values)
        except (IndexError, KeyError):  # it has lost a layer, or a layer a dictionary
            return False

    def advance(self, cache: StaticCache) -> None:
        """Counts what one replay has added."""
        for place in self._counters:
            _dictionary_at(cache, place)[COUNTER] += 1


def _dictionary_at(cache: StaticCache, place: _Place) -> dict[Any, Any]:
    number, name = place
    attributes = vars(cache.layers[number])
    found: dict[Any, Any] = attributes if name is None else attributes[name]
    return found
