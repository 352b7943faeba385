"""`NCCLAllGatherDispatcher`: rows through `torch.distributed`, with equal or uneven counts.

Legend: T rows of this rank, V rows of all ranks, H hidden size, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenferry.dispatcher import Dispatcher
from tokenferry.errors import StateError
from tokenferry.integrations.megatron.base import InferenceAllGatherDispatcherBase
from tokenferry.integrations.megatron.process_groups import size_of
from tokenferry.integrations.megatron.registry import CollectiveWorkspace
from tokenferry.integrations.megatron.validation import Fields
from tokenferry.transports.base import Counts
from tokenferry.workspace import Workspace


class NCCLAllGatherDispatcher(InferenceAllGatherDispatcherBase):
    """Gathers over NCCL, or over gloo where tensors are on CPUs. No buffers: tensors have the step's rows and no more.

    Class attributes:
        _use_allgather_v: False: every rank brings the same T, which costs no exchange of counts and may be captured in a CUDA
            graph. True: any counts; they come to the host once a step, so never in a graph. All ranks have the same value.
        _local_tokens_per_rank: the counts of the last step that had uneven ones.
    """

    _use_allgather_v: bool = False
    _local_tokens_per_rank: list[int] | None = None

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: Sequence[int],
        config: Any,
        pg_collection: Any = None,
        runs_metadata_sync: bool = True,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection, runs_metadata_sync=runs_metadata_sync)
        # With expert tensor parallelism a row must meet all shards of an expert, so rows travel between all ranks of both.
        self._row_group = self.tp_ep_group if size_of(self.tp_ep_group) > self.ep_size else self.ep_group
        self._row_group_size = size_of(self._row_group)
        self._hidden: tuple[int, torch.dtype, torch.device] | None = None
        self._layers: dict[Workspace, Dispatcher] = {}
        self._under_way: Dispatcher | None = None

    @classmethod
    def allocate_buffers(cls) -> None:
        """A new scalar of valid tokens, before any CUDA-graph capture. There is nothing else to allocate."""
        cls.allocate_valid_tokens_tensor()

    def update_metadata(self, local_tokens: int) -> None:
        """Begins a step: fills the scalar alone if counts are equal, else exchanges counts and brings them to the host."""
        device = self._hidden_as_known()[2]
        if self._row_group_size == 1:
            self._publish_scalar(local_tokens, device)
            return
        opened = self._collective()
        workspace = opened.workspace
        workspace.begin_step(local_tokens, opened.real_tokens.after(self.sp_rank * local_tokens, self._real_token_count_tensor))
        if type(self)._use_allgather_v:
            counts = workspace.active_transport.tokens_per_rank
            assert counts is not None, "the registry opens the collective transport for this class, whose host knows the counts"
            NCCLAllGatherDispatcher._local_tokens_per_rank = list(counts)
            self._publish_scalar(sum(counts), device)
        else:
            self._publish_scalar(local_tokens * self._row_group_size, device)

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' rows, in rank order.

        Args:
            hidden_states: [T, H].
            probs: [T, K]; `self.routing_map` is [T, K], int64 or int32.

        Returns:
            hidden states [V, H] and probabilities [V, K] float32; `self.routing_map` becomes [V, K] of its dtype. A group of
            one returns what it was given.
        """
        self._hidden = (hidden_states.shape[1], hidden_states.dtype, hidden_states.device)
        routing, dense_probs = self._checked_routing(hidden_states, probs)
        if self._row_group_size == 1:
            self._dispatch_alone(hidden_states, routing)
            return hidden_states, probs
        opened, num_rows = self._collective(), hidden_states.shape[0]
        if self._begins_step(opened, num_rows):
            self.update_metadata(num_rows)
        else:
            opened.real_tokens.after(self.sp_rank * num_rows, self._real_token_count_tensor)
        workspace = opened.workspace
        if workspace not in self._layers:
            self._layers[workspace] = workspace.dispatcher()
        self._under_way = self._layers[workspace]
        got = self._under_way.dispatch(hidden_states.contiguous(), routing, dense_probs)
        self.routing_map = got.topk_idx.to(routing.dtype)
        return got.hidden, got.topk_weights

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The sums of all ranks' partial rows.

        Args:
            hidden_states: [V, H] expert outputs, float32 or bfloat16: for each row the sum over this rank's experts.

        Returns:
            [T, H] bfloat16 (or float32: `configure(combine_output=...)`): terms added in float32 in rank order.
        """
        result_dtype = self._registry.settings.combine_output
        if self._row_group_size == 1:
            return hidden_states.to(result_dtype)
        if self._under_way is None:
            raise StateError("token_combine: no dispatch is under way on this dispatcher; call token_dispatch() first")
        combined = self._under_way.combine(hidden_states.contiguous()).to(result_dtype)
        self._under_way = None
        return combined

    def _begins_step(self, opened: CollectiveWorkspace, num_rows: int) -> bool:
        """Equal counts cost nothing, so a forward with fewer rows (multi-token prediction) gets a step of its own size.
        Uneven ones would have to be exchanged, and the ranks could not know that they all must."""
        if self._runs_metadata_sync:
            return True
        return not type(self)._use_allgather_v and opened.workspace.step.num_tokens != num_rows

    def _hidden_as_known(self) -> tuple[int, torch.dtype, torch.device]:
        """Of the last dispatch; before the first, what the config and the group say."""
        if self._hidden is not None:
            return self._hidden
        fields = Fields(self.config)
        hidden_size = fields.moe_latent_size or fields.hidden_size
        if hidden_size is None:
            raise StateError("update_metadata comes from token_dispatch: the config has no hidden_size to open a connection with")
        return hidden_size, torch.bfloat16, self._registry.ep_group(self._row_group).device

    def _collective(self) -> CollectiveWorkspace:
        hidden_size, dtype, _ = self._hidden_as_known()
        counts: Counts = "uneven" if type(self)._use_allgather_v else "equal"
        return self._registry.collective(self._row_group, hidden_size, self.topk, dtype, counts)
