"""What the dispatcher classes have in common: the groups of this process, and the buffers allocated for them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from tokenferry.config import MoEConfig
from tokenferry.errors import ConfigError, StateError
from tokenferry.groups import EPGroup
from tokenferry.integrations.megatron.buffers import ANY_EXPERT, GroupBuffers, RealTokens, Settings, is_capturing, open_workspace
from tokenferry.integrations.megatron.expert_entries import ExpertEntries
from tokenferry.integrations.megatron.process_groups import ranks_of, size_of
from tokenferry.transports.base import Counts
from tokenferry.transports.selection import default_device
from tokenferry.workspace import Workspace

UNBOUNDED_ROWS: Final = 2**31 - 1
"""Capacity of the NCCL class's workspaces: nothing is allocated by it on the collective transport."""


@dataclass(frozen=True)
class CollectiveWorkspace:
    """A workspace of the NCCL class, with the number of real tokens in its rows' frame."""

    workspace: Workspace
    real_tokens: RealTokens


class Registry:
    """The state behind the class attributes. One per process, owned by the base class; a rank is a process.

    Attributes:
        settings: how the next workspaces are opened.
        shown: the buffers that the NVLS class's attributes show now.
        latest: the buffers allocated last, which they show outside a layer.
        scalar: [1] int32, the valid tokens of what has no buffers: NCCL dispatchers and groups of one.
        installed_experts: who serves the expert kernels after `install(experts=True)`, else None.
    """

    def __init__(self) -> None:
        self.settings = Settings()
        self.shown: GroupBuffers | None = None
        self.latest: GroupBuffers | None = None
        self.scalar: torch.Tensor | None = None
        self.installed_experts: ExpertEntries | None = None
        # A process group is a key by identity. An EPGroup is made once for each, since it numbers the names in the group's store.
        self._ep_groups: dict[Any, EPGroup] = {}
        self._buffers: dict[tuple[Any, int, int], GroupBuffers] = {}
        self._collective: dict[tuple[Any, MoEConfig, Counts, Settings], CollectiveWorkspace] = {}

    def ep_group(self, group: Any) -> EPGroup:
        """The `EPGroup` on a process group."""
        if isinstance(group, EPGroup):
            return group
        if group not in self._ep_groups:
            self._ep_groups[group] = EPGroup(group)
        return self._ep_groups[group]

    # --- NVLS -------------------------------------------------------------------------------------------------------

    def allocate(self, group: Any, max_tokens_per_rank: int, topk: int, hidden_size: int) -> GroupBuffers:
        """Buffers for a group and shape: those that are there if they fit exactly, else new ones, collectively."""
        key = (group, hidden_size, topk)
        known = self._buffers.get(key)
        if known is None or known.max_tokens_per_rank != max_tokens_per_rank:
            if known is not None:
                self._forget(known)
                known.close()
            known = GroupBuffers(self.ep_group(group), max_tokens_per_rank, topk, hidden_size, self.settings)
            self._buffers[key] = known
        self.latest = known
        return known

    def _forget(self, buffers: GroupBuffers) -> None:
        self.shown = None if self.shown is buffers else self.shown
        self.latest = None if self.latest is buffers else self.latest

    def find(self, group: Any, topk: int, hidden_size: int | None) -> GroupBuffers | None:
        """The buffers of this group (by identity, else by its ranks) and shape; `hidden_size` None: whichever is the only one."""
        exact = self._buffers.get((group, hidden_size or 0, topk))
        if exact is not None:
            return exact
        fitting = {k: b for k, b in self._buffers.items() if k[2] == topk and hidden_size in (None, k[1])}
        own = [b for (known, _, _), b in fitting.items() if known is group]
        ranks = ranks_of(group)
        candidates = own or [b for b in fitting.values() if ranks is not None and ranks_of(b.group.process_group) == ranks]
        return candidates[0] if len(candidates) == 1 else None

    def require(self, group: Any, topk: int, hidden_size: int | None) -> GroupBuffers:
        """`find`, or an error that says what is allocated.

        Raises:
            StateError: nothing fits.
        """
        buffers = self.find(group, topk, hidden_size)
        if buffers is None:
            there = "; ".join(map(repr, self._buffers.values())) or "nothing"
            raise StateError(
                f"no buffers for hidden size {hidden_size} and top-k {topk} on this dispatcher's pg_collection.ep "
                f"({size_of(group)} ranks); allocated: {there}. Call NVLSAllGatherVDispatcher.allocate_buffers(...) on every rank"
            )
        return buffers

    def delete_buffers(self) -> None:
        """Closes all buffers of the NVLS class."""
        buffers = list(self._buffers.values())
        self._buffers.clear()
        self.shown = self.latest = None
        _close_all(buffers)

    # --- NCCL -------------------------------------------------------------------------------------------------------

    def collective(self, group: Any, hidden_size: int, topk: int, dtype: torch.dtype, counts: Counts) -> CollectiveWorkspace:
        """The NCCL class's workspace for a group, shape and kind of counts, opened when first used, by all ranks together."""
        config = MoEConfig(hidden_size=hidden_size, num_experts=ANY_EXPERT, topk=topk, dtype=dtype)
        key = (group, config, counts, self.settings)
        if key not in self._collective:
            ep_group = self.ep_group(group)
            if is_capturing(ep_group.device):
                raise StateError("the first dispatch opens a connection, which cannot be captured; run one step eagerly first")
            workspace = open_workspace(config, ep_group, "collective", UNBOUNDED_ROWS, self.settings, counts)
            self._collective[key] = CollectiveWorkspace(workspace, RealTokens(ep_group.device))
        return self._collective[key]

    # --- both -------------------------------------------------------------------------------------------------------

    def new_scalar(self, device: torch.device | None = None) -> torch.Tensor:
        """A new `scalar`. Outside a capture, so that its address outlives the graph's memory."""
        device = default_device() if device is None else device
        if is_capturing(device):
            raise StateError("allocate_valid_tokens_tensor() comes before a capture: the address must outlive the graph's memory")
        with torch.inference_mode(False):  # a later step may write to it outside of the mode
            self.scalar = torch.zeros(1, dtype=torch.int32, device=device)
        return self.scalar

    def close(self) -> None:
        """Closes everything of both classes, and lets go of the installed experts' scratch."""
        if self.installed_experts is not None:
            self.installed_experts.free()
        opened = list(self._collective.values())
        self._collective.clear()
        try:
            self.delete_buffers()
        finally:
            _close_all([each.workspace for each in opened])

    def reset(self, timeout_s: float | None) -> None:
        """Starts all of them anew, in the order of their opening, which is that of every rank."""
        self.shown = None  # its tensors become others
        for buffers in self._buffers.values():
            buffers.reset(timeout_s)
        for each in self._collective.values():
            each.workspace.reset(timeout_s=timeout_s)

    def workspaces(self) -> list[Workspace]:
        """All that are open."""
        owned = [buffers.workspace for buffers in self._buffers.values() if buffers.workspace is not None]
        return [*owned, *(each.workspace for each in self._collective.values())]

    def configure(self, settings: Settings) -> None:
        """Takes new settings for what is opened from now on.

        Raises:
            ConfigError: a combine dtype that the wire has not, an order of sums or a dtype of results that there is not, a bound
                of the experts' scratch that is not positive.
        """
        if settings.combine_output not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"combine_output must be torch.float32 or torch.bfloat16, got {settings.combine_output!r}")
        if settings.combine_dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(
                f"combine_dtype must be torch.float32 or torch.bfloat16, got {settings.combine_dtype!r}; Megatron's experts "
                "write rows without scales into the RSV buffer, and torch.bfloat16 halves their bytes"
            )
        if settings.combine_order not in ("rank", "any"):
            raise ConfigError(f"combine_order must be 'rank' or 'any', got {settings.combine_order!r}")
        num_bytes = settings.expert_scratch_bytes
        if num_bytes is not None and (not isinstance(num_bytes, int) or isinstance(num_bytes, bool) or num_bytes < 1):
            raise ConfigError(f"expert_scratch_bytes must be None or at least 1, got {num_bytes!r}")
        self.settings = settings


def _close_all(opened: Sequence[GroupBuffers | Workspace]) -> None:
    """Closes all of them, also if closing one raises; that is raised then."""
    with contextlib.ExitStack() as stack:
        for each in opened:
            stack.callback(each.close)
