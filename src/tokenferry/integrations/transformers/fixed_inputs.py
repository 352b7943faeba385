"""The arguments of a recorded forward: its tensors are read at fixed addresses, and all else is part of the recording."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from transformers import Cache

from tokenferry.integrations.transformers.cache_state import NotRecordable


def shape_key(inputs: Mapping[str, Any]) -> Hashable:
    """What two calls of a forward must have in common to share a recording, the cache apart.

    Raises:
        NotRecordable: an argument is of a kind that is not known to stay the same.
    """
    return tuple((name, _shape_of(name, value)) for name, value in inputs.items())


def _shape_of(name: str, value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((key, _shape_of(f"{name}[{key!r}]", inner)) for key, inner in value.items())
    if isinstance(value, Cache):
        return "cache"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise NotRecordable(f"its argument {name} is a {type(value).__name__}")


class FixedInputs:
    """Tensors for one `shape_key`, and the arguments with these in the place of the caller's.

    Args:
        inputs: arguments of such a call. Their tensors are copied, the cache is left out.
    """

    def __init__(self, inputs: Mapping[str, Any], device: torch.device) -> None:
        with torch.inference_mode(False):  # later calls may write to them outside of the mode
            self._arguments = {name: _copied(value, device) for name, value in inputs.items() if not isinstance(value, Cache)}
        self._buffers = list(_tensors(self._arguments))

    def fill(self, inputs: Mapping[str, Any]) -> None:
        """Copies the tensors of a call of the same `shape_key`, in the order of the current stream."""
        for buffer, given in zip(self._buffers, _tensors(inputs), strict=True):
            buffer.copy_(given, non_blocking=True)

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """`inputs` with the fixed tensors, and its own cache."""
        return {name: self._arguments.get(name, value) for name, value in inputs.items()}


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=device).copy_(value)
    if isinstance(value, Mapping):
        return {key: _copied(inner, device) for key, inner in value.items()}
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
