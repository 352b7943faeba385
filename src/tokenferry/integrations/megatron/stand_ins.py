"""Small objects with the attributes that the dispatchers read, for use without Megatron.

Megatron's own `TransformerConfig` and `ProcessGroupCollection` serve as well: everything is taken by what it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tokenferry.groups import EPGroup
from tokenferry.integrations.megatron.validation import validate_config

AnyGroup = dist.ProcessGroup | EPGroup | None
"""What may stand for a process group. None is a group of one."""


@dataclass(frozen=True, kw_only=True)
class InferenceMoEConfig:
    """The part of Megatron's `TransformerConfig` that inference with experts reads, under the same names.

    Raises:
        ConfigError: as `validate_config`.
    """

    moe_router_topk: int
    num_moe_experts: int
    hidden_size: int
    moe_latent_size: int | None = None
    transformer_impl: str = "inference_optimized"
    inference_moe_token_dispatcher_type: str = "nvls"
    inference_grouped_gemm_backend: Any = "torch"
    inference_moe_disable_fused_quant_kernels: bool = False
    batch_invariant_mode: bool = False
    moe_router_dtype: str | None = "fp32"
    moe_router_padding_for_quantization: bool = False
    moe_expert_capacity_factor: float | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_overlap: bool = False
    moe_token_dispatcher_type: str = "alltoall"
    moe_permute_fusion: bool = False
    moe_pad_experts_for_cuda_graph_inference: bool = False
    gated_linear_unit: bool = False
    add_bias_linear: bool = False
    fp8: str | None = None
    fp8_recipe: Any = None
    fp8_param: bool = False
    fp4: str | None = None
    tensor_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        validate_config(self)


@dataclass(frozen=True, kw_only=True)
class ProcessGroups:
    """The part of Megatron's `ProcessGroupCollection` that the dispatchers read.

    Attributes:
        ep: the expert-parallel group, whose ranks exchange tokens.
        expt_tp: the expert tensor-parallel group; one rank, or none, for inference.
        tp: attention's tensor-parallel group, along which sequence parallelism shards the rows.
        tp_ep: the product of `expt_tp` and `ep`.
    """

    ep: AnyGroup = None
    expt_tp: AnyGroup = None
    tp: AnyGroup = None
    tp_ep: AnyGroup = None


@dataclass(frozen=True)
class StreamedSharedExperts:
    """Makes a shared expert of any callable: the dispatchers need `__call__` and `.stream`.

    Attributes:
        module: hidden states in their original shape -> an output of that shape.
        stream: the CUDA stream on which it overlaps with the dispatch; None: it runs at once, where it is called.
    """

    module: Callable[[torch.Tensor], torch.Tensor]
    stream: torch.cuda.Stream | None = None

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.module(hidden_states)
