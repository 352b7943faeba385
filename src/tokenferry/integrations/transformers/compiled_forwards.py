"""A model's forward, compiled for decode steps that are recorded.

Each batch size has code of its own, in which the size is a number. In code for any size, which the compiler makes once it meets a
second one, the kernels are slower. The length of the cache may become an input.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch


class CompiledBySize:
    """A model's forward."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._by_size: dict[int, Callable[..., Any]] = {}

    def __call__(self, **inputs: Any) -> Any:
        size = inputs["input_ids"].shape[0]
        if size not in self._by_size:
            self._by_size[size] = torch.compile(_renamed(self._model, f"decode_{size}"), fullgraph=True)
        return self._by_size[size](**inputs)


def _renamed(model: Any, name: str) -> Callable[..., Any]:
    """A function of this name that calls the model. The compiler knows a function by its code, and what it has seen of sizes by
    the name and the place of the code."""

    def forward(**inputs: Any) -> Any:
        return model(**inputs)

    return FunctionType(forward.__code__.replace(co_name=name), forward.__globals__, name, None, forward.__closure__)
