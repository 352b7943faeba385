"""`install(experts=True)`: who serves Megatron-Core's fused experts, decided by configuration and said once. Who computes what is
tested in interpreter/test_megatron_experts.py."""

import inspect
import logging
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fake_megatron import BATCH_INVARIANT, fake_megatron
from megatron_classes import fresh_classes
from megatron_experts_work import Call, make_call
from tokenferry.experts import ExpertScratch
from tokenferry.integrations import megatron
from tokenferry.integrations.megatron.expert_entries import reason_against
from tokenferry.integrations.megatron.known_versions import EXPERT_ENTRIES, EXPERTS

__all__ = ["fake_megatron", "fresh_classes"]  # fixtures

ENTRIES = ("mcore_fused_moe", "vllm_fused_moe")


@pytest.fixture
def kernels_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if CPU tensors were on a GPU that serves."""
    monkeypatch.setattr(ExpertScratch, "serves", staticmethod(lambda device: True))


@pytest.mark.parametrize("name", ENTRIES)
def test_both_entries_are_replaced_wherever_they_were_imported(fake_megatron: dict[str, ModuleType], name: str) -> None:
    original = getattr(fake_megatron[EXPERTS], name)
    with megatron.install(experts=True) as installation:
        replaced = getattr(fake_megatron[EXPERTS], name)
        assert replaced is getattr(fake_megatron[EXPERT_ENTRIES], name) is not original
        assert {f"{module}.{name}" for module in (EXPERTS, EXPERT_ENTRIES)} <= set(installation.replaced)
        own = [parameter.name for parameter in inspect.signature(replaced, follow_wrapped=False).parameters.values()]
        assert own == list(inspect.signature(original).parameters)
    assert getattr(fake_megatron[EXPERTS], name) is original


def test_experts_stay_megatrons_unless_asked_for(fake_megatron: dict[str, ModuleType]) -> None:
    original = fake_megatron[EXPERTS].vllm_fused_moe
    with megatron.install() as installation:
        assert installation.experts is None
        assert fake_megatron[EXPERTS].vllm_fused_moe is original


# --- who serves -------------------------------------------------------------------------------------------------------


class Mxfp8:
    """Weights of another kind, as Megatron's MXFP8Tensor: no torch.Tensor, and without its dtype."""


def changed(**changes) -> dict:
    call = make_call()
    operands = {
        "hidden": call.hidden, "fc1": call.fc1, "fc2": call.fc2, "activation": "squared_relu", "valid": call.valid, "out": None,
        "is_batch_invariant": False,
    }  # fmt: skip
    return {**operands, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": SimpleNamespace(value="swiglu")},
        {"out": torch.zeros(12, 24)},
        {"out": torch.zeros(12, 24, dtype=torch.bfloat16)},
        {"fc1": torch.nn.Parameter(make_call().fc1, requires_grad=False)},
    ],
    ids=["squared_relu", "swiglu-by-enum", "float32-out", "bfloat16-out", "parameters"],
)
def test_what_ours_serves(kernels_run_here, changes: dict) -> None:
    assert reason_against(**changed(**changes)) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": "geglu"}, "ours has squared_relu and swiglu, not 'geglu'"),
        ({"fc1": Mxfp8()}, "weights are Mxfp8"),
        ({"fc2": Mxfp8()}, "weights are Mxfp8"),
        ({"fc1": torch.zeros(3, 20, 24)}, "weights are torch.float32"),
        ({"hidden": torch.zeros(12, 24)}, "hidden states are torch.float32"),
        ({"is_batch_invariant": True}, "batch-invariant mode promises the bits of its own training forward"),
        ({"valid": torch.tensor([3])}, "valid_tokens is torch.int64"),
        ({"valid": None}, "valid_tokens is NoneType"),
        ({"out": torch.zeros(12, 24, dtype=torch.float16)}, "out is torch.float16"),
    ],
    ids=[
        "activation",
        "mxfp8-fc1",
        "mxfp8-fc2",
        "float32-weights",
        "float32-rows",
        "batch-invariant",
        "count",
        "no-count",
        "out",
    ],
)
def test_what_megatrons_own_go_on_with(kernels_run_here, changes: dict, reason: str) -> None:
    assert reason in reason_against(**changed(**changes))


def test_without_a_gpu_megatrons_own_go_on() -> None:
    assert "need CUDA" in reason_against(**changed())


# --- what Megatron's own get, and what is said ----------------------------------------------------------------------------


def grouped_mlp(modules: dict[str, ModuleType], call: Call, kind, **extra):
    """Megatron's module, which calls the entries by the names in its own module."""
    layer = modules[EXPERTS].InferenceGroupedMLP()
    layer.rest = (call.fc1, call.fc2, {"activation_type": kind, "num_local_experts": 3, "local_expert_start": 2,
                                       "valid_tokens": call.valid, **extra})  # fmt: skip
    return layer


@pytest.mark.parametrize(
    ("forward", "extra"),
    [
        ("_vllm_forward", {"out": None, "num_tokens_hint": 5}),
        ("_mcore_fused_moe_forward", {"out": None, "disable_fused_quant_kernels": True}),
    ],
    ids=["vllm", "torch"],
)
def test_megatrons_own_get_every_argument(fake_megatron, kernels_run_here, forward: str, extra: dict) -> None:
    call, modules = make_call(), fake_megatron
    kind = modules[EXPERT_ENTRIES].ActivationType.GEGLU
    with megatron.install(experts=True):
        layer = grouped_mlp(modules, call, kind, **extra)
        assert getattr(layer, forward)(call.hidden, call.probs, call.routing) == "Megatron's"
    [(_, arguments)] = modules[EXPERT_ENTRIES].calls
    assert arguments == {**call.arguments(kind), **extra}


def test_each_reason_is_said_once(fake_megatron, kernels_run_here, caplog: pytest.LogCaptureFixture) -> None:
    call, modules = make_call(), fake_megatron
    kind = modules[EXPERT_ENTRIES].ActivationType
    with caplog.at_level(logging.INFO), megatron.install(experts=True) as installation:
        for _ in range(3):
            modules[EXPERTS].vllm_fused_moe(**call.arguments(kind.GEGLU))
        modules[BATCH_INVARIANT].mode = True
        for _ in range(2):
            modules[EXPERTS].vllm_fused_moe(**call.arguments(kind.SQUARED_RELU))
        said = [record.message for record in caplog.records if record.name.endswith("expert_entries")]
        assert said == installation.experts.decisions
    assert [text.split(": ")[1].split(", since")[0] for text in installation.experts.decisions] == [
        "Megatron's own vllm_fused_moe serves"
    ] * 2
    assert installation.experts.decisions[0].startswith("geglu experts in torch.bfloat16 on cpu")


def test_settings_bound_the_scratch(fake_megatron, kernels_run_here) -> None:
    with megatron.install(experts=True, expert_scratch_bytes=12345) as installation:
        scratches = [installation.experts._scratch(torch.device("cpu"), out) for out in (None, torch.zeros(1))]
        assert [scratch.max_bytes for scratch in scratches] == [12345, 12345]


def test_one_scratch_a_device_until_closed_or_undone(fake_megatron, kernels_run_here) -> None:
    device, out = torch.device("cpu"), torch.zeros(1)
    with megatron.install(experts=True) as installation:
        experts = installation.experts
        first = experts._scratch(device, out)
        assert experts._scratch(device, out) is first
        megatron.close()
        assert (experts._scratches, experts.nbytes) == ({}, 0)
        assert experts._scratch(device, out) is not first
    assert experts._scratches == {}
