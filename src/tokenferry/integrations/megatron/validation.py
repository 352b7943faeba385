"""The settings that exclude one another, as Megatron's `TransformerConfig` refuses them: errors name the field; no asserts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from tokenferry.errors import ConfigError

BACKENDS: Final = ("flashinfer", "torch", "vllm")
"""What `inference_grouped_gemm_backend` may say."""

DEFAULTS: Final = MappingProxyType(
    {
        "transformer_impl": "transformer_engine",
        "inference_moe_token_dispatcher_type": "nvls",
        "inference_grouped_gemm_backend": "vllm",
        "moe_token_dispatcher_type": "allgather",
        "tensor_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "expert_model_parallel_size": 1,
    }
)
"""Megatron's defaults for what a config does not have. Everything else defaults to None, which reads as "off"."""


class Fields:
    """A config read by name: what is missing has its default, and an enum member reads as its value."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name, None)
        value = getattr(value, "value", value)
        return DEFAULTS.get(name) if value is None else value


@dataclass(frozen=True)
class Rule:
    """`refuses(fields)` is true for a config that cannot be served; the error names `field` and its value."""

    field: str
    refuses: Callable[[Fields], bool]
    reason: str


def _mxfp8(f: Fields) -> bool:
    # Megatron compares `fp8` with "mxfp8", which it never is (it is "e4m3" or "hybrid"), so that its three checks never fire.
    return bool(f.fp8) and f.fp8_recipe == "mxfp8"


RULES: Final = (
    Rule(
        "expert_tensor_parallel_size",
        lambda f: f.expert_tensor_parallel_size > 1,
        "inference-optimized MoE layers do not support expert tensor parallelism; set it to 1",
    ),
    Rule(
        "moe_expert_capacity_factor",
        lambda f: f.moe_expert_capacity_factor is not None,
        "inference-optimized MoE layers are dropless; leave it None",
    ),
    Rule(
        "moe_router_padding_for_quantization",
        lambda f: bool(f.moe_router_padding_for_quantization),
        "a routing map padded for quantization cannot be dispatched; switch it off",
    ),
    Rule(
        "moe_router_dtype",
        lambda f: f.moe_router_dtype != "fp32",
        "inference-optimized layers take float32 probabilities; set it to 'fp32' (--moe-router-dtype=fp32)",
    ),
    Rule(
        "inference_grouped_gemm_backend",
        lambda f: f.inference_grouped_gemm_backend not in BACKENDS,
        f"it must be one of {', '.join(BACKENDS)}",
    ),
    Rule(
        "gated_linear_unit",
        lambda f: bool(f.gated_linear_unit) and f.inference_grouped_gemm_backend not in ("torch", "vllm"),
        "gated units need inference_grouped_gemm_backend 'torch' or 'vllm'",
    ),
    Rule(
        "batch_invariant_mode",
        lambda f: bool(f.batch_invariant_mode) and f.inference_grouped_gemm_backend not in ("torch", "vllm"),
        "it needs inference_grouped_gemm_backend 'torch' or 'vllm'",
    ),
    Rule(
        "batch_invariant_mode",
        lambda f: (
            bool(f.batch_invariant_mode) and f.expert_model_parallel_size > 1 and f.inference_moe_token_dispatcher_type != "nvls"
        ),
        "with expert parallelism it requires inference_moe_token_dispatcher_type='nvls'",
    ),
    Rule(
        "batch_invariant_mode",
        lambda f: bool(f.batch_invariant_mode and (f.fp8 or f.fp4)),
        "it needs bfloat16; switch fp8 and fp4 off",
    ),
    Rule(
        "batch_invariant_mode",
        lambda f: bool(f.batch_invariant_mode and f.moe_permute_fusion),
        "it excludes moe_permute_fusion; switch that off",
    ),
    Rule(
        "batch_invariant_mode",
        lambda f: bool(f.batch_invariant_mode and f.moe_pad_experts_for_cuda_graph_inference),
        "it excludes moe_pad_experts_for_cuda_graph_inference; switch that off",
    ),
    Rule("fp8_param", lambda f: _mxfp8(f) and not f.fp8_param, "fp8_recipe='mxfp8' needs it; switch it on"),
    Rule(
        "inference_grouped_gemm_backend",
        lambda f: _mxfp8(f) and f.inference_grouped_gemm_backend != "torch",
        "with fp8_recipe='mxfp8' only 'torch' serves",
    ),
    Rule(
        "moe_shared_expert_overlap",
        lambda f: (
            bool(f.moe_shared_expert_overlap)
            and f.moe_shared_expert_intermediate_size is not None
            and f.moe_token_dispatcher_type not in ("alltoall", "flex")
        ),
        "it needs moe_token_dispatcher_type 'alltoall' or 'flex' (that of training)",
    ),
    Rule(
        "moe_shared_expert_overlap",
        lambda f: bool(f.moe_shared_expert_overlap and f.moe_latent_size) and f.inference_moe_token_dispatcher_type != "nvls",
        "with moe_latent_size it requires inference_moe_token_dispatcher_type='nvls'",
    ),
    Rule(
        "num_moe_experts",
        lambda f: f.num_moe_experts < 1 or f.num_moe_experts % f.expert_model_parallel_size != 0,
        "it must be a positive multiple of expert_model_parallel_size",
    ),
    Rule(
        "tensor_model_parallel_size",
        lambda f: f.tensor_model_parallel_size > 1 and not f.sequence_parallel,
        "MoE layers with tensor parallelism need sequence_parallel; switch it on",
    ),
)


def validate_config(config: Any) -> None:
    """Checks a config with experts whose `transformer_impl` is "inference_optimized"; others are not ours to judge.

    Args:
        config: anything with Megatron's field names; what it lacks has Megatron's default.

    Raises:
        ConfigError: (a ValueError) naming the field, its value and what to set.
    """
    fields = Fields(config)
    if fields.transformer_impl != "inference_optimized" or fields.num_moe_experts is None:
        return
    for rule in RULES:
        if rule.refuses(fields):
            raise ConfigError(f"{rule.field} is {getattr(fields, rule.field)!r}: {rule.reason}")
