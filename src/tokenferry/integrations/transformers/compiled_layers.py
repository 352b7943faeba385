"""A model's forward with its decoder layers compiled one by one: a layer like another one is not compiled again.

A whole forward of 48 layers is compiled 48 times as long as one layer. What would keep the layers' code apart is their number, by
which each finds its part of the cache; here each is handed its part alone, and the compiler takes the number for any number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

_KNOWN: Final = (StaticLayer, StaticSlidingWindowLayer)


class CompiledLayers:
    """A model's forward. What is outside of its decoder layers runs as it is, and so does a layer that does not compile.

    Attributes:
        failure: of the compiler, if there was one.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._calls = [self._call_of(layer) for layer in self._layers]
        self.failure: Exception | None = None

    @property
    def has_layers(self) -> bool:
        """Whether the model has decoder layers that transformers marks as such."""
        return bool(self._layers)

    def __call__(self, **inputs: Any) -> Any:
        with self._compiled(), torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
            return self._model(**inputs)

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        before = [layer._compiled_call_impl for layer in self._layers]
        for layer, call in zip(self._layers, self._calls, strict=True):
            layer._compiled_call_impl = call
        try:
            yield
        finally:
            for layer, earlier in zip(self._layers, before, strict=True):
                layer._compiled_call_impl = earlier

    def _call_of(self, layer: Any) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(layer._call_impl, fullgraph=True)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.failure is None:
                try:
                    return compiled(*args, **_with_own_part(layer, kwargs))
                except TorchDynamoException as error:  # nothing of the layer has run
                    self.failure = error
            return layer._call_impl(*args, **kwargs)

        return call


class _Part(Cache):
    """One layer of a cache, by whatever number it is asked for."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layers=[layer])
        self._layer = layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As `Cache.update`."""
        return self._layer.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """As `Cache.get_seq_length`."""
        return self._layer.get_seq_length()


def _with_own_part(layer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    cache, number = kwargs.get("past_key_values"), _number_of(layer)
    if type(cache) is not StaticCache or number is None or type(cache.layers[number]) not in _KNOWN:
        return kwargs
    return {**kwargs, "past_key_values": _Part(cache.layers[number])}


def _number_of(layer: Any) -> int | None:
    """By which its attention asks the cache."""
    number = getattr(getattr(layer, "self_attn", None), "layer_idx", None)
    return number if isinstance(number, int) else None
