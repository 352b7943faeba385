"""Megatron-Core's classes in a group of one, and what they say to wrong use."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_classes import NCCL, NVLS, config, fresh_classes, preprocessed, rows
from tokenferry.errors import ConfigError, DtypeError, ShapeError, StateError, UsageError
from tokenferry.integrations import megatron

__all__ = ["fresh_classes"]  # a fixture that every test here gets


# --- a group of one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NCCL, NVLS])
def test_group_of_one_hands_back_what_it_was_given(name: str) -> None:
    dispatcher = getattr(megatron, name)(4, [0, 1, 2, 3], config())
    hidden, probs = preprocessed(dispatcher)
    got_hidden, got_probs = dispatcher.token_dispatch(hidden, probs)
    assert got_hidden is hidden
    assert got_probs is probs
    assert dispatcher.dispatch_postprocess(hidden, probs) == (hidden, None, probs)
    assert dispatcher.combine_preprocess(hidden) is hidden
    combined = dispatcher.combine_postprocess(dispatcher.token_combine(hidden.float()))
    assert (combined.dtype, combined.shape) == (torch.bfloat16, (5, 1, 8))


@pytest.mark.parametrize("name", [NCCL, NVLS])
def test_group_of_one_publishes_its_counts(name: str) -> None:
    cls = getattr(megatron, name)
    cls.allocate_valid_tokens_tensor()
    address = megatron.InferenceAllGatherDispatcherBase._valid_tokens().data_ptr()
    dispatcher = cls(4, [0, 1, 2, 3], config())
    dispatcher.token_dispatch(*preprocessed(dispatcher))
    assert cls._valid_tokens().tolist() == [5]
    assert cls._valid_tokens().dtype == torch.int32
    assert cls._valid_tokens().data_ptr() == address
    assert cls._get_host_valid_tokens_estimate() == 5


@pytest.mark.parametrize("name", [NCCL, NVLS])
def test_group_of_one_that_allocated_in_inference_mode_publishes_outside_of_it(name: str) -> None:
    cls = getattr(megatron, name)
    with torch.inference_mode():
        cls.allocate_valid_tokens_tensor()
        if name == NVLS:
            cls.allocate_buffers(per_rank_worst_case_token_count=8, topk=2, hidden_size=8, ep_group=None)
        dispatcher = cls(4, [0, 1, 2, 3], config())
    dispatcher.token_dispatch(*preprocessed(dispatcher))
    assert cls._valid_tokens().tolist() == [5]


@pytest.mark.parametrize("name", [NCCL, NVLS])
def test_only_the_first_layer_publishes(name: str) -> None:
    cls = getattr(megatron, name)
    first, second = cls(4, [0, 1, 2, 3], config()), cls(4, [0, 1, 2, 3], config(), runs_metadata_sync=False)
    first.token_dispatch(*preprocessed(first, 5))
    second.token_dispatch(*preprocessed(second, 3))
    assert cls._valid_tokens().tolist() == [5]


@pytest.mark.parametrize("name", [NCCL, NVLS])
def test_group_of_one_masks_padding_rows(name: str) -> None:
    cls = getattr(megatron, name)
    real = torch.tensor([3], dtype=torch.int32)
    cls.set_real_token_count_tensor(real)
    dispatcher = cls(4, [0, 1, 2, 3], config())
    hidden, probs = preprocessed(dispatcher)
    given = dispatcher.routing_map
    before = given.clone()
    dispatcher.token_dispatch(hidden, probs)
    assert (dispatcher.routing_map[3:] == -1).all()
    assert torch.equal(dispatcher.routing_map[:3], before[:3])
    assert torch.equal(given, before), "the router's tensor was written"


def test_buffers_of_a_group_of_one_are_the_scalars() -> None:
    cls = megatron.NVLSAllGatherVDispatcher
    cls.allocate_buffers(16, 2, 8, None)
    assert cls._get_rsv_tensor() is None, "experts would write [G, H] where rows are [T, H]"
    dispatcher = cls(4, [0, 1, 2, 3], config())
    dispatcher.token_dispatch(*preprocessed(dispatcher))
    assert cls._step_metadata.tolist() == [5, 0, 5]
    assert (cls._valid_tokens().item(), cls._rank_token_offset().item(), cls._ep_max_tokens().item()) == (5, 0, 5)
    assert cls._valid_tokens().data_ptr() == cls._step_metadata.data_ptr()
    cls._delete_buffers()
    assert (cls._step_metadata, cls._symm_rsv, cls._symm_metadata, cls._real_token_count_tensor) == (None,) * 4


def test_router_output_squeezed_at_top_1_is_taken() -> None:
    dispatcher = megatron.NVLSAllGatherVDispatcher(4, [0, 1, 2, 3], config(moe_router_topk=1))
    hidden, routing, probs = rows(topk=1)
    assert dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(hidden, routing[:, 0], probs[:, 0]))[0].shape == (5, 8)


# --- wrong use ------------------------------------------------------------------------------------------------------


def test_real_token_count_tensor_is_checked() -> None:
    cls = megatron.NVLSAllGatherVDispatcher
    with pytest.raises(StateError, match="set_real_token_count_tensor"):
        cls.modify_real_token_count_for_mtp(1)
    with pytest.raises(DtypeError, match="int32"):
        cls.set_real_token_count_tensor(torch.zeros(1))
    with pytest.raises(ShapeError, match="one element"):
        cls.set_real_token_count_tensor(torch.zeros(2, dtype=torch.int32))


def test_overlap_must_be_on_for_shared_experts() -> None:
    with pytest.raises(ValueError, match="moe_shared_expert_overlap"):
        megatron.NVLSAllGatherVDispatcher(4, [0, 1, 2, 3], config()).set_shared_experts(torch.nn.Identity())


@pytest.mark.parametrize(
    ("routing", "error", "text"),
    [
        (torch.zeros(5, 4, dtype=torch.bool), ShapeError, r"dense, \[5, 2\]"),
        (torch.zeros(5, 2), DtypeError, "expert numbers"),
        (torch.full((5, 2), 4), UsageError, "4 experts"),
    ],
    ids=["sparse", "float", "too-large"],
)
def test_routing_is_checked(routing: torch.Tensor, error: type, text: str) -> None:
    dispatcher = megatron.NVLSAllGatherVDispatcher(4, [0, 1, 2, 3], config())
    hidden, _, probs = rows()
    with pytest.raises(error, match=text):
        dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(hidden, routing, probs))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, [0], config()), "num_local_experts is 0"),
        ((1, [], config()), "local_expert_indices has 0"),
        ((1, [0], SimpleNamespace()), "moe_router_topk"),
    ],
    ids=["no-experts", "no-indices", "no-topk"],
)
def test_constructor_is_checked(arguments: tuple, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        megatron.NVLSAllGatherVDispatcher(*arguments)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor"),
        ({"moe_router_padding_for_quantization": True}, "moe_router_padding_for_quantization"),
        ({"moe_router_dtype": None}, "moe_router_dtype"),
        ({"moe_router_dtype": "fp64"}, "--moe-router-dtype"),
        ({"inference_grouped_gemm_backend": "cutlass"}, "inference_grouped_gemm_backend"),
        ({"gated_linear_unit": True, "inference_grouped_gemm_backend": "flashinfer"}, "gated_linear_unit"),
        ({"batch_invariant_mode": True, "inference_grouped_gemm_backend": "flashinfer"}, "batch_invariant_mode"),
        (
            {"batch_invariant_mode": True, "expert_model_parallel_size": 2, "inference_moe_token_dispatcher_type": "nccl"},
            "inference_moe_token_dispatcher_type",
        ),
        ({"batch_invariant_mode": True, "fp8": "e4m3"}, "batch_invariant_mode"),
        ({"batch_invariant_mode": True, "moe_permute_fusion": True}, "moe_permute_fusion"),
        ({"batch_invariant_mode": True, "moe_pad_experts_for_cuda_graph_inference": True}, "moe_pad_experts"),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, "fp8_param"),
        (
            {"fp8": "e4m3", "fp8_recipe": "mxfp8", "fp8_param": True, "inference_grouped_gemm_backend": "vllm"},
            "inference_grouped_gemm_backend",
        ),
        (
            {
                "moe_shared_expert_overlap": True,
                "moe_shared_expert_intermediate_size": 8,
                "moe_token_dispatcher_type": "allgather",
            },
            "moe_shared_expert_overlap",
        ),
        (
            {"moe_shared_expert_overlap": True, "moe_latent_size": 4, "inference_moe_token_dispatcher_type": "nccl"},
            "moe_shared_expert_overlap",
        ),
        ({"num_moe_experts": 5, "expert_model_parallel_size": 2}, "num_moe_experts"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_config_that_excludes_itself(changes: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        config(**changes)
    fields = {"moe_router_topk": 2, "num_moe_experts": 4, "hidden_size": 8, "moe_router_dtype": "fp32"}
    fields |= {"transformer_impl": "inference_optimized", "moe_token_dispatcher_type": "alltoall"}
    with pytest.raises(ConfigError, match=field):
        megatron.NVLSAllGatherVDispatcher(2, [0, 1], SimpleNamespace(**{**fields, **changes}))


def test_config_of_another_implementation_is_not_judged() -> None:
    megatron.validate_config(config(transformer_impl="transformer_engine", moe_router_dtype=None))


@pytest.mark.parametrize("change", [{"combine_dtype": torch.float16}, {"combine_order": "random"}], ids="-".join)
def test_settings_are_checked(change: dict[str, Any]) -> None:
    before = megatron.configure()
    with pytest.raises(ConfigError, match=next(iter(change))):
        megatron.configure(**change)
    assert megatron.configure() == before
