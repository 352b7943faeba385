"""The buffers of `NVLSAllGatherVDispatcher` for one group and one shape: [G, *] rows at fixed addresses on every transport.

Legend: T rows of this rank, V rows of all ranks, W the most rows a rank may bring, G = W times the ranks, H hidden, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from tokenferry.config import MoEConfig
from tokenferry.dispatcher import Dispatcher
from tokenferry.errors import ConfigError, ShapeError, StateError
from tokenferry.groups import EPGroup
from tokenferry.transports.base import CombineOrder, Counts
from tokenferry.workspace import Workspace

ANY_EXPERT: Final = 2**31 - 1
"""Number of experts that a workspace is told: Megatron's allocators do not know it, and it moves rows only."""

STATIC_TRANSPORTS: Final = ("nvls", "p2p")
"""Transports whose gathered tensors have G rows at fixed addresses."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How workspaces are opened; see `Workspace`. `transport` is for the NVLS class, the NCCL class is always "collective".

    `combine_dtype` is that of the RSV buffer and of partial rows on the wire. bfloat16 halves the bytes; sums are float32 anyway.
    `combine_order` "any" gives the sums the library's or the switch's own order, as Megatron's classes do.
    `combine_output` is that of `token_combine`'s result. float32 leaves the sums unrounded: they are rounded to bfloat16 in
    `combine_postprocess`, after the shared experts' output is added there. megatron-core 0.19 and 0.20 round in `token_combine`.
    `expert_scratch_bytes` bounds the memory of the experts of `install(experts=True)`; None: what one chunk of all rows needs.
    """

    transport: str = "auto"
    combine_dtype: torch.dtype = torch.float32
    combine_order: CombineOrder = "rank"
    timeout_s: float = 30.0
    open_timeout_s: float = 300.0
    max_ctas: int | None = None
    combine_output: torch.dtype = torch.bfloat16
    expert_scratch_bytes: int | None = None


@dataclass(frozen=True)
class GatheredRows:
    """All ranks' rows. Expert numbers are -1 beyond the valid ones."""

    hidden_GH: torch.Tensor
    routing_GK: torch.Tensor
    probs_GK: torch.Tensor


class Rows(Protocol):
    """Where gathered and partial rows lie: `gathered` and `rsv_GH` at fixed addresses."""

    gathered: GatheredRows
    rsv_GH: torch.Tensor

    def dispatch(self, layer: Dispatcher, hidden: torch.Tensor, routing: torch.Tensor, probs: torch.Tensor) -> GatheredRows:
        """Every rank's rows."""

    def combine(self, layer: Dispatcher, partial_GH: torch.Tensor) -> torch.Tensor:
        """This rank's sums [T, H]."""


class StaticRows:
    """Rows on a symmetric transport: the workspace's own buffers have this layout. Opened by a round trip without tokens."""

    def __init__(self, workspace: Workspace) -> None:
        config, device = workspace.config, workspace.device
        layer = workspace.dispatcher()
        got = layer.dispatch(
            torch.empty((0, config.hidden_size), dtype=config.dtype, device=device),
            torch.empty((0, config.topk), dtype=torch.int64, device=device),
            torch.empty((0, config.topk), dtype=torch.float32, device=device),
        )
        self.rsv_GH = layer.combine_input()
        layer.combine(self.rsv_GH, got)
        self.gathered = GatheredRows(got.hidden, got.topk_idx, got.topk_weights)

    def dispatch(self, layer: Dispatcher, hidden: torch.Tensor, routing: torch.Tensor, probs: torch.Tensor) -> GatheredRows:
        got = layer.dispatch(hidden, routing, probs)
        return GatheredRows(got.hidden, got.topk_idx, got.topk_weights)

    def combine(self, layer: Dispatcher, partial_GH: torch.Tensor) -> torch.Tensor:
        return layer.combine(partial_GH)


class PaddedRows:
    """Rows on the collective transport, which gathers V of them: they are copied to the head of buffers with G rows."""

    def __init__(self, workspace: Workspace) -> None:
        config, device = workspace.config, workspace.device
        G, H, K = workspace.max_tokens_per_rank * workspace.group.size, config.hidden_size, config.topk
        with torch.inference_mode(False):  # a later step may write to them outside of the mode
            self.gathered = GatheredRows(
                torch.zeros((G, H), dtype=config.dtype, device=device),
                torch.full((G, K), -1, dtype=torch.int64, device=device),
                torch.zeros((G, K), dtype=torch.float32, device=device),
            )
            self.rsv_GH = torch.zeros((G, H), dtype=workspace.combine_dtype, device=device)
        workspace.count_in(self.gathered.hidden_GH, self.gathered.routing_GK, self.gathered.probs_GK, self.rsv_GH)
        self._num_valid = 0

    def dispatch(self, layer: Dispatcher, hidden: torch.Tensor, routing: torch.Tensor, probs: torch.Tensor) -> GatheredRows:
        got = layer.dispatch(hidden, routing, probs)
        before, self._num_valid = self._num_valid, got.hidden.shape[0]
        self.gathered.hidden_GH[: self._num_valid].copy_(got.hidden)
        self.gathered.probs_GK[: self._num_valid].copy_(got.topk_weights)
        self.gathered.routing_GK[: self._num_valid].copy_(got.topk_idx)
        self.gathered.routing_GK[self._num_valid : before] = -1
        return self.gathered

    def combine(self, layer: Dispatcher, partial_GH: torch.Tensor) -> torch.Tensor:
        return layer.combine(partial_GH[: self._num_valid])


