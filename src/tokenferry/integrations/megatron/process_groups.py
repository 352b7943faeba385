"""Sizes and ranks of whatever stands for a process group: torch's own, an `EPGroup`, or None for a group of one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

import torch.distributed as dist

from tokenferry.errors import ConfigError
from tokenferry.groups import EPGroup

NAMES: Final = ("ep", "expt_tp", "tp", "tp_ep")
"""The groups that a collection may have."""


def group_of(collection: Any, name: str) -> Any:
    """The group `name` of a collection, or None: Megatron's collection has no attribute for what was not set."""
    return getattr(collection, name, None)


def size_of(group: Any) -> int:
    """How many ranks."""
    if group is None:
        return 1
    return group.size if isinstance(group, EPGroup) else dist.get_world_size(group)


def rank_of(group: Any) -> int:
    """This rank's number in it.

    Raises:
        ConfigError: this process is not a member.
    """
    if group is None:
        return 0
    rank = group.rank if isinstance(group, EPGroup) else dist.get_rank(group)
    if rank < 0:
        raise ConfigError("this process is not a member of the process group that it was given")
    return rank


def ranks_of(group: Any) -> tuple[int, ...] | None:
    """The members' global ranks, by which two groups of the same ranks are known; None where there are no global ranks."""
    return None if group is None or isinstance(group, EPGroup) else tuple(dist.get_process_group_ranks(group))


def torch_groups_only(collection: Any) -> SimpleNamespace:
    """The collection as Megatron's own base class reads it: every name is there, and an `EPGroup` is none of its business."""
    groups = {name: group_of(collection, name) for name in NAMES}
    return SimpleNamespace(**{name: None if isinstance(group, EPGroup) else group for name, group in groups.items()})
