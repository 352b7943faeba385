"""Reads from a checkpoint only what this rank needs: its own experts, and everything that is no expert.

transformers shards experts with DTensor placements, which need E to be a multiple of the ranks and a device mesh over the
whole world. Here the parameters simply *are* smaller: `keep_rows` cuts the still empty model to this rank's experts, and
`own_tensors` hides the others' rows from transformers' own loader, which renames, stacks and casts what is left as always.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from tokenferry.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """The part of an expert parameter that this rank holds.

    Attributes:
        num_experts: E, rows of dimension 0 in the whole parameter.
        rows: this rank's experts.
        num_dims: dimensions of the parameter.
    """

    num_experts: int
    rows: range
    num_dims: int


class OwnRows:
    """A stored tensor of which only `rows` of dimension 0 are ever read. Stands in for a safetensors slice or a tensor."""

    def __init__(self, stored: Any, rows: range) -> None:
        self._stored, self._rows = stored, rows

    def __getitem__(self, index: Any) -> torch.Tensor:
        own: torch.Tensor = self._stored[self._rows.start : self._rows.stop]
        return own[index]

    def get_shape(self) -> list[int]:
        """As `safetensors` spells it."""
        return [len(self._rows), *shape_of(self._stored)[1:]]

    def __getattr__(self, name: str) -> Any:  # dtype, get_dtype, is_floating_point: whatever transformers asks its source for
        return getattr(self._stored, name)


def keep_rows(experts: nn.Module, rows: range) -> dict[str, Shard]:
    """Cuts the parameters of an experts module, still on the meta device, to `rows` of dimension 0.

    Returns:
        The parameters that were cut, by name within the module.
    """
    num_experts = int(experts.num_experts)  # type: ignore[arg-type]
    shards = {}
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if parameter.shape[:1] == (num_experts,):
            shards[name] = Shard(num_experts, rows, parameter.dim())
            # requires_grad stays as it is: torch chooses between mm and bmm by it, whose bits differ
            own = parameter.detach()[rows.start : rows.stop]
            setattr(experts, name, nn.Parameter(own, requires_grad=parameter.requires_grad))
    experts.num_experts = len(rows)  # type: ignore[assignment]
    experts._is_expert_parallel = True  # type: ignore[assignment]  # "skip id num_experts"; transformers before 5.2x always does
    return shards


@contextlib.contextmanager
def open_tensors(checkpoint_files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every tensor of safetensors files as a slice that reads nothing until it is indexed."""
    with contextlib.ExitStack() as files:
        tensors: dict[str, Any] = {}
        for path in checkpoint_files:
            file = files.enter_context(safe_open(path, framework="pt"))
            tensors.update((key, file.get_slice(key)) for key in file.keys())  # noqa: SIM118 - a safetensors file is no mapping
        yield tensors


def own_tensors(
    tensors: Mapping[str, Any], model: Any, weight_mapping: Sequence[Any] | None, shards: Mapping[str, Shard]
) -> dict[str, Any]:
    """`tensors` without the experts of other ranks.

    Checkpoints come in two kinds: one tensor for all experts (its rows are cut), or one tensor an expert, which transformers
    stacks in the natural order of the keys (those of other ranks are left out).

    Args:
        tensors: checkpoint key -> slice or tensor.
        model: the empty model; its state names the parameters.
        weight_mapping: transformers' renamings and converters for this model.
        shards: parameter name -> what this rank holds of it.

    Raises:
        ConfigError: a tensor that belongs to a sharded parameter has neither form.
    """
    mapping = copy.deepcopy(list(weight_mapping or []))  # renaming marks an entry as used; the loader's own pass does that
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names = model.state_dict()
    seen: dict[tuple[str, str | None], int] = {}
    own: dict[str, Any] = {}
    for key in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if target not in names and key in names:
            target, pattern = rename_source_key(key, [], [], model.base_model_prefix, names)
        shard = shards.get(target)
        if shard is None:
            own[key] = tensors[key]
            continue
        shape = shape_of(tensors[key])
        if len(shape) == shard.num_dims - 1:
            number = seen.get((target, pattern), 0)
            seen[target, pattern] = number + 1
            if number % shard.num_experts in shard.rows:  # a list may fill two parameters one after the other (ernie)
                own[key] = tensors[key]
        elif shape[0] == shard.num_experts:
            own[key] = OwnRows(tensors[key], shard.rows)
        else:
            raise ConfigError(
                f"checkpoint tensor {key} has shape {shape}, which holds neither one expert nor all {shard.num_experts} of "
                f"{target}, so that a rank cannot read its own part; save the checkpoint anew with save_pretrained()"
            )
    return own


def shape_of(stored: Any) -> list[int]:
    """The shape of a tensor or of a safetensors slice."""
    return list(stored.shape if isinstance(stored, torch.Tensor) else stored.get_shape())
