"""What recorded forwards of a model rely on beside their inputs: its modules, and where its numbers lie."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch

from tokenferry.integrations.transformers.kernel_experts import implementation_of
from tokenferry.integrations.transformers.layer import ExpertLayer


def model_facts(model: Any) -> Hashable:
    """Equal for two calls between which nothing was changed that a replay would miss: an adapter, another tensor in the place of
    a weight, a hook, another implementation of attention or experts. What is written into weights is not part of it, for
    replays follow that."""
    config = model.config
    return (
        tuple(_facts_of(module) for module in model.modules()),
        getattr(config, "_attn_implementation", None),
        getattr(config, "_experts_implementation", None),
    )


def experts_facts(layers: Iterable[ExpertLayer]) -> Hashable:
    """The same of the MoE layers' experts, all that a step without tokens computes with. Takes some microseconds a layer."""
    return tuple((is_served(layer), implementation_of(layer.module), _places_of(layer.module)) for layer in layers)


def is_served(layer: ExpertLayer) -> bool:
    """Whether our own kernels run the layer's experts."""
    return layer.kernels is not None and layer.kernels.holds


def _places_of(module: torch.nn.Module | None) -> Hashable:
    return () if module is None else tuple((id(each), each.data_ptr()) for each in module.parameters())


def _facts_of(module: torch.nn.Module) -> Hashable:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return (
        id(module),
        module.training,
        id(vars(module).get("forward")),
        len(module._forward_hooks),
        len(module._forward_pre_hooks),
        tuple(tensor.data_ptr() for tensor in tensors if tensor is not None),
    )
