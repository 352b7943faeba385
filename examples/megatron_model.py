"""A mixture-of-experts `GPTModel` from megatron-core's own classes, without Transformer Engine, with random weights.

`get_gpt_layer_with_inference_spec` asks for Transformer Engine, so the layer's specification is written out here: Megatron's MoE
layer, router and inference experts, and around them its local linears, torch norms and `DotProductAttention`.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.moe_module_specs import _build_shared_experts
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType, InferenceCudaGraphScope
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, InferenceGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import InferenceTopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


@dataclass(frozen=True)
class ModelSize:
    """What the model is made of. `shared_expert_size` and `num_mtp_layers` (multi-token prediction) are 0 for none."""

    num_layers: int = 2
    hidden_size: int = 64
    num_heads: int = 4
    num_query_groups: int = 2
    expert_size: int = 32
    num_experts: int = 8
    topk: int = 2
    vocab_size: int = 64
    max_sequence_length: int = 2048
    shared_expert_size: int = 0
    num_mtp_layers: int = 0


class GroupedWeights(torch.nn.Module):
    """One weight an expert, named as in Transformer Engine's GroupedLinear. Megatron's inference experts read nothing else."""

    def __init__(self, num_gemms: int, input_size: int, output_size: int, *, config: TransformerConfig, **_unused: Any) -> None:
        super().__init__()
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        for number in range(num_gemms):
            weight = torch.empty(output_size, input_size, dtype=config.params_dtype, device=device)
            self.register_parameter(f"weight{number}", torch.nn.Parameter(weight, requires_grad=False))

    def forward(self, *_arguments: Any) -> None:
        raise NotImplementedError("only the inference experts are used, which read the weights")


def layer_spec() -> ModuleSpec:
    """A transformer layer whose MLP is Megatron's inference-optimised MoE layer."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    weights = GroupedMLPSubmodules(linear_fc1=GroupedWeights, linear_fc2=GroupedWeights, activation_func=None)
    moe = MoESubmodules(
        router=InferenceTopKRouter,
        experts=partial(InferenceGroupedMLP, submodules=weights),
        shared_experts=partial(_build_shared_experts, submodules=linears),
    )
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    causal = {"attn_mask_type": AttnMaskType.causal}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=WrappedTorchNorm,
            self_attention=ModuleSpec(module=SelfAttention, params=causal, submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=WrappedTorchNorm,
            mlp=partial(MoELayer, submodules=moe),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def model_config(size: ModelSize, *, dispatcher: str, graph_scope: str = "none", **changes: Any) -> TransformerConfig:
    """The settings that Megatron's inference engine wants of a MoE model.

    Args:
        dispatcher: "nccl" or "nvls".
        graph_scope: what a CUDA graph of the engine holds: "none", "layer" or "block" (all layers).
    """
    shared = {"moe_shared_expert_intermediate_size": size.shared_expert_size} if size.shared_expert_size else {}
    return TransformerConfig(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        ffn_hidden_size=size.expert_size,
        num_attention_heads=size.num_heads,
        num_query_groups=size.num_query_groups,
        kv_channels=size.hidden_size // size.num_heads,
        mtp_num_layers=size.num_mtp_layers or None,
        num_moe_experts=size.num_experts,
        moe_ffn_hidden_size=size.expert_size,
        moe_router_topk=size.topk,
        moe_router_dtype="fp32",
        moe_grouped_gemm=True,
        moe_token_dispatcher_type="alltoall",  # of training, which is not used; shared-expert overlap asks for it
        moe_aux_loss_coeff=0.0,
        activation_func=squared_relu,  # the only one that the fused experts of 0.19 have
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=1,
        transformer_impl="inference_optimized",
        inference_moe_token_dispatcher_type=dispatcher,
        inference_grouped_gemm_backend="vllm",
        inference_rng_tracker=True,
        cuda_graph_impl="none" if graph_scope == "none" else "local",
        inference_cuda_graph_scope=InferenceCudaGraphScope[graph_scope],
        **shared,
        **changes,
    )


def build_model(config: TransformerConfig, size: ModelSize, device: torch.device) -> GPTModel:
    """The model with weights that depend on their names alone, so that every rank and run has the same model."""
    spec = layer_spec()
    mtp = {"mtp_block_spec": get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)} if size.num_mtp_layers else {}
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=size.vocab_size,
        max_sequence_length=size.max_sequence_length,
        parallel_output=True,
        position_embedding_type="rope",
        **mtp,
    ).to(device)
    num_local = size.num_experts // parallel_state.get_expert_model_parallel_world_size()
    first = num_local * parallel_state.get_expert_model_parallel_rank()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.data = weight.data.bfloat16()  # the norms' too; buffers keep their dtype
            _fill(weight, name_among_all_experts(name, first))
    return model.eval()


def name_among_all_experts(name: str, first: int) -> str:
    """The name with an expert's number among all ranks' experts; `first` is this rank's first."""
    if ".experts." not in name:
        return name
    head, _, number = name.rpartition("weight")
    return f"{head}weight{first + int(number)}"


def _fill(weight: torch.Tensor, name: str) -> None:
    if "norm" in name:
        weight.fill_(1.0)
        return
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    weight.normal_(0.0, 1.0 if "embedding" in name else 0.7 / weight.shape[-1] ** 0.5, generator=generator)
