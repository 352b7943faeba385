"""Reads packed experts of a checkpoint, this rank's rows of them, in the place of a module's matrices.

This comes between the empty model and transformers' own loading, from which the packed tensors are hidden: no matrix of bfloat16
is ever made.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from tokenferry.activations import Activation
from tokenferry.errors import ConfigError, UsageError
from tokenferry.experts import ExpertWeights
from tokenferry.experts.mxfp4 import GROUP
from tokenferry.integrations.transformers.kernel_experts import NotServed, implementation_of, known_activation, parameter_names
from tokenferry.integrations.transformers.layer import LOCAL_EXPERTS, ExpertLayer
from tokenferry.integrations.transformers.loading import OwnRows, Shard, renamer, shape_of
from tokenferry.integrations.transformers.packed_experts import UNPACK, PackedExperts, why_unpacked

_log = logging.getLogger(__name__)

_KINDS: Final = ("blocks", "scales")
_PRODUCTS: Final = ("up", "down")
_ROLES: Final = ("up_proj", "up_scale", "down_proj", "down_scale")
"""Attributes of `ExpertWeights`."""
_BUFFERS: Final[Mapping[str, str]] = {"proj": "{}_packed", "scale": "{}_packed_scales"}
"""What a module's buffers are called, by the name of the parameter in whose place they are."""
_UNPACKED: Final = (
    "%d of %d MoE layers have packed experts that are unpacked while loading, to four times the memory in bfloat16: %s"
)

Keys = Mapping[str, Mapping[str, str]]
"""Parameter name -> "blocks" and "scales" -> key in the checkpoint."""


def take_packed(
    model: Any,
    layers: Sequence[ExpertLayer],
    shards: Mapping[str, Shard],
    tensors: Mapping[str, Any],
    weight_mapping: Sequence[Any] | None,
    *,
    owns_kernels: bool,
    device: torch.device,
) -> tuple[dict[str, Any], list[LayerPacker]]:
    """Reads the packed experts of `layers`, whose matrices then are no more. Where they cannot stay packed, the log says why.

    Args:
        model: the empty model.
        layers: its layers, cut to this rank's experts.
        shards: see `own_tensors`.
        tensors: checkpoint key -> slice or tensor.
        weight_mapping: transformers' renamings and converters for this model.
        owns_kernels: see `Options.own_kernels`.
        device: where the model goes.

    Returns:
        The tensors that are left for transformers to load; and what is to be `put` into the layers when it has loaded them.

    Raises:
        ConfigError: tensors that are lacking, or have other shapes than the configuration says, on every rank.
    """
    keys = _find(tensors, model, weight_mapping, shards)
    names = {module: name for name, module in model.named_modules()}
    packers, refused = [], Counter[str]()
    for layer in layers:
        name = names[layer.module]
        if not any(target.startswith(f"{name}.") for target in keys):
            continue
        try:
            packer = LayerPacker(layer, name, owns_kernels, device)
        except NotServed as error:
            refused[str(error)] += 1
        else:
            packer.check(tensors, keys)
            packers.append(packer)
    for reason, count in refused.items():
        _log.warning(_UNPACKED, count, len(layers), reason)
    taken: set[str] = set()
    for packer in packers:
        taken |= packer.take(tensors, keys)
    return {key: tensor for key, tensor in tensors.items() if key not in taken}, packers


def _find(tensors: Mapping[str, Any], model: Any, weight_mapping: Sequence[Any] | None, shards: Mapping[str, Shard]) -> Keys:
    """Which tensors are packed experts. Raises ConfigError where blocks have no scales, or scales no blocks."""
    rename = renamer(model, weight_mapping)
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        kind = key.rpartition("_")[2]
        target = rename(key)[0] if kind in _KINDS else ""
        if target in shards:
            found.setdefault(target, {})[kind] = key
    for target, keys in found.items():
        for kind, other in zip(_KINDS, reversed(_KINDS), strict=True):
            if kind not in keys:
                raise ConfigError(
                    f"the checkpoint has {keys[other]} but no {keys[other].removesuffix(other)}{kind} beside it, of which "
                    f"{target} is made too; fetch the checkpoint again"
                )
    return found


