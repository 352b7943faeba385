"""`combine_output=float32`: token_combine leaves its sums as they are, and the layer's rows are rounded once, after the shared
expert's output is added. Newer tests of Megatron-Core want that; its releases round first."""

import itertools

import pytest
import torch

import tokenferry as tf
from megatron_scenarios import RecordingShared
from megatron_work import NCCL, NVLS, Shape, W, dispatch, same
from tokenferry.integrations import megatron
from tokenferry.testing import run_ranks
from tokenferry.testing.data import RankInputs

pytestmark = pytest.mark.ranks

SHAPE, TOKENS = Shape(2), (3, 2)
WIRES = {"float32-wire": torch.float32, "bfloat16-wire": torch.bfloat16}
CASES = {f"{cls.__name__}-{wire}": (cls, dtype) for cls, (wire, dtype) in itertools.product((NVLS, NCCL), WIRES.items())}


def layer_of(group: tf.EPGroup, cls: type):
    if cls is NCCL:
        NCCL._use_allgather_v = True
        return SHAPE.make(NCCL, megatron.ProcessGroups(ep=group))
    NVLS.allocate_buffers(W, SHAPE.topk, SHAPE.hidden_size, group)
    overlap = {"moe_shared_expert_overlap": True, "moe_shared_expert_intermediate_size": 8}
    layer = SHAPE.make(NVLS, megatron.ProcessGroups(ep=group), **overlap)
    layer.set_shared_experts(RecordingShared(group.device))
    return layer


def check_unrounded(group: tf.EPGroup, cls: type, wire: torch.dtype, inputs: list[RankInputs]) -> None:
    layer, own = layer_of(group, cls), inputs[group.rank]
    hidden, _ = dispatch(layer, own)
    partial = torch.full((hidden.shape[0], SHAPE.hidden_size), float("nan"))
    partial[: sum(TOKENS)] = own.partial
    combined = layer.token_combine(layer.combine_preprocess(partial.to(hidden.device)))
    want = tf.reference.combine([i.partial for i in inputs], TOKENS, wire, torch.float32)[group.rank]
    same("sums", combined, want)
    shared = own.hidden.float() * 2 if cls is NVLS else 0.0
    same("rows", layer.combine_postprocess(combined).squeeze(1), (want + shared).bfloat16())


def run_unrounded(group: tf.EPGroup, transport: str) -> list[str]:
    for name, (cls, wire) in CASES.items():
        megatron.configure(transport=transport, combine_dtype=wire, combine_output=torch.float32)
        check_unrounded(group, cls, wire, SHAPE.inputs(TOKENS, seed=len(name)))
        megatron.close()
    return list(CASES)


def test_sums_stay_float32_until_the_shared_experts_are_added() -> None:
    assert run_ranks(run_unrounded, 2, "collective") == [list(CASES)] * 2


@pytest.mark.interpreter
def test_sums_stay_float32_on_the_symmetric_kernels() -> None:
    assert run_ranks(run_unrounded, 2, "p2p", env={"TRITON_INTERPRET": "1"}) == [list(CASES)] * 2


def run_settings_changed_since(group: tf.EPGroup) -> list[torch.dtype]:
    """As undoing `install(combine_output=torch.float32)` does, with layers and buffers that go on."""
    megatron.configure(combine_output=torch.float32)
    layer, own = layer_of(group, NVLS), SHAPE.inputs(TOKENS)[group.rank]
    megatron.configure(combine_output=torch.bfloat16)
    hidden, _ = dispatch(layer, own)
    combined = layer.token_combine(torch.zeros(hidden.shape[0], SHAPE.hidden_size))
    return [combined.dtype, layer.combine_postprocess(combined).dtype]


def test_rows_are_rounded_also_where_the_setting_was_taken_back_since() -> None:
    assert run_ranks(run_settings_changed_since, 2) == [[torch.float32, torch.bfloat16]] * 2


def run_alone(group: tf.EPGroup) -> list[torch.dtype]:
    megatron.configure(combine_output=torch.float32)
    dtypes = []
    for cls in (NVLS, NCCL):
        layer, own = Shape(1).make(cls, megatron.ProcessGroups(ep=group)), Shape(1).inputs((5,))[0]
        dispatch(layer, own)
        combined = layer.token_combine(own.partial)
        same("sums", combined, own.partial)
        dtypes += [combined.dtype, layer.combine_postprocess(combined).dtype]
    return dtypes


def test_a_group_of_one_does_the_same() -> None:
    assert run_ranks(run_alone, 1) == [[torch.float32, torch.bfloat16] * 2]


# --- the workspace's own setting ------------------------------------------------------------------------------------------


def run_workspace(group: tf.EPGroup, transport: str) -> torch.dtype:
    config = tf.MoEConfig(hidden_size=16, num_experts=4, topk=2)
    inputs = SHAPE.inputs(TOKENS, payload="hostile")
    own = inputs[group.rank]
    with tf.Workspace(config, group, max_tokens_per_rank=8, transport=transport, result_dtype=torch.float32) as workspace:
        layer = workspace.dispatcher()
        workspace.begin_step(TOKENS[group.rank])
        got = layer.dispatch(own.hidden, own.topk_idx, own.topk_weights)
        partial = torch.full(got.hidden.shape, float("nan"))
        partial[: sum(TOKENS)] = own.partial
        combined = layer.combine(partial)
    want = tf.reference.combine([i.partial for i in inputs], TOKENS, torch.bfloat16, torch.float32)
    same("combined", combined, want[group.rank])
    return combined.dtype


@pytest.mark.parametrize("transport", ["collective", pytest.param("p2p", marks=pytest.mark.interpreter)])
def test_a_workspace_returns_the_dtype_that_was_asked_for(transport: str) -> None:
    env = {} if transport == "collective" else {"TRITON_INTERPRET": "1"}
    assert run_ranks(run_workspace, 2, transport, env=env) == [torch.float32] * 2


def run_two_minds(group: tf.EPGroup) -> str:
    config = tf.MoEConfig(hidden_size=16, num_experts=4, topk=2)
    dtype = torch.float32 if group.rank else None
    with pytest.raises(tf.ConfigError) as raised:
        tf.Workspace(config, group, max_tokens_per_rank=8, transport="collective", result_dtype=dtype)
    return str(raised.value)


def test_ranks_that_ask_for_different_dtypes_are_told() -> None:
    assert all("result_dtype" in text for text in run_ranks(run_two_minds, 2))
