"""What both dispatchers share: Megatron's attributes, the scalar of valid tokens, padding rows, the way through a group of one.

Legend: T rows of this rank, V rows of all ranks, H hidden size, K top-k, N leading dimensions of the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokenferry.errors import ConfigError, DtypeError, ShapeError, StateError, UsageError
from tokenferry.integrations.megatron.process_groups import group_of, rank_of, size_of, torch_groups_only
from tokenferry.integrations.megatron.registry import Registry
from tokenferry.integrations.megatron.validation import Fields, validate_config

OUTPUT_DTYPE = torch.bfloat16
"""Of every row that a layer gets back, whatever the experts' dtype."""


class StandaloneBase:
    """In the place of Megatron's `MoEAllGatherTokenDispatcher` where there is no Megatron; `install()` puts that one here."""

    def __init__(
        self, num_local_experts: int, local_expert_indices: Sequence[int], config: Any, pg_collection: Any = None
    ) -> None:
        del num_local_experts, local_expert_indices, pg_collection  # the class below keeps them in both cases
        self.valid_cudagraph_attrs = None


@dataclass(frozen=True)
class _Arguments:
    """The constructor's arguments, by position or by name."""

    num_local_experts: int
    local_expert_indices: Sequence[int]
    config: Any
    pg_collection: Any = None