class LayerPacker:
    """The packed experts of one layer.

    Args:
        layer: whose module is still empty.
        name: of that module in the model.
        owns_kernels, device: see `take_packed`.

    Raises:
        NotServed: why they cannot stay packed.
    """

    def __init__(self, layer: ExpertLayer, name: str, owns_kernels: bool, device: torch.device) -> None:
        module: Any = layer.module
        reason = why_unpacked(module, owns_kernels and implementation_of(module) in (LOCAL_EXPERTS, "grouped_mm"), device)
        if reason is not None:
            raise NotServed(reason)
        self._layer, self._module, self._device = layer, module, device
        self._roles = parameter_names(module)
        self._activation: Activation = known_activation(module)
        self._targets = {product: f"{name}.{self._roles[product]}" for product in _PRODUCTS}
        self._whole: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        for product in _PRODUCTS:
            _, rows, columns = getattr(module, self._roles[product]).shape
            self._shapes[product] = (columns, rows) if module.is_transposed else (rows, columns)

    def check(self, tensors: Mapping[str, Any], keys: Keys) -> None:
        """Raises ConfigError where a tensor of any rank's experts is lacking or has not the shape that this layer needs."""
        for product, target in self._targets.items():
            if target not in keys:
                raise ConfigError(f"the checkpoint has no {target}_blocks; fetch the checkpoint again")
            rows, columns = self._shapes[product]
            if columns % GROUP:
                raise ConfigError(f"{target} cannot be packed: its {columns} columns are no multiple of {GROUP}; {UNPACK}")
            groups = [self._layer.num_experts, rows, columns // GROUP]
            for kind, wanted in (("blocks", [*groups, GROUP // 2]), ("scales", groups)):
                key = keys[target][kind]
                if shape_of(tensors[key]) != wanted:
                    raise ConfigError(
                        f"checkpoint tensor {key} has shape {shape_of(tensors[key])}, but {wanted} is needed for "
                        f"{self._layer.num_experts} experts of {rows} rows and {columns} columns; fetch the checkpoint again"
                    )

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Any], keys: Keys) -> set[str]:
        """Reads and packs this rank's experts, and removes the matrices that they stand for.

        One expert after the other, so that one alone lies in memory a second time, or as integers on its way.

        Returns:
            The keys of the checkpoint that are done with.

        Raises:
            ConfigError: an expert that packed weights cannot hold.
        """
        used = [keys[self._targets[product]][kind] for product in _PRODUCTS for kind in _KINDS]
        owned = self._layer.experts.owned
        stored = [OwnRows(tensors[key], owned) for key in used]
        for place, number in enumerate(owned):
            try:
                up, up_scale, down, down_scale = (part.row(place).to(self._device) for part in stored)
                one = ExpertWeights.from_mxfp4(up, up_scale, down, down_scale, self._activation)
            except UsageError as error:
                where = self._targets["up"].rpartition(".")[0]
                raise ConfigError(f"expert {number} of {where} cannot stay packed: {error}. Or {UNPACK}") from error
            for role in _ROLES:
                part = getattr(one, role)
                if role not in self._whole:
                    self._whole[role] = torch.empty((len(owned), *part.shape[1:]), dtype=part.dtype, device=self._device)
                self._whole[role][place] = part[0]
        for product in _PRODUCTS:
            delattr(self._module, self._roles[product])
            del self._layer.shards[self._roles[product]]
        self._module._is_hf_initialized = True  # or transformers would make random numbers for matrices that are not there
        return set(used)

    def put(self) -> None:
        """Gives the packed matrices to the module, as buffers. Not before transformers has loaded the rest: it takes buffers that
        it did not load for lacking, and puts empty memory in their place."""
        names = {f"{product}_bias": self._roles[f"{product}_bias"] for product in _PRODUCTS if f"{product}_bias" in self._roles}
        for role in _ROLES:
            product, _, kind = role.partition("_")
            names[role] = _BUFFERS[kind].format(self._roles[product])
            self._module.register_buffer(names[role], self._whole.pop(role))
        sizes = self._shapes["up"][1], self._shapes["down"][1]
        self._layer.packed = PackedExperts(sizes, self._activation, names)
