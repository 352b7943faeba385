"""Our fused experts behind Megatron-Core's two entries, in the interpreter: called by its module, which keeps its own text."""

import importlib.util
import warnings
from types import SimpleNamespace

import pytest
import torch

import tokenferry as tf
from fake_megatron import place_fake_megatron
from megatron_experts_work import FIRST, TOLERANCE, Call, error, make_call, with_valid
from tokenferry.integrations import megatron
from tokenferry.integrations.megatron.known_versions import EXPERT_ENTRIES, EXPERTS
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}
FORWARDS = ("_vllm_forward", "_mcore_fused_moe_forward")


def by_entry(modules, name: str, call: Call, kind, **extra) -> torch.Tensor:
    return getattr(modules[EXPERTS], name)(**call.arguments(kind), **extra)


def contract(group: tf.EPGroup) -> dict[str, object]:
    """What the two entries give, with a stand-in for Megatron that would answer with a text."""
    modules, found = place_fake_megatron(), {}
    kinds = modules[EXPERT_ENTRIES].ActivationType
    with megatron.install(experts=True) as installation:
        for kind in (kinds.SQUARED_RELU, kinds.SWIGLU):
            call = make_call(gated=kind is kinds.SWIGLU)
            for name in ("vllm_fused_moe", "mcore_fused_moe"):
                out = by_entry(modules, name, call, kind)
                found[f"{name} {kind.value}"] = (out.dtype, tuple(out.shape), error(out, call, kind.value))
        call = make_call()
        for dtype in (torch.float32, torch.bfloat16):
            given = torch.full((12, 24), 7.0, dtype=dtype)
            out = by_entry(modules, "vllm_fused_moe", call, kinds.SQUARED_RELU, out=given, num_tokens_hint=1)
            found[f"out {dtype}"] = (out is given, bool((given[9:] == 7).all()), error(out, call, "squared_relu"))
        none = with_valid(call, 0)
        given = torch.full((12, 24), 7.0)
        by_entry(modules, "vllm_fused_moe", none, kinds.SQUARED_RELU, out=given)
        found["nothing valid"] = bool((given == 7).all())
        call.routing[:] = -1
        found["no expert"] = by_entry(modules, "vllm_fused_moe", call, kinds.SQUARED_RELU)[:9].abs().max().item()
        found["decisions"] = list(installation.experts.decisions)
        found["scratch"] = installation.experts.nbytes > 0
    found["after undo"] = installation.experts.nbytes
    found["theirs was called"] = len(modules[EXPERT_ENTRIES].calls)
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    return run_ranks(contract, 1, env=INTERPRETER)[0]


@pytest.mark.parametrize("kind", ["squared_relu", "swiglu"])
@pytest.mark.parametrize("name", ["vllm_fused_moe", "mcore_fused_moe"])
def test_an_entry_gives_float32_rows_within_the_tolerance(found, name: str, kind: str) -> None:
    dtype, shape, wrong = found[f"{name} {kind}"]
    assert (dtype, shape) == (torch.float32, (12, 24))
    assert wrong <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entry_writes_the_valid_rows_of_out_alone(found, dtype: torch.dtype) -> None:
    is_out, kept, wrong = found[f"out {dtype}"]
    assert (is_out, kept) == (True, True)
    assert wrong <= TOLERANCE


def test_without_valid_rows_nothing_is_written(found) -> None:
    assert found["nothing valid"]


def test_rows_without_an_expert_are_zero(found) -> None:
    assert found["no expert"] == 0.0


def test_ours_served_every_call_and_said_so(found) -> None:
    assert found["theirs was called"] == 0
    assert len(found["decisions"]) == 4
    assert all("tokenferry's fused_moe serves" in text for text in found["decisions"])


def test_undo_frees_the_scratch(found) -> None:
    assert (found["scratch"], found["after undo"]) == (True, 0)


# --- megatron-core's own module ---------------------------------------------------------------------------------------


def by_megatrons_module(group: tf.EPGroup) -> dict[str, object]:
    """Its `InferenceGroupedMLP` calls the entries, as in a model: two layers of other weights, then the same again after undo."""
    warnings.simplefilter("ignore")
    from megatron.core.inference.moe import ActivationType
    from megatron.core.transformer.moe import experts

    def layer(call: Call):
        module = experts.InferenceGroupedMLP.__new__(experts.InferenceGroupedMLP)
        torch.nn.Module.__init__(module)
        module._fc1_weight, module._fc2_weight, module.num_local_experts = call.fc1, call.fc2, call.fc1.shape[0]
        module.ep_group = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
        module.config = SimpleNamespace(inference_moe_disable_fused_quant_kernels=False)
        module._mcore_activation_type, module._nvls_dispatcher = ActivationType.SQUARED_RELU, False
        return module

    wrong = {}
    original = experts.vllm_fused_moe
    with megatron.install(experts=True) as installation:
        for number, sizes in enumerate(({}, {"hidden_size": 40, "intermediate_size": 12})):
            call = make_call(num_local=FIRST, seed=number, **sizes)  # rank 1 of 2: its experts begin at FIRST
            experts.InferenceAllGatherDispatcherBase._valid_tokens_tensor = call.valid
            experts.InferenceAllGatherDispatcherBase._host_valid_tokens_estimate = 9
            for forward in FORWARDS:
                out, bias = getattr(layer(call), forward)(call.hidden, call.probs, call.routing)
                assert bias is None
                wrong[f"{forward} {number}"] = error(out, call, "squared_relu")
        assert all("tokenferry's fused_moe serves" in text for text in installation.experts.decisions)
    assert experts.vllm_fused_moe is original
    return {"version": installation.version, "wrong": wrong}


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed (it needs Python 3.12)")
def test_megatrons_own_module_runs_on_our_experts() -> None:
    [found] = run_ranks(by_megatrons_module, 1, env={**INTERPRETER, "NO_VCS_VERSION": "1"}, timeout_s=120.0)
    assert found["version"].startswith(megatron.KNOWN_VERSIONS)
    assert max(found["wrong"].values()) <= TOLERANCE
