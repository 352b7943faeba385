"""`NVLSAllGatherVDispatcher`: rows of any counts through buffers of [G, *], without the host.

Legend: T rows of this rank, V rows of all ranks, W the most rows a rank may bring, G = W times EP, H hidden size, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenferry.dispatcher import Dispatcher
from tokenferry.errors import ConfigError, StateError
from tokenferry.integrations.megatron.base import OUTPUT_DTYPE, InferenceAllGatherDispatcherBase
from tokenferry.integrations.megatron.buffers import GroupBuffers
from tokenferry.integrations.megatron.validation import Fields
from tokenferry.workspace import Workspace


class NVLSAllGatherVDispatcher(InferenceAllGatherDispatcherBase):
    """AllGather-V and ReduceScatter-V with static shapes, for CUDA graphs: NVLink multicast, else peer-to-peer stores, else
    collective calls (eager only; the way on CPU tensors).

    An instance works on the buffers of its `pg_collection.ep` and shape. The class attributes below show the group that was
    allocated last; from an instance's `token_dispatch` to the next `token_combine` or `token_dispatch` of any instance they show
    that instance's group, so that expert kernels that read them there serve several groups in a process.

    Class attributes:
        _step_metadata: [3] int32: V, this rank's row offset, the largest T.
        _per_rank_worst_case_token_count: W.
        _symm_agv_hidden, _symm_agv_routing, _symm_agv_probs: {"tensor", "handle"}: bfloat16 [G, H], int64 [G, K], float32 [G, K].
        _symm_rsv: {"tensor", "handle"}: [G, H] in `configure(combine_dtype=...)`, float32 if nothing else was asked for.
        _symm_metadata: {"tensor", "handle"}: [EP] int32, every rank's T. The handles are the `Workspace`.
    """

    _step_metadata: torch.Tensor | None = None
    _per_rank_worst_case_token_count: int = 2048
    _real_token_count_tensor: torch.Tensor | None = None
    _symm_agv_hidden: dict[str, Any] | None = None
    _symm_agv_routing: dict[str, Any] | None = None
    _symm_agv_probs: dict[str, Any] | None = None
    _symm_rsv: dict[str, Any] | None = None
    _symm_metadata: dict[str, Any] | None = None
    _withholds_rsv: bool = False

    # --- class methods ----------------------------------------------------------------------------------------------

    @classmethod
    def _get_rsv_tensor(cls) -> torch.Tensor | None:
        """The RSV buffer, for experts that write their output into it. None if there is none, or if the layer under way runs
        FlashInfer's kernel, which writes bfloat16, and the buffer is float32."""
        return None if cls._symm_rsv is None or cls._withholds_rsv else cls._symm_rsv["tensor"]

    @classmethod
    def _rank_token_offset(cls) -> torch.Tensor:
        return _allocated(cls._step_metadata)[1:2]

    @classmethod
    def _ep_max_tokens(cls) -> torch.Tensor:
        return _allocated(cls._step_metadata)[2:3]

    @classmethod
    def _delete_buffers(cls) -> None:
        """Closes the buffers of all groups. Local: peers are not waited for."""
        cls._registry.delete_buffers()
        own = NVLSAllGatherVDispatcher
        own._step_metadata = own._real_token_count_tensor = None
        own._symm_agv_hidden = own._symm_agv_routing = own._symm_agv_probs = own._symm_rsv = own._symm_metadata = None
        own._withholds_rsv = False

    @classmethod
    def _reset(cls, timeout_s: float | None) -> None:
        """Starts all connections and buffers of both classes anew, collectively, and shows what stands there then."""
        registry = cls._registry
        if registry.latest is not None:
            _show(registry.latest)
        registry.reset(timeout_s)
        if registry.latest is not None:
            _show(registry.latest)

    @classmethod
    def allocate_buffers(cls, per_rank_worst_case_token_count: int, topk: int, hidden_size: int, ep_group: Any) -> None:
        """Makes the buffers of one group and shape. All its ranks call it together, before any CUDA-graph capture.

        Called again with the same arguments it changes nothing; with another W it replaces the buffers, and graphs captured
        with the old ones must not be replayed. A group of one gets the step's scalars alone.

        Args:
            per_rank_worst_case_token_count: W.
            topk: K.
            hidden_size: H of the rows that travel: the latent size in latent layers.
            ep_group: the expert-parallel process group, or an `EPGroup`.

        Raises:
            ConfigError: an argument is not a positive int, or differs between the ranks.
            TransportUnavailableError: (a RuntimeError) no transport serves the group; it lists the reason for each.
            PeerTimeoutError: a rank did not come.
        """
        _show(cls._registry.allocate(ep_group, per_rank_worst_case_token_count, topk, hidden_size))

    # --- instances --------------------------------------------------------------------------------------------------

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: Sequence[int],
        config: Any,
        pg_collection: Any = None,
        runs_metadata_sync: bool = True,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection, runs_metadata_sync=runs_metadata_sync)
        if self.tp_size > 1:
            raise ConfigError(
                f"expert_tensor_parallel_size is {self.tp_size}, but rows travel in the expert-parallel group alone, where they "
                "would not meet all shards of an expert; set it to 1"
            )
        self._local_tokens: int = 0
        self._shared_expert_output: torch.Tensor | None = None
        self._shared_expert_input: torch.Tensor | None = None
        self._external_shared_expert_launch: bool = False
        self._hidden_size: int | None = Fields(config).moe_latent_size or Fields(config).hidden_size
        self._layer: tuple[Workspace, Dispatcher] | None = None
        self._under_way: GroupBuffers | None = None

    def update_metadata(self, local_tokens: int) -> None:
        """Begins a step: exchanges counts on the device, which publishes `_step_metadata`. Capturable, except on "collective".

        Raises:
            CapacityError: `local_tokens` > W.
        """
        alone = self.ep_size == 1
        find = self._registry.find if alone else self._registry.require
        buffers = find(self.ep_group, self.topk, self._hidden_size)
        if buffers is None:
            device = self.routing_map.device if hasattr(self, "routing_map") else self._registry.ep_group(self.ep_group).device
            self._publish_scalar(local_tokens, device)
            return
        _show(buffers)
        buffers.begin_step(local_tokens, self._real_token_count_tensor, self.sp_rank * local_tokens)
        InferenceAllGatherDispatcherBase._host_valid_tokens_estimate = local_tokens * self.ep_size

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N..., H] -> ([T, H], probs); keeps `routing_map` and the shape. No communication.

        With shared experts set, launches them on their stream, unless `_external_shared_expert_launch` says that the layer does
        (latent layers: they need the rows before the projection).
        """
        if self.shared_experts is not None and not self._external_shared_expert_launch:
            self._launch_shared_experts(hidden_states)
        rows, probs = super().dispatch_preprocess(hidden_states, routing_map, probs)
        self._local_tokens = rows.shape[0]
        return rows, probs

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' rows, in rank order, at the head of the buffers.

        Args:
            hidden_states: [T, H] bfloat16. In a layer that does not begin the step, T may be less than the step's.
            probs: [T, K] float32; `self.routing_map` is [T, K], int64 or int32, and is not written.

        Returns:
            hidden states [G, H] and probabilities [G, K] float32; `self.routing_map` becomes [G, K] int64. Rows >= V have
            routing -1, padding rows too; their other values are undefined. All are the buffers themselves, valid until this
            layer's `token_combine`. A group of one returns what it was given.
        """
        self._hidden_size = hidden_states.shape[1]
        routing, dense_probs = self._checked_routing(hidden_states, probs)
        self._local_tokens = hidden_states.shape[0]
        if self.ep_size == 1:
            self._dispatch_alone(hidden_states, routing)
            return hidden_states, probs
        buffers = self._registry.require(self.ep_group, self.topk, self._hidden_size)
        _show(buffers)
        if self._runs_metadata_sync:
            self.update_metadata(self._local_tokens)
        else:  # fewer rows than the step's (multi-token prediction) begin elsewhere
            buffers.real_tokens.after(self.sp_rank * self._local_tokens, self._real_token_count_tensor)
        assert buffers.rows is not None, "a group of several ranks has row buffers"
        gathered = buffers.rows.dispatch(self._layer_of(buffers), hidden_states.contiguous(), routing, dense_probs)
        self._under_way = buffers
        self.routing_map = gathered.routing_GK
        flashinfer = Fields(self.config).inference_grouped_gemm_backend == "flashinfer"
        NVLSAllGatherVDispatcher._withholds_rsv = flashinfer and buffers.rows.rsv_GH.dtype != OUTPUT_DTYPE
        return gathered.hidden_GH, gathered.probs_GK

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The sums of all ranks' partial rows.

        Args:
            hidden_states: [G, H] expert outputs, float32 or bfloat16, of which rows >= V are not read. May be the RSV buffer.

        Returns:
            [T, H] bfloat16 (or float32: `configure(combine_output=...)`): terms added in float32 in rank order.
        """
        if self.ep_size == 1:
            return hidden_states.to(self._registry.settings.combine_output)
        buffers = self._under_way
        if buffers is None or buffers.rows is None:
            raise StateError("token_combine: no dispatch is under way on this dispatcher; call token_dispatch() first")
        buffers.check_partial(hidden_states)
        combined = buffers.rows.combine(self._layer_of(buffers), hidden_states.contiguous())
        self._under_way, NVLSAllGatherVDispatcher._withholds_rsv = None, False
        if self._registry.latest is not None:
            _show(self._registry.latest)
        return combined

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, H] -> the shape that `dispatch_preprocess` saw, plus the shared experts' output if that launched them."""
        output = hidden_states.view(self.hidden_shape)
        if self._shared_expert_output is not None:
            if self.shared_experts.stream is not None:
                torch.cuda.current_stream().wait_stream(self.shared_experts.stream)
            output = output + self._shared_expert_output
            self._shared_expert_output = self._shared_expert_input = None
        return self._rounded(output)

    def _launch_shared_experts(self, hidden_states: torch.Tensor) -> None:
        stream = self.shared_experts.stream
        if stream is None:
            self._shared_expert_output = self.shared_experts(hidden_states)
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._shared_expert_output = self.shared_experts(hidden_states)
        # Kept until the join: the allocator does not know that the side stream reads it.
        self._shared_expert_input = hidden_states

    def _layer_of(self, buffers: GroupBuffers) -> Dispatcher:
        """This layer's dispatcher. Made at the first use, so layers are numbered in the order of a forward."""
        workspace = buffers.workspace
        assert workspace is not None, "a group of several ranks has a workspace"
        if self._layer is None or self._layer[0] is not workspace:
            self._layer = (workspace, workspace.dispatcher())
        return self._layer[1]


