"""Linear layers whose rows have the same bits whatever other rows there are, and the layers that are made of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenferry import EPGroup, MoEConfig, Workspace
from tokenferry.activations import Activation
from tokenferry.ambient import uncompiled
from tokenferry.errors import ConfigError, DtypeError
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.fixed_linear import FixedLinear, fixed_linear
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.shared_experts import SharedExperts, SharedExpertsConfig

H, LATENT, E, K, T = 32, 16, 6, 3, 11
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def rows_and_weight(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(T, 40, dtype=dtype), torch.randn(7, 40, dtype=dtype), torch.randn(7, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_multiplies_as_a_linear_layer(dtype: torch.dtype) -> None:
    rows, weight, bias = rows_and_weight(dtype)
    expected = F.linear(rows.double(), weight.double(), bias.double())
    got = fixed_linear(rows, weight, bias)
    assert got.dtype == dtype
    assert (got.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_sums_come_in_float32_if_asked_for() -> None:
    rows, weight, _ = rows_and_weight(torch.bfloat16)
    expected = F.linear(rows.double(), weight.double())
    got = fixed_linear(rows, weight, out_dtype=torch.float32)
    assert got.dtype == torch.float32
    assert (got.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("count", [1, 2, 5, 0])
def test_a_row_has_the_same_bits_among_any_others(count: int) -> None:
    rows, weight, bias = rows_and_weight(torch.float32)
    assert torch.equal(fixed_linear(rows[:count], weight, bias), fixed_linear(rows, weight, bias)[:count])


def test_rows_and_weight_have_one_dtype() -> None:
    with pytest.raises(DtypeError, match=r"rows are torch\.float32 but the weight is torch\.bfloat16"):
        fixed_linear(torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.bfloat16))


def test_the_module_takes_rows_of_any_shape() -> None:
    module = FixedLinear(40, 7)
    rows = torch.randn(2, 3, 40)
    torch.testing.assert_close(module(rows), F.linear(rows, module.weight, module.bias))


# --- a whole layer ----------------------------------------------------------------------------------------------------------

RULES = {"softmax": {"float32_logits": False}, "sigmoid-fp32": {"score_function": "sigmoid", "linear_bias": True}}


def parts(rules: dict[str, object] | None = None, **changes: nn.Module) -> dict[str, nn.Module]:
    """Of a batch-invariant layer, but for `changes`."""
    torch.manual_seed(2)
    routing = RouterConfig(hidden_size=H, num_experts=E, topk=K, **(rules or {}))
    experts = ExpertsConfig(hidden_size=LATENT, intermediate_size=24, num_experts=E)
    shared = SharedExpertsConfig(hidden_size=H, intermediate_size=40, output_gate=True, activation=Activation("silu"))
    made = {
        "router": Router(routing, dtype=torch.float32, batch_invariant=True),
        "experts": Experts(experts, range(E), dtype=torch.float32, batch_invariant=True),
        "shared_experts": SharedExperts(shared, dtype=torch.float32, batch_invariant=True),
        "latent_down": FixedLinear(H, LATENT, bias=False),
        "latent_up": FixedLinear(LATENT, H, bias=False),
    }
    return made | changes


@pytest.fixture
def workspace():
    config = MoEConfig(hidden_size=LATENT, num_experts=E, topk=K, dtype=torch.float32)
    with Workspace(config, EPGroup(), max_tokens_per_rank=T) as ws:
        yield ws


@pytest.mark.parametrize("rules", RULES)
def test_a_layer_of_such_parts_is_the_same_layer(workspace: Workspace, rules: str) -> None:
    made = parts(RULES[rules])
    layer = MoELayer(workspace, **made, batch_invariant=True)
    plain = {
        "router": Router(made["router"].config, dtype=torch.float32),
        "shared_experts": SharedExperts(made["shared_experts"].config, dtype=torch.float32),
    }
    for name, part in plain.items():
        part.load_state_dict(made[name].state_dict())
    other = MoELayer(workspace, **{**made, **plain})
    hidden = torch.randn(T, H)
    workspace.begin_step(T)
    torch.testing.assert_close(layer(hidden), other(hidden))


@pytest.mark.parametrize("part", ["router", "experts", "shared_experts", "latent_down", "latent_up"])
def test_every_part_has_to_be_made_for_it(workspace: Workspace, part: str) -> None:
    made = parts()
    if part.startswith("latent"):
        made[part] = nn.Linear(made[part].in_features, made[part].out_features)
    else:
        made[part].batch_invariant = False
    MoELayer(workspace, **made)
    with pytest.raises(ConfigError, match=f"batch_invariant is True, but {part} is not"):
        MoELayer(workspace, **made, batch_invariant=True)


def test_terms_have_to_be_summed_in_rank_order() -> None:
    config = MoEConfig(hidden_size=LATENT, num_experts=E, topk=K, dtype=torch.float32)
    in_any_order = Workspace(config, EPGroup(), max_tokens_per_rank=T, combine_order="any")
    with in_any_order as ws, pytest.raises(ConfigError, match="combine_order='rank'"):
        MoELayer(ws, **parts(), batch_invariant=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler uses what PyTorch deprecates
@pytest.mark.parametrize("part", ["linear", "router"])
def test_a_compiler_calls_it_as_it_is(part: str) -> None:
    """What comes before and after it is compiled, and nothing of it."""
    torch._dynamo.reset()
    routing = RouterConfig(hidden_size=LATENT, num_experts=E, topk=K)
    router = Router(routing, dtype=torch.float32, batch_invariant=True)
    call = {"linear": FixedLinear(LATENT, H, dtype=torch.float32), "router": lambda rows: router(rows)[0]}[part]
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _example: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(lambda rows: call(rows * 2) + 1, backend=backend)
    with torch.no_grad():
        for count in (3, 5, 8, 3):
            rows = torch.randn(count, LATENT)
            assert torch.equal(compiled(rows), call(rows * 2) + 1)
    assert set(seen) == {"<built-in function mul>", "<built-in function add>"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as above
def test_nothing_is_compiled_again_at_the_second_call() -> None:
    """A step that compiles keeps the other ranks waiting."""
    torch._dynamo.reset()
    twice = uncompiled(lambda rows: rows * 2)
    compiled = torch.compile(lambda rows: twice(rows + 1) + 1, backend="eager")
    rows = torch.ones(3)
    first = compiled(rows)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(rows), first)
