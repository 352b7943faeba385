"""Which experts of transformers our kernels take over, on the module's own parameters, and what they compute then."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from foreign_experts import FAMILIES, HIDDEN, INTERMEDIATE, NOT_SERVED, NUM_EXPERTS, Family, skip_what_is_newer, some_choices
from test_experts import gathered
from tokenferry.integrations.transformers.kernel_experts import KernelExperts, NotServed, known_activation

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sums_are_those_of_the_models_own_function(name: str) -> None:
    """Without a scratch the library's operators do the work, on the same views; the interpreter tests run the kernels."""
    skip_what_is_newer(name)
    module = FAMILIES[name].make()
    kernels = KernelExperts(module, range(NUM_EXPERTS), torch.float32)
    hidden, idx, weights = some_choices()
    summed = kernels(gathered(hidden, idx.int(), weights), torch.empty_like(hidden))
    torch.testing.assert_close(summed, module(hidden, idx, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_are_views(name: str) -> None:
    module = FAMILIES[name].make()
    weights = KernelExperts(module, range(NUM_EXPERTS), torch.float32).borrowed.weights
    up = module.gate_up_proj if module.has_gate else module.up_proj
    assert (weights.up_proj.data_ptr(), weights.down_proj.data_ptr()) == (up.data_ptr(), module.down_proj.data_ptr())
    assert weights.up_proj.shape[1:] == ((2 if module.has_gate else 1) * INTERMEDIATE, HIDDEN)


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_not_known_is_refused_with_the_reason(name: str) -> None:
    family, reason = NOT_SERVED[name]
    with pytest.raises(NotServed, match=reason):
        KernelExperts(family.make(), range(NUM_EXPERTS), torch.float32)


def test_rows_of_another_dtype_are_refused() -> None:
    with pytest.raises(NotServed, match=r"hidden is torch\.bfloat16 but the experts are torch\.float32"):
        KernelExperts(Family().make(), range(NUM_EXPERTS), torch.bfloat16)


def test_parameters_that_ours_does_not_know_are_refused() -> None:
    module = Family().make()
    module.scale = nn.Parameter(torch.ones(NUM_EXPERTS))
    with pytest.raises(NotServed, match=r"down_proj, gate_up_proj, scale.*ours takes down_proj, gate_up_proj"):
        KernelExperts(module, range(NUM_EXPERTS), torch.float32)


def test_an_adapter_in_the_place_of_a_parameter_is_noticed() -> None:
    module = Family().make()
    kernels = KernelExperts(module, range(NUM_EXPERTS), torch.float32)
    assert kernels.holds
    torch.nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Identity())
    assert not kernels.holds


def test_gates_are_told_apart_by_their_results() -> None:
    clamped = known_activation(Family("clamped", interleaved=True).make())
    assert (clamped.name, clamped.interleaved, clamped.limit, clamped.alpha) == ("clamped_swiglu", True, 0.5, 1.702)
    limited = known_activation(Family("limited").make())
    assert (limited.name, limited.interleaved, limited.limit) == ("limited_swiglu", False, 0.7)
    assert known_activation(Family(act="gelu").make()).name == "geglu"
    assert known_activation(Family(act="gelu_pytorch_tanh").make()).name == "geglu_tanh"


# --- float8 ---------------------------------------------------------------------------------------------------------------


def float8_experts(**changes: Any) -> Any:
    """transformers' own module for checkpoints like DeepSeek's, [E, 2I, H] = [4, 512, 128], with random weights and scales."""
    from transformers import MixtralConfig
    from transformers.integrations import use_experts_implementation
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts

    config = MixtralConfig(hidden_size=128, intermediate_size=256, num_local_experts=NUM_EXPERTS)
    config._experts_implementation = "grouped_mm"
    decorated = use_experts_implementation(experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)(type("Float8", (FP8Experts,), {}))
    torch.manual_seed(3)
    module = decorated(config, **({"block_size": (128, 128)} | changes))
    for name, parameter in module.named_parameters():
        random = torch.rand(parameter.shape) + 0.5 if name.endswith("scale_inv") else torch.randn(parameter.shape)
        parameter.data.copy_(random.to(parameter.dtype))
    return module.requires_grad_(False)


def test_float8_experts_stay_float8() -> None:
    module = float8_experts()
    kernels = KernelExperts(module, range(NUM_EXPERTS), torch.bfloat16)
    _, idx, weights = some_choices()
    hidden = torch.randn(len(idx), 128, dtype=torch.bfloat16)
    summed = kernels(gathered(hidden, idx.int(), weights), torch.empty(hidden.shape))
    expected = torch.zeros(hidden.shape)
    for row, (ids, shares) in enumerate(zip(idx.tolist(), weights.tolist(), strict=True)):
        for expert, share in zip(ids, shares, strict=True):
            gate, up = (dequantized(module, "gate_up_proj", expert) @ hidden[row].float()).chunk(2)
            expected[row] += share * (dequantized(module, "down_proj", expert) @ (torch.nn.functional.silu(gate) * up))
    assert kernels.borrowed.weights.up_proj.dtype == torch.float8_e4m3fn
    assert (summed - expected).abs().max() < 0.1 * expected.abs().max()  # rows are rounded to float8 on their way in


def dequantized(module: Any, name: str, expert: int) -> torch.Tensor:
    scale = getattr(module, f"{name}_scale_inv")[expert]
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return getattr(module, name)[expert].float() * spread


@pytest.mark.parametrize("changes", [{"block_size": (64, 64)}, {"activation_scheme": "static"}], ids=["blocks", "static"])
def test_float8_with_other_scales_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(NotServed, match="other scales than one for each 128 x 128"):
        KernelExperts(float8_experts(**changes), range(NUM_EXPERTS), torch.bfloat16)


def test_on_cpus_the_models_own_function_stays(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    import tokenferry as tf
    from tokenferry.testing.tiny_models import make_tiny
    from transformers_work import load

    with caplog.at_level(logging.WARNING, logger="tokenferry"):
        model = load(make_tiny("mixtral", tmp_path), tf.EPGroup(device="cpu"))
    assert not any(layer.kernels for layer in model.expert_parallel.layers)
    assert not [record for record in caplog.records if "own expert function" in record.getMessage()]
    model.expert_parallel.close()
