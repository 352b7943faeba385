"""Reads from a checkpoint only what this rank needs: its own experts, and everything that is no expert.

transformers shards experts with DTensor placements, which need E to be a multiple of the ranks and a device mesh over the
whole world. Here the parameters simply *are* smaller: `keep_rows` cuts the still empty model to this rank's experts, and
`own_tensors` hides the others' rows from transformers' own loader, which renames, stacks and casts what is left as always.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from tokenferry.errors import ConfigError
from tokenferry.integrations.transformers.checkpoint import unreadable


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

    def row(self, place: int) -> torch.Tensor:
        """[1, ...]: one of the rows, of which alone is read."""
        row: torch.Tensor = self._stored[self._rows[place] : self._rows[place] + 1]
        return row

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
    """Every tensor of safetensors files as a slice that reads nothing until it is indexed.

    Raises:
        ConfigError: a file is no whole safetensors file; the message names it.
    """
    with contextlib.ExitStack() as files:
        tensors: dict[str, Any] = {}
        for path in checkpoint_files:
            try:
                file = files.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise unreadable(path, error) from error
            tensors.update((key, file.get_slice(key)) for key in file.keys())  # noqa: SIM118 - a safetensors file is no mapping
        yield tensors


def own_tensors(
    tensors: Mapping[str, Any],
    model: Any,
    weight_mapping: Sequence[Any] | None,
    shards: Mapping[str, Shard],
    *,
    is_quantized: bool = False,
) -> dict[str, Any]:
    """`tensors` without the experts of other ranks.

    Checkpoints come in two kinds: one tensor for all experts (its rows are cut), or one tensor an expert, which transformers
    stacks in the natural order of the keys (those of other ranks are left out). Every rank looks at all keys, so that what is
    lacking is an error on every rank, also where it would be another rank's to read.

    Args:
        tensors: checkpoint key -> slice or tensor.
        model: the empty model; its state names the parameters.
        weight_mapping: transformers' renamings and converters for this model.
        shards: parameter name -> what this rank holds of it.
        is_quantized: a quantizer renames parameters in ways of its own, so that only experts are looked for.

    Raises:
        ConfigError: a tensor that belongs to a sharded parameter has neither form, or an expert or a parameter is lacking.
    """
    converters = [entry for entry in weight_mapping or () if isinstance(entry, WeightConverter)]
    rename = renamer(model, weight_mapping)
    each_expert: dict[tuple[str, str | None], list[str]] = {}
    found: set[str] = set()
    own: dict[str, Any] = {}
    for key in sorted(tensors, key=dot_natural_key):
        target, pattern = rename(key)
        found.add(target)
        shard = shards.get(target)
        if shard is None:
            own[key] = tensors[key]
            continue
        shape = shape_of(tensors[key])
        if len(shape) == shard.num_dims - 1:
            each_expert.setdefault((target, pattern), []).append(key)
        elif shape[:1] == [shard.num_experts]:
            own[key] = OwnRows(tensors[key], shard.rows)
        else:
            raise ConfigError(
                f"checkpoint tensor {key} has shape {shape}, which holds neither one expert nor all {shard.num_experts} of "
                f"{target}, so that a rank cannot read its own part; save the checkpoint anew with save_pretrained()"
            )
    if not is_quantized:
        _require_parameters(model, found, converters)
    _require_siblings(each_expert, converters)
    for (target, _), keys in each_expert.items():
        own.update((key, tensors[key]) for key in own_keys(keys, shards[target]))
    return own


def renamer(model: Any, weight_mapping: Sequence[Any] | None) -> Callable[[str], tuple[str, str | None]]:
    """A function of a checkpoint's key: which parameter of the (still empty) model it fills, and by which converter's pattern."""
    mapping = copy.deepcopy(list(weight_mapping or []))  # renaming marks an entry as used; the loader's own pass does that
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names = model.state_dict()

    def rename(key: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if target not in names and key in names:
            target, pattern = rename_source_key(key, [], [], model.base_model_prefix, names)
        return target, pattern

    return rename


def _require_parameters(model: Any, found: Collection[str], converters: Sequence[Any]) -> None:
    """Raises ConfigError if a parameter is lacking: transformers would make it up, on each rank another."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    elsewhere = {*tied, *(source for target, source in tied.items() if target in found)}
    not_asked_for = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    # A tensor that is split is found under the first of its parts.
    parts = [part for converter in converters if len(converter.target_patterns) > 1 for part in converter.target_patterns]
    lacking = [
        name
        for name, _ in model.named_parameters()
        if name not in found
        and name not in elsewhere
        and not any(pattern.search(name) for pattern in not_asked_for)
        and not any(part in name for part in parts)
    ]
    if lacking:
        raise ConfigError(
            f"the checkpoint lacks {len(lacking)} of the model's parameters, such as {lacking[0]}; fetch the checkpoint again, "
            "or save it anew from a whole model"
        )


def _require_siblings(each_expert: Mapping[tuple[str, str | None], Sequence[str]], converters: Sequence[Any]) -> None:
    """Raises ConfigError where one of the tensors that make up a parameter is lacking for all experts: up without gate."""
    for (target, pattern), keys in each_expert.items():
        patterns = next((converter.source_patterns for converter in converters if pattern in converter.source_patterns), ())
        for other in patterns:  # scales and the like, which end in another word, need not be there
            if other.rpartition(".")[2] == str(pattern).rpartition(".")[2] and (target, other) not in each_expert:
                raise ConfigError(
                    f"the checkpoint has tensors such as {keys[0]} but none named {other} beside them, of which {target} is made "
                    "too; fetch the checkpoint again, or save it anew from a whole model"
                )


def own_keys(keys: Sequence[str], shard: Shard) -> list[str]:
    """Those of `keys`, one for each expert, that are this rank's. Experts are known by the number in the key.

    Once the keys were counted instead: where expert 1 was lacking, the rank that holds 0 to 2 took expert 3 for expert 2.

    Raises:
        ConfigError: a number is lacking.

    Example:
        "experts.0.w", "experts.1.w", "experts.2.w" of three experts give ["experts.2.w"] for the rows 2 to 2.
    """
    parts = [key.split(".") for key in keys]
    places = [place for place, part in enumerate(parts[0]) if part.isdecimal()]
    if not places or len({len(each) for each in parts}) > 1:
        raise ConfigError(
            f"checkpoint tensors such as {keys[0]} hold one expert each, but their names do not tell which; save the checkpoint "
            "anew with save_pretrained()"
        )
    # The layer's number is the same in all of them: the place that differs most, and if only one key is left, the last place.
    place = max(places, key=lambda place: (len({each[place] for each in parts}), place))
    by_number = {int(each[place]): key for key, each in zip(keys, parts, strict=True)}
    # A list may fill two parameters one after the other (ernie): then it is a multiple of the experts long.
    length = -(-(max(by_number) + 1) // shard.num_experts) * shard.num_experts
    lacking = [number for number in range(length) if number not in by_number]
    if lacking:
        example = ".".join([*parts[0][:place], str(lacking[0]), *parts[0][place + 1 :]])
        raise ConfigError(
            f"the checkpoint lacks {len(lacking)} of {length} experts: there is no tensor {example}; fetch the checkpoint "
            "again, or save it anew from a whole model"
        )
    return [key for number, key in sorted(by_number.items()) if number % shard.num_experts in shard.rows]


def shape_of(stored: Any) -> list[int]:
    """The shape of a tensor or of a safetensors slice."""
    return list(stored.shape if isinstance(stored, torch.Tensor) else stored.get_shape())
