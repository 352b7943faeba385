"""A model's forward whose decoder layers are compiled one by one, by one piece of code for all of them.

Compiling a whole forward takes time in proportion to its depth. Where all layers are alike they share their code here, so that a
model of any depth takes the time of one. The model's other modules are compiled by themselves, and the rest runs as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, Final, Protocol

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import StaticCache

from tokenferry.integrations.transformers.cache_state import is_plain
from tokenferry.integrations.transformers.layer import ExpertLayer

_TOO_LATE: Final = (
    "a part of {} could not be compiled after its first layer had run; generate() with disable_compile=True goes without"
)


class CallsInTurn(Protocol):
    """A model's `ExpertParallel`."""

    calls_in_turn: bool


class OneLayersCache:
    """What attention asks of a static cache, of one layer: code that read a layer's number would be of that layer alone."""

    is_compileable = True

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def update(self, keys: torch.Tensor, values: torch.Tensor, _number: int, *args: Any, **kwargs: Any) -> Any:
        """As that of the layer."""
        return self._layer.update(keys, values, *args, **kwargs)

    def get_seq_length(self, _number: int = 0) -> Any:
        """As that of the layer."""
        return self._layer.get_seq_length()


class CompiledByLayers:
    """A model's forward. Each batch size has code of its own, as in `CompiledBySize`.

    Args:
        layers: the model's decoder layers, as `layers_alike` finds them.
        host: within compiled layers it calls its MoE layers in turn, not by number.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module], host: CallsInTurn) -> None:
        self._model, self._layers, self._host = model, layers, host
        self._others = [each for each in model.base_model.children() if not isinstance(each, nn.ModuleList | nn.Embedding)]
        self._compiled: dict[str, Callable[..., Any]] = {}

    def __call__(self, **inputs: Any) -> Any:
        size, caches = inputs["input_ids"].shape[0], inputs["past_key_values"].layers
        has_run: list[nn.Module] = []
        forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        for module, cache in zip(self._layers, caches, strict=True):
            code = self._code(f"decode_layer_{size}")
            forwards.append((module, functools.partial(_run_layer, code, module, OneLayersCache(cache), has_run)))
        for number, module in enumerate(self._others):
            forwards.append((module, functools.partial(self._code(f"decode_module_{number}_{size}"), module)))
        self._host.calls_in_turn = True
        try:
            with _in_their_place(forwards):
                return self._model(**inputs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            if has_run:  # the cache holds this token by now, so that no other way can be taken
                raise RuntimeError(_TOO_LATE.format(type(self._model).__name__)) from error
            raise
        finally:
            self._host.calls_in_turn = False

    def _code(self, name: str) -> Callable[..., Any]:
        if name not in self._compiled:
            self._compiled[name] = torch.compile(_named(name), fullgraph=True)
        return self._compiled[name]


def layers_alike(model: Any, moe_layers: Sequence[ExpertLayer]) -> Sequence[nn.Module] | None:
    """The decoder layers of a model, each with one MoE layer, if they can share compiled code. None: they cannot."""
    if not is_plain(StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=1)):
        return None  # windows: layers of two kinds, and numbers that the host counts
    children = list(model.base_model.children())
    if any("forward" in vars(module) for child in children for module in (child, *child.children())):
        return None  # what somebody has put around a module's own forward, as accelerate does; shared code would pass it by
    experts = {id(layer.module) for layer in moe_layers}
    for found in children:
        if isinstance(found, nn.ModuleList) and len(found) == len(experts):
            kinds = {tuple(type(module) for module in layer.modules()) for layer in found}
            counts = {sum(id(module) in experts for module in layer.modules()) for layer in found}
            if len(kinds) == 1 and counts == {1}:
                return list(found)
    return None


def _run_layer(
    code: Callable[..., Any], module: nn.Module, cache: OneLayersCache, has_run: list[nn.Module], *args: Any, **kwargs: Any
) -> Any:
    if kwargs.get("past_key_values") is not None:
        kwargs["past_key_values"] = cache
    result = code(module, *args, **kwargs)
    has_run.append(module)
    return result


@contextlib.contextmanager
def _in_their_place(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within it the modules have these forwards."""
    own = [vars(module).get("forward") for module, _ in forwards]
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for (module, _), before in zip(forwards, own, strict=True):
            if before is None:
                del module.forward
            else:
                module.forward = before


def _named(name: str) -> Callable[..., Any]:
    """A function of this name that runs a module's forward; see `compiled_forwards`."""

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs)

    return FunctionType(forward.__code__.replace(co_name=name), forward.__globals__, name, None, forward.__closure__)