def _show(buffers: GroupBuffers) -> None:
    """Makes the class attributes those of `buffers`. The count of real tokens, which the user sets, goes with its buffers."""
    own, registry = NVLSAllGatherVDispatcher, NVLSAllGatherVDispatcher._registry
    InferenceAllGatherDispatcherBase._valid_tokens_tensor = buffers.valid_tokens
    if registry.shown is buffers:
        return
    if registry.shown is not None:
        registry.shown.real_token_count = own._real_token_count_tensor
        own._real_token_count_tensor = buffers.real_token_count
    registry.shown = buffers
    own._per_rank_worst_case_token_count = buffers.max_tokens_per_rank
    own._step_metadata = buffers.step_metadata
    gathered, rsv = (None, None) if buffers.rows is None else (buffers.rows.gathered, buffers.rows.rsv_GH)
    own._symm_agv_hidden = buffers.shown(None if gathered is None else gathered.hidden_GH)
    own._symm_agv_routing = buffers.shown(None if gathered is None else gathered.routing_GK)
    own._symm_agv_probs = buffers.shown(None if gathered is None else gathered.probs_GK)
    own._symm_rsv = buffers.shown(rsv)
    own._symm_metadata = buffers.shown(buffers.tokens_per_rank)


def _allocated(metadata: torch.Tensor | None) -> torch.Tensor:
    if metadata is None:
        raise StateError("no step metadata; call NVLSAllGatherVDispatcher.allocate_buffers(...) on every rank first")
    return metadata