class RealTokens:
    """How many of this rank's rows carry tokens, at an address that stays for a step and its graph."""

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # a later step may write to it outside of the mode
            self._count = torch.zeros(1, dtype=torch.int32, device=device)

    def after(self, first_row: int, real_token_count: torch.Tensor | None) -> torch.Tensor | None:
        """`real_token_count` less the rows before `first_row`, the first of this rank; below 1 means that no row is real."""
        if real_token_count is None or first_row == 0:
            return real_token_count
        return torch.sub(real_token_count, first_row, out=self._count)


class GroupBuffers:
    """What `allocate_buffers` makes. A group of one gets the step's scalars alone: its rows never leave their tensors.

    Attributes:
        group, max_tokens_per_rank, topk, hidden_size: what it was made for.
        workspace: None for a group of one.
        step_metadata: [3] int32: V, this rank's row offset, the largest T.
        valid_tokens: [1] int32, V: the head of `step_metadata`.
        tokens_per_rank: [EP] int32.
        rows: the row buffers; None for a group of one.
        real_token_count: [1] int32 of the context that this group serves, or None.
        real_tokens: the same in the frame of this rank's rows.
    """

    def __init__(self, group: EPGroup, max_tokens_per_rank: int, topk: int, hidden_size: int, settings: Settings) -> None:
        for name, value in (
            ("per_rank_worst_case_token_count", max_tokens_per_rank),
            ("topk", topk),
            ("hidden_size", hidden_size),
        ):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive int, got {value!r}")
        self.group, self.max_tokens_per_rank, self.topk, self.hidden_size = group, max_tokens_per_rank, topk, hidden_size
        self.real_token_count: torch.Tensor | None = None
        self.workspace: Workspace | None = None
        self.rows: Rows | None = None
        self.real_tokens = RealTokens(group.device)
        if group.size == 1:
            with torch.inference_mode(False):  # a later step may write to it outside of the mode
                self.step_metadata = torch.zeros(3, dtype=torch.int32, device=group.device)
            self.tokens_per_rank = self.step_metadata[0:1]
        else:
            config = MoEConfig(hidden_size=hidden_size, num_experts=ANY_EXPERT, topk=topk, dtype=torch.bfloat16)
            self.workspace = open_workspace(config, group, settings.transport, max_tokens_per_rank, settings)
            self._look_into(self.workspace)
        self.valid_tokens = self.step_metadata[0:1]

    def _look_into(self, workspace: Workspace) -> None:
        """Takes the tensors of a workspace that was just opened, or reset."""
        step = workspace.begin_step(0)
        self.step_metadata, self.tokens_per_rank = step.summary, step.tokens_per_rank
        self.valid_tokens = self.step_metadata[0:1]
        self.rows = StaticRows(workspace) if workspace.transport in STATIC_TRANSPORTS else PaddedRows(workspace)

    def reset(self, timeout_s: float | None) -> None:
        """`Workspace.reset`, after which the tensors are others."""
        if self.workspace is not None:
            self.workspace.reset(timeout_s=timeout_s)
            self._look_into(self.workspace)

    def begin_step(self, num_tokens: int, real_token_count: torch.Tensor | None, first_row: int) -> None:
        """Publishes the counts. This rank's rows are `real_token_count`'s from `first_row` on (sequence parallelism)."""
        if self.workspace is None:
            self.step_metadata[0:1].fill_(num_tokens)
            self.step_metadata[2:3].fill_(num_tokens)
            return
        if self.workspace.transport not in STATIC_TRANSPORTS and is_capturing(self.group.device):
            raise StateError(
                f"a step with uneven counts cannot be captured on transport {self.workspace.transport!r}, which needs them on "
                f"the host; run it eagerly. Why no other transport serves: {'; '.join(map(str, self.workspace.decisions))}"
            )
        self.workspace.begin_step(num_tokens, self.real_tokens.after(first_row, real_token_count))

    def check_partial(self, partial: torch.Tensor) -> None:
        """Raises ShapeError unless `partial` has G rows."""
        G = self.max_tokens_per_rank * self.group.size
        if partial.dim() != 2 or partial.shape[0] != G:
            raise ShapeError(f"expert output must be [{G}, {self.hidden_size}], as the dispatch, got {list(partial.shape)}")

    def shown(self, tensor: torch.Tensor | None) -> dict[str, Any] | None:
        """`tensor` as the class attributes show it. The handle is the workspace: there is one for all buffers."""
        return None if tensor is None else {"tensor": tensor, "handle": self.workspace}

    def close(self) -> None:
        """Releases everything; see `Workspace.close`."""
        if self.workspace is not None:
            self.workspace.close()

    def __repr__(self) -> str:
        shape = f"max_tokens_per_rank={self.max_tokens_per_rank}, topk={self.topk}, hidden_size={self.hidden_size}"
        return f"GroupBuffers({self.group!r}, {shape})"


def open_workspace(
    config: MoEConfig, group: EPGroup, transport: str, max_tokens_per_rank: int, settings: Settings, counts: Counts = "uneven"
) -> Workspace:
    """A workspace with these settings, opened by all ranks of the group together."""
    return Workspace(
        config,
        group,
        max_tokens_per_rank=max_tokens_per_rank,
        transport=transport,
        combine_dtype=settings.combine_dtype,
        combine_order=settings.combine_order,
        index_dtype=torch.int64,
        counts=counts,
        timeout_s=settings.timeout_s,
        open_timeout_s=settings.open_timeout_s,
        max_ctas=settings.max_ctas,
        result_dtype=settings.combine_output,
    )


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
