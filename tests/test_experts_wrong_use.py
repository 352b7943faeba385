"""What experts, their weights, their scratch and their activation refuse, and with which words."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from test_experts import LOCAL, Case, gathered
from tokenferry.activations import Activation
from tokenferry.errors import ConfigError, DeviceError, DtypeError, ShapeError
from tokenferry.experts import (
    Experts,
    ExpertsConfig,
    ExpertScratch,
    ExpertWeights,
    apply_experts,
)


def test_weights_of_another_shape_are_refused():
    experts, _ = Case().build()
    with pytest.raises(ShapeError, match=r"up_proj is \[6, 48, 32\] .* holds \[3, 48, 32\]; give 7 \(all\) or 3"):
        experts.load(torch.zeros(6, 48, 32), torch.zeros(6, 32, 24))


@pytest.mark.parametrize("bias", [True, False])
def test_biases_come_with_their_setting(bias):
    experts, _ = Case(bias=bias).build()
    biases = () if bias else (torch.zeros(3, 48), torch.zeros(3, 32))
    with pytest.raises(ShapeError, match=f"but config.bias is {bias}"):
        experts.load(torch.zeros(3, 48, 32), torch.zeros(3, 32, 24), *biases)


@pytest.mark.parametrize("expert_range", [range(0), range(5, 8), range(0, 6, 2), range(-1, 2)], ids=str)
def test_an_impossible_range_is_refused(expert_range):
    with pytest.raises(ConfigError, match=r"a part of range\(0, 7\) without gaps"):
        Experts(ExpertsConfig(hidden_size=4, intermediate_size=4, num_experts=7), expert_range)


def test_experts_take_three_dtypes():
    with pytest.raises(DtypeError, match=r"got torch\.float64"):
        Experts(ExpertsConfig(hidden_size=4, intermediate_size=4, num_experts=7), range(7), dtype=torch.float64)


WRONG_CALLS = {
    "hidden of another size": ({"hidden": torch.zeros(19, 33)}, ShapeError, r"\[R, 32\] .* got \[19, 33\]"),
    "hidden of another dtype": (
        {"hidden": torch.zeros(19, 32).half()},
        DtypeError,
        r"float16 but the experts are torch\.float32",
    ),
    "hidden elsewhere": ({"hidden": torch.zeros(19, 32, device="meta")}, DeviceError, "on meta but the experts are on cpu"),
    "out of another size": ({"out": torch.zeros(18, 32)}, ShapeError, r"out is \[18, 32\] but there are \[19, 32\]"),
    "out of another dtype": ({"out": torch.zeros(19, 32).double()}, DtypeError, r"got torch\.float64"),
    "out elsewhere": ({"out": torch.zeros(19, 32, device="meta")}, DeviceError, "out is on meta but hidden is on cpu"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_operands_that_do_not_fit_are_refused(case):
    changes, error, message = WRONG_CALLS[case]
    experts, rows = Case().build()
    with pytest.raises(error, match=message):
        experts(gathered(changes.get("hidden", rows.hidden), rows.topk_idx, rows.topk_weights), out=changes.get("out"))


def test_parameters_that_are_put_in_their_place_are_checked_too():
    """Weights that were checked once are not checked at each call."""
    experts, rows = Case().build()
    first = experts(rows)
    experts.up_proj = torch.nn.Parameter(torch.zeros_like(experts.up_proj), requires_grad=False)
    assert first.any() and not experts(rows).any()
    experts.up_proj.data = torch.zeros(3, 24, 32)
    with pytest.raises(ShapeError, match=r"up_proj must be \[3, 48, 32\] for swiglu"):
        experts(rows)
    experts.up_proj = torch.nn.Parameter(torch.zeros(3, 24, 32), requires_grad=False)
    with pytest.raises(ShapeError, match=r"up_proj must be \[3, 48, 32\] for swiglu"):
        experts(rows)


def test_a_copy_has_its_own_weights():
    experts, rows = Case().build()
    expected = experts(rows)
    copied = copy.deepcopy(experts)
    experts.up_proj.zero_()
    assert torch.equal(copied(rows), expected)


def test_a_gateless_up_proj_is_refused_where_there_is_a_gate():
    weights = ExpertWeights(up_proj=torch.zeros(3, 24, 32), down_proj=torch.zeros(3, 32, 24))
    with pytest.raises(ShapeError, match=r"up_proj must be \[3, 48, 32\] for swiglu"):
        apply_experts(Case().rows(), weights, 0, Activation("swiglu"))


FLOAT8 = torch.zeros(3, 32, 24).to(torch.float8_e4m3fn)
WRONG_WEIGHTS = {
    "bias of another shape": ({"up_bias": torch.zeros(3, 47)}, ShapeError, r"up_bias must be \[3, 48\] .* got \[3, 47\]"),
    "bias elsewhere": (
        {"down_bias": torch.zeros(3, 32, device="meta")},
        DeviceError,
        "down_bias is on meta but down_proj is on cpu",
    ),
    "a scale too many": ({"up_scale": torch.ones(3, 1, 1)}, DtypeError, r"up_proj is torch\.float32 but there is up_scale"),
    "a scale missing": ({"down_proj": FLOAT8}, DtypeError, r"down_proj is torch\.float8_e4m3fn but there is no down_scale"),
    "a scale of another shape": (
        {"down_proj": FLOAT8, "down_scale": torch.ones(3, 2, 1)},
        ShapeError,
        r"contiguous float32 \[3, 1, 1\] for down_proj \[3, 32, 24\], got torch\.float32 \[3, 2, 1\]",
    ),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_one_another_are_refused(case):
    changes, error, message = WRONG_WEIGHTS[case]
    experts, rows = Case().build()
    with pytest.raises(error, match=message):
        apply_experts(rows, dataclasses.replace(experts.weights, **changes), LOCAL.start, experts.config.activation)


def test_a_scratch_is_for_gpus():
    with pytest.raises(DeviceError, match="expert kernels need CUDA"):
        ExpertScratch("cpu")
    with pytest.raises(ConfigError, match="max_bytes must be at least 1, got 0"):
        ExpertScratch("cpu", max_bytes=0)


WRONG_ACTIVATIONS = {
    "unknown": ({"name": "tanh"}, "activation must be one of .*; got 'tanh'"),
    "interleaved without a gate": ({"name": "relu", "interleaved": True}, "relu has no gate"),
    "no room between the limits": ({"name": "clamped_swiglu", "limit": 0.0}, r"limit must be positive, got 0\.0"),
}


@pytest.mark.parametrize("case", WRONG_ACTIVATIONS)
def test_an_impossible_activation_is_refused(case):
    settings, message = WRONG_ACTIVATIONS[case]
    with pytest.raises(ConfigError, match=message):
        Activation(**settings)