class InferenceAllGatherDispatcherBase(StandaloneBase):
    """For isinstance checks, and the class attributes that expert kernels read. Not to be used itself.

    Constructor: `(num_local_experts, local_expert_indices, config, pg_collection=None, runs_metadata_sync=True)`.

    Args:
        num_local_experts: experts of this rank, at least 1.
        local_expert_indices: their numbers among all.
        config: anything with `moe_router_topk` and more of Megatron's field names, such as `TransformerConfig`.
        pg_collection: anything with some of `ep`, `expt_tp`, `tp` and `tp_ep`: process groups, `EPGroup`s or None.
        runs_metadata_sync: whether this layer's dispatch begins the step. True for the first MoE layer of a model, False for
            the others: counts are exchanged once a forward.

    Class attributes:
        _valid_tokens_tensor: [1] int32 on the device, V; of the NVLS class the head of `_step_metadata`. None before allocation.
        _host_valid_tokens_estimate: V as the host knows or guesses it: exact for the NCCL class and a group of one, T times EP
            for the NVLS class, whose host does not know the other ranks' counts.
        _real_token_count_tensor: [1] int32: rows of the step that carry tokens. None: all do. Per concrete class.

    Raises:
        ConfigError: (a ValueError) as `validate_config`, or a number or group that cannot be.
    """

    _valid_tokens_tensor: torch.Tensor | None = None
    _host_valid_tokens_estimate: int | None = None
    _real_token_count_tensor: torch.Tensor | None = None
    _registry = Registry()

    routing_map: torch.Tensor
    hidden_shape: torch.Size

    def __init__(self, *args: Any, runs_metadata_sync: bool = True, **kwargs: Any) -> None:
        given = _Arguments(*args, **kwargs)
        config, groups = given.config, given.pg_collection
        _check_experts(given)
        validate_config(config)
        super().__init__(given.num_local_experts, given.local_expert_indices, config, torch_groups_only(groups))
        self.config = config
        self.num_local_experts, self.local_expert_indices = given.num_local_experts, given.local_expert_indices
        self.ep_group, self.tp_group, self.tp_ep_group = (group_of(groups, name) for name in ("ep", "expt_tp", "tp_ep"))
        self.ep_size, self.ep_rank = size_of(self.ep_group), rank_of(self.ep_group)
        self.tp_size, self.tp_rank = size_of(self.tp_group), rank_of(self.tp_group)
        # Sequence parallelism shards rows along attention's tensor-parallel group, not along the experts' (`tp_rank`).
        self.sp_rank = rank_of(group_of(groups, "tp"))
        self.topk = self.router_topk = config.moe_router_topk
        self.add_bias = bool(Fields(config).add_bias_linear)
        self.shared_experts: Any = None
        self.use_nccl_stream = False
        self.cudagraph_attrs = ["routing_map"]
        self.global_local_map = None
        self._runs_metadata_sync = runs_metadata_sync

    # --- class attributes -------------------------------------------------------------------------------------------

    @classmethod
    def _valid_tokens(cls) -> torch.Tensor | None:
        return cls._valid_tokens_tensor

    @classmethod
    def _get_host_valid_tokens_estimate(cls) -> int | None:
        return cls._host_valid_tokens_estimate

    @classmethod
    def allocate_valid_tokens_tensor(cls) -> None:
        """A new [1] int32 scalar on the current device, for all dispatchers. Comes before CUDA-graph captures.

        Raises:
            StateError: during a capture.
        """
        InferenceAllGatherDispatcherBase._valid_tokens_tensor = cls._registry.new_scalar()

    @classmethod
    def set_real_token_count_tensor(cls, tensor: torch.Tensor | None) -> None:
        """Rows at and after `tensor` ([1] int32, read when kernels run) are padding: they reach no expert. None: all are real.

        The count is in the frame before sequence parallelism shards the rows: rank s of that group starts at row s times T.
        """
        if tensor is not None and tensor.dtype != torch.int32:
            raise DtypeError(f"the real-token-count tensor must be torch.int32, got {tensor.dtype}")
        if tensor is not None and tensor.numel() != 1:
            raise ShapeError(f"the real-token-count tensor must have one element, got {list(tensor.shape)}")
        cls._real_token_count_tensor = tensor

    @classmethod
    def modify_real_token_count_for_mtp(cls, mtp_token_count: int) -> None:
        """Writes the row count of a multi-token-prediction forward into the bound tensor; the next step's owner restores it.

        Raises:
            StateError: no tensor is bound.
        """
        if cls._real_token_count_tensor is None:
            raise StateError("no real-token-count tensor is bound; call set_real_token_count_tensor(tensor) first")
        cls._real_token_count_tensor.fill_(mtp_token_count)

    # --- the protocol of an MoE layer -------------------------------------------------------------------------------

    def update_metadata(self, local_tokens: int) -> None:
        """Publishes the counts of a step in which this rank brings `local_tokens` rows. Called by the first layer's dispatch."""
        raise NotImplementedError(f"{type(self).__name__} must define update_metadata")

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N..., H] -> ([T, H], probs); keeps `routing_map` and the shape. No communication."""
        self.hidden_shape = hidden_states.shape
        self.routing_map = routing_map
        return hidden_states.reshape(-1, self.hidden_shape[-1]), probs

    def dispatch_postprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        """Passes both through: the expert kernels permute."""
        return hidden_states, None, probs

    def combine_preprocess(self, expert_output: torch.Tensor) -> torch.Tensor:
        """Passes it through: the expert kernels have undone their permutation."""
        return expert_output

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, H] -> the shape that `dispatch_preprocess` saw; unrounded sums (`combine_output`) are rounded to bfloat16 here."""
        return self._rounded(hidden_states.view(self.hidden_shape))

    def set_shared_experts(self, shared_experts: Any) -> None:
        """Keeps the shared expert: anything with `__call__` and `.stream` (a CUDA stream, or None).

        Raises:
            ConfigError: `config.moe_shared_expert_overlap` is off.
        """
        if not Fields(self.config).moe_shared_expert_overlap:
            raise ConfigError(
                "set_shared_experts: moe_shared_expert_overlap is off; switch it on, or run the shared expert yourself"
            )
        self.shared_experts = shared_experts
        self.use_nccl_stream = True

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        """(None, None): experts that write into the wire's buffer take `NVLSAllGatherVDispatcher._get_rsv_tensor()`."""
        return None, None

    def _rounded(self, output: torch.Tensor) -> torch.Tensor:
        """What a layer gets back, also where `token_combine` left its sums unrounded. The settings may have changed since its
        buffers were opened, and are not asked."""
        return output.to(OUTPUT_DTYPE)

    # --- for the concrete classes -----------------------------------------------------------------------------------

    def _checked_routing(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`routing_map` and `probs` as contiguous [T, K]: a router squeezes K = 1 away."""
        routing, T = self.routing_map, hidden_states.shape[0]
        if self.topk == 1 and routing.dim() == 1:
            routing, probs = routing.unsqueeze(1), probs.reshape(-1, 1)
        for name, tensor in (("routing_map", routing), ("probs", probs)):
            if tensor.dim() != 2 or tuple(tensor.shape) != (T, self.topk):
                raise ShapeError(f"{name} must be dense, [{T}, {self.topk}] (rows, moe_router_topk), got {list(tensor.shape)}")
        if routing.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"routing_map must hold expert numbers, int64 or int32, got {routing.dtype}; use the dense router")
        num_experts = Fields(self.config).num_moe_experts or self.num_local_experts * self.ep_size
        if routing.device.type == "cpu" and routing.numel() and int(routing.max()) >= num_experts:
            raise UsageError(f"routing_map holds {int(routing.max())}, but there are {num_experts} experts, numbered from 0")
        return routing.contiguous(), probs.contiguous()

    def _dispatch_alone(self, hidden_states: torch.Tensor, routing: torch.Tensor) -> None:
        """A group of one: padding is masked and the counts are published as in any other, and nothing else happens."""
        if self._runs_metadata_sync:
            self.update_metadata(hidden_states.shape[0])
        real = self._real_token_count_tensor
        if real is not None:
            rows = torch.arange(routing.shape[0], dtype=torch.int64, device=routing.device) + self.sp_rank * routing.shape[0]
            self.routing_map = routing.masked_fill((rows >= real).unsqueeze(1), -1)

    def _publish_scalar(self, count: int, device: torch.device) -> None:
        """Writes V where there are no buffers of the NVLS class, and shows it."""
        base, registry = InferenceAllGatherDispatcherBase, self._registry
        target = base._valid_tokens_tensor
        if target is None or (registry.shown is not None and target is registry.shown.valid_tokens):
            target = registry.scalar
        if target is None or target.device != device:
            target = registry.new_scalar(device)
        target.fill_(count)
        base._valid_tokens_tensor = target
        base._host_valid_tokens_estimate = count


def _check_experts(given: _Arguments) -> None:
    if given.num_local_experts < 1 or len(given.local_expert_indices) < 1:
        raise ConfigError(
            f"a rank needs an expert: num_local_experts is {given.num_local_experts}, "
            f"local_expert_indices has {len(given.local_expert_indices)} entries"
        )
    topk = getattr(given.config, "moe_router_topk", None)
    if not isinstance(topk, int) or topk < 1:
        raise ConfigError(f"moe_router_topk must be a positive int, got {topk!r}")
