"""What promises a precision keeps it, bit for bit, through casts, moves and loading."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tokenferry as tf
from tokenferry.dispatched import FLOAT8
from tokenferry.errors import DeviceError, DtypeError
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig

CORRECTED = RouterConfig(hidden_size=8, num_experts=16, topk=2, score_function="sigmoid", score_correction_bias=True)
CORRECTION = 6.8 + torch.arange(16) / 1000
"""In bfloat16 all of them are one number."""


def router() -> Router:
    made = Router(CORRECTED, dtype=torch.float32)
    made.score_correction_bias.copy_(CORRECTION)
    return made


def float8_experts() -> Experts:
    torch.manual_seed(1)
    made = Experts(ExpertsConfig(hidden_size=128, intermediate_size=128, num_experts=2), range(2), dtype=torch.bfloat16)
    made.quantize()
    return made


CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "a-parent": lambda module: nn.Sequential(module).bfloat16()[0],
    "twice": lambda module: module.bfloat16().float(),
    "a-copy": lambda module: copy.deepcopy(module).bfloat16(),
    "to-like": lambda module: module.to(torch.empty(1, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_router_s_correction_keeps_its_bits_through_casts(cast: str) -> None:
    correction = CASTS[cast](router()).score_correction_bias
    assert correction.dtype == torch.float32
    assert torch.equal(correction, CORRECTION)


@pytest.mark.parametrize("cast", CASTS)
def test_float8_experts_keep_values_and_scales_through_casts(cast: str) -> None:
    before, after = float8_experts(), CASTS[cast](float8_experts())
    for name, dtype in before.kept_dtypes().items():
        assert getattr(after, name).dtype == dtype
        assert torch.equal(getattr(after, name).view(torch.uint8), getattr(before, name).view(torch.uint8)), name
    assert isinstance(after.up_proj, nn.Parameter)


def test_other_tensors_are_cast() -> None:
    assert router().to(torch.bfloat16).weight.dtype == torch.bfloat16
    plain = Experts(ExpertsConfig(hidden_size=8, intermediate_size=8, num_experts=2), range(2), dtype=torch.float32)
    assert plain.bfloat16().up_proj.dtype == torch.bfloat16


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_is_loaded_is_float32(dtype: torch.dtype, assign: bool) -> None:
    target = router().to(torch.bfloat16)
    state = {**target.state_dict(), "score_correction_bias": CORRECTION.to(dtype)}
    target.load_state_dict(state, assign=assign)
    assert target.score_correction_bias.dtype == torch.float32
    assert torch.equal(target.score_correction_bias, CORRECTION.to(dtype).float())


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_weights_of_another_dtype_cannot_be_loaded_into_float8_experts(assign: bool) -> None:
    experts = float8_experts()
    before = experts.up_proj.detach().clone()
    with pytest.raises(DtypeError, match=r"load before quantize\(\)"):
        experts.load_state_dict({**experts.state_dict(), "up_proj": torch.zeros(before.shape)}, assign=assign, strict=False)
    assert torch.equal(experts.up_proj.view(torch.uint8), before.view(torch.uint8)), "nothing was loaded"


@pytest.mark.parametrize("make", [router, float8_experts], ids=["router", "experts"])
def test_moves_and_memory_without_contents_take_them_along(make) -> None:
    module = make()
    dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    moved = module.to("meta")
    assert {tensor.device.type for tensor in moved.state_dict().values()} == {"meta"}
    emptied = moved.to_empty(device="cpu")
    assert {name: tensor.dtype for name, tensor in emptied.state_dict().items()} == dtypes
    assert FLOAT8 in dtypes.values() or torch.float32 in dtypes.values()


# --- what stands on an open workspace -------------------------------------------------------------------------------------


@pytest.fixture
def layer():
    config = tf.MoEConfig(hidden_size=8, num_experts=4, topk=2, dtype=torch.float32)
    with tf.Workspace(config, tf.EPGroup(device="cpu"), max_tokens_per_rank=4) as ws:
        routing = RouterConfig(hidden_size=8, num_experts=4, topk=2)
        experts = Experts(ExpertsConfig(hidden_size=8, intermediate_size=8, num_experts=4), range(4), dtype=torch.float32)
        yield MoELayer(ws, Router(routing, dtype=torch.float32), experts)


@pytest.mark.parametrize("cast", ["to", "half", "double", "a-parent"])
def test_a_layer_on_an_open_workspace_is_not_cast(layer: MoELayer, cast: str) -> None:
    with pytest.raises(DtypeError, match=r"a MoELayer cannot become torch\.\w+: its workspace was opened for torch\.float32"):
        CASTS[cast](layer)
    layer.workspace.begin_step(2)
    assert layer(torch.ones(2, 8)).dtype == torch.float32, "it works as before"


def test_nor_moved_away(layer: MoELayer) -> None:
    with pytest.raises(DeviceError, match="a MoELayer cannot move to meta: its workspace was opened on cpu"):
        layer.to("meta")


@pytest.mark.parametrize("cast", ["to", "half", "double"])
def test_nor_are_its_experts_alone(layer: MoELayer, cast: str) -> None:
    with pytest.raises(DtypeError, match="the experts of a layer cannot become"):
        CASTS[cast](layer.experts)


@pytest.mark.parametrize("leave", [copy.deepcopy, lambda experts: pickle.loads(pickle.dumps(experts))], ids=["copy", "pickle"])
def test_a_copy_of_its_experts_belongs_to_no_workspace(layer: MoELayer, leave) -> None:
    assert leave(layer.experts).half().up_proj.dtype == torch.float16
    assert layer.experts.up_proj.dtype == torch.float32


def test_once_the_workspace_is_closed_it_may_be_cast(layer: MoELayer) -> None:
    layer.workspace.close()
    assert layer.bfloat16().experts.up_proj.dtype == torch.bfloat16


def test_a_conversion_to_what_it_is_already_changes_nothing(layer: MoELayer) -> None:
    assert layer.to("cpu").float().to(torch.float32) is layer
