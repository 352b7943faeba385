"""The whole layer on one rank: against the float64 oracle, its order of events, and what it refuses. More ranks: tests/ranks."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from plain_moe import plain_moe, plain_shared
from tokenferry import MoEConfig
from tokenferry.activations import Activation
from tokenferry.errors import CapacityError, ConfigError, DeviceError, DtypeError, ShapeError
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.groups import EPGroup
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.shared_experts import SharedExperts, SharedExpertsConfig
from tokenferry.testing.numeric import same_bits
from tokenferry.workspace import Workspace

H, LATENT, E, K = 32, 16, 6, 3


@dataclass(frozen=True)
class Parts:
    """What a layer is made of, on one rank, in float32 unless said."""

    router: Router
    experts: Experts
    shared: SharedExperts
    down: nn.Linear
    up: nn.Linear
    hidden: torch.Tensor = field(repr=False)

    @staticmethod
    def make(latent: bool, dtype: torch.dtype = torch.float32, num_tokens: int = 11) -> Parts:
        torch.manual_seed(2)
        experts = ExpertsConfig(hidden_size=LATENT if latent else H, intermediate_size=24, num_experts=E)
        return Parts(
            router=Router(RouterConfig(hidden_size=H, num_experts=E, topk=K, renormalize=True), dtype=dtype),
            experts=Experts(experts, range(E), dtype=dtype),
            shared=SharedExperts(SharedExpertsConfig(hidden_size=H, intermediate_size=40, output_gate=True), dtype=dtype),
            down=nn.Linear(H, LATENT, bias=False, dtype=dtype),
            up=nn.Linear(LATENT, H, bias=False, dtype=dtype),
            hidden=torch.randn(num_tokens, H).to(dtype),
        )

    def optional(self, shared: bool, latent: bool) -> dict[str, nn.Module]:
        return ({"shared_experts": self.shared} if shared else {}) | (
            {"latent_down": self.down, "latent_up": self.up} if latent else {}
        )


@pytest.fixture
def open_workspace():
    """Workspaces of a group of one, closed at the end."""
    opened = []

    def open_one(hidden_size=H, dtype=torch.float32, **changes):
        shape = {"hidden_size": hidden_size, "num_experts": E, "topk": K, "dtype": dtype} | changes
        opened.append(Workspace(MoEConfig(**shape), EPGroup(device="cpu"), max_tokens_per_rank=16))
        return opened[-1]

    yield open_one
    for workspace in opened:
        workspace.close()


@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
@pytest.mark.parametrize("latent", [False, True], ids=["full", "latent"])
@pytest.mark.parametrize("overlap", ["off", "between", "stream"])
def test_layer_equals_the_plain_one(open_workspace, shared, latent, overlap):
    parts = Parts.make(latent)
    workspace = open_workspace(LATENT if latent else H)
    layer = MoELayer(workspace, parts.router, parts.experts, shared_overlap=overlap, **parts.optional(shared, latent))
    workspace.begin_step(len(parts.hidden))
    plain = [parts.down, parts.up] if latent else [None, None]
    expected = plain_moe(parts.hidden, parts.router, parts.experts, parts.shared if shared else None, *plain)
    torch.testing.assert_close(layer(parts.hidden).double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_every_overlap_gives_the_same_bits(open_workspace):
    parts, workspace, outputs = Parts.make(latent=True, dtype=torch.bfloat16), open_workspace(LATENT, torch.bfloat16), []
    for overlap in ("off", "between", "stream"):
        layer = MoELayer(workspace, parts.router, parts.experts, shared_overlap=overlap, **parts.optional(True, True))
        workspace.begin_step(len(parts.hidden))
        outputs.append(layer(parts.hidden))
    assert same_bits(outputs[0], outputs[1])
    assert same_bits(outputs[0], outputs[2])


def test_leading_dimensions_are_kept(open_workspace):
    parts, workspace = Parts.make(latent=False, num_tokens=12), open_workspace()
    layer = MoELayer(workspace, parts.router, parts.experts, shared_experts=parts.shared)
    workspace.begin_step(12)
    flat = layer(parts.hidden)
    assert same_bits(layer(parts.hidden.view(2, 6, H)), flat.view(2, 6, H))


def test_a_strided_input_is_taken(open_workspace):
    parts, workspace = Parts.make(latent=False), open_workspace()
    layer = MoELayer(workspace, parts.router, parts.experts)
    workspace.begin_step(len(parts.hidden))
    assert same_bits(layer(parts.hidden.T.contiguous().T), layer(parts.hidden))


def test_no_rows_at_all(open_workspace):
    parts, workspace = Parts.make(latent=True), open_workspace(LATENT)
    layer = MoELayer(workspace, parts.router, parts.experts, **parts.optional(True, True))
    workspace.begin_step(0)
    assert layer(torch.empty(0, H)).shape == (0, H)


def test_padding_rows_get_the_shared_expert_alone(open_workspace):
    parts, workspace = Parts.make(latent=False), open_workspace()
    layer = MoELayer(workspace, parts.router, parts.experts, shared_experts=parts.shared)
    workspace.begin_step(len(parts.hidden), num_real_tokens=8)
    assert torch.equal(layer(parts.hidden)[8:], parts.shared(parts.hidden)[8:])


def test_two_layers_share_a_step(open_workspace):
    parts, workspace = Parts.make(latent=False), open_workspace()
    first, second = (MoELayer(workspace, parts.router, parts.experts) for _ in range(2))
    workspace.begin_step(len(parts.hidden))
    middle = first(parts.hidden)
    expected = plain_moe(middle, parts.router, parts.experts)
    torch.testing.assert_close(second(middle).double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


# --- order of events ----------------------------------------------------------------------------------------------------

ORDERS = {
    "off": "shared route down dispatch experts combine up",
    "between": "route down dispatch_begin shared dispatch_end experts combine up",
    "stream": "route shared down dispatch experts combine up",
}


@pytest.mark.parametrize("overlap", ORDERS)
def test_order_of_events(open_workspace, monkeypatch, overlap):
    parts, workspace, events = Parts.make(latent=True), open_workspace(LATENT), []
    layer = MoELayer(workspace, parts.router, parts.experts, shared_overlap=overlap, **parts.optional(True, True))
    for name, module in {
        "route": "router",
        "shared": "shared_experts",
        "down": "latent_down",
        "up": "latent_up",
        "experts": "experts",
    }.items():
        target = getattr(layer, module)
        monkeypatch.setattr(target, "forward", _recording(events, name, target.forward))
    for name in ("dispatch", "dispatch_begin", "dispatch_end", "combine"):
        monkeypatch.setattr(layer.dispatcher, name, _recording(events, name, getattr(layer.dispatcher, name)))
    workspace.begin_step(len(parts.hidden))
    layer(parts.hidden)
    assert " ".join(events) == ORDERS[overlap]


def _recording(events, name, function):
    def call(*args, **kwargs):
        events.append(name)
        return function(*args, **kwargs)

    return call


# --- shared experts -----------------------------------------------------------------------------------------------------

SHARED = {
    "swiglu": {},
    "gated": {"output_gate": True},
    "bias": {"bias": True},
    "squared-relu": {"activation": Activation("squared_relu")},
    "clamped-interleaved": {"activation": Activation("clamped_swiglu", interleaved=True, limit=0.5), "bias": True},
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)], ids=["fp32", "bf16"])
def test_shared_experts_equal_the_plain_one(name, dtype, tolerance):
    torch.manual_seed(4)
    shared = SharedExperts(SharedExpertsConfig(hidden_size=H, intermediate_size=40, **SHARED[name]), dtype=dtype)
    for bias in (shared.up_bias, shared.down_bias):
        if bias is not None:
            bias.normal_()
    hidden = torch.randn(9, H).to(dtype)
    expected = torch.stack([plain_shared(row, shared) for row in hidden])
    torch.testing.assert_close(shared(hidden).double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_shared_experts_refuse_rows_of_another_size():
    with pytest.raises(ShapeError, match=r"\[T, 32\] .* got \[9, 31\]"):
        SharedExperts(SharedExpertsConfig(hidden_size=H, intermediate_size=8))(torch.zeros(9, 31))


def test_shared_experts_refuse_rows_of_another_dtype():
    with pytest.raises(DtypeError, match=r"float32 but the shared experts are torch\.bfloat16"):
        SharedExperts(SharedExpertsConfig(hidden_size=H, intermediate_size=8))(torch.zeros(9, H))


# --- wrong use ----------------------------------------------------------------------------------------------------------

MISFITS = {
    "topk": ({"topk": 2}, "router topk is 3 but workspace topk is 2"),
    "experts": ({"num_experts": 7}, "router num_experts is 6 but workspace num_experts is 7"),
    "latent size": ({"hidden_size": 24}, "experts hidden_size is 32 but workspace hidden_size is 24"),
    "dtype": ({"dtype": torch.bfloat16}, r"experts dtype is torch\.float32 but workspace dtype is torch\.bfloat16"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_the_workspace_are_refused(open_workspace, case):
    changes, message = MISFITS[case]
    parts = Parts.make(latent=False)
    with pytest.raises(ConfigError, match=message):
        MoELayer(open_workspace(**changes), parts.router, parts.experts)


def test_a_router_of_the_full_size_needs_latent_projections(open_workspace):
    parts = Parts.make(latent=True)
    with pytest.raises(ConfigError, match="router hidden_size is 32 but workspace hidden_size is 16"):
        MoELayer(open_workspace(LATENT), parts.router, parts.experts)


def test_a_shared_expert_of_another_size_is_refused(open_workspace):
    parts = Parts.make(latent=False)
    shared = SharedExperts(SharedExpertsConfig(hidden_size=16, intermediate_size=8), dtype=torch.float32)
    with pytest.raises(ConfigError, match="shared experts hidden_size is 16 but router hidden_size is 32"):
        MoELayer(open_workspace(), parts.router, parts.experts, shared_experts=shared)


def test_experts_of_another_rank_are_refused(open_workspace):
    parts = Parts.make(latent=False)
    others = Experts(parts.experts.config, range(3), dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"range\(0, 3\) but rank 0 of 1 holds range\(0, 6\)"):
        MoELayer(open_workspace(), parts.router, others)


def test_a_workspace_with_another_result_dtype_is_refused() -> None:
    """The rows that a layer gives would have another dtype than those that it takes."""
    parts = Parts.make(latent=False, dtype=torch.bfloat16)
    shape = MoEConfig(hidden_size=H, num_experts=E, topk=K, dtype=torch.bfloat16)
    with (
        Workspace(shape, EPGroup(device="cpu"), max_tokens_per_rank=16, result_dtype=torch.float32) as workspace,
        pytest.raises(ConfigError, match=r"workspace result_dtype is torch\.float32 but workspace dtype is torch\.bfloat16"),
    ):
        MoELayer(workspace, parts.router, parts.experts)


def test_half_a_latent_projection_is_refused(open_workspace):
    parts = Parts.make(latent=True)
    with pytest.raises(ConfigError, match="give both or neither"):
        MoELayer(open_workspace(LATENT), parts.router, parts.experts, latent_down=parts.down)


def test_an_unknown_overlap_is_refused(open_workspace):
    parts = Parts.make(latent=False)
    with pytest.raises(ConfigError, match="one of off, between, stream; got 'always'"):
        MoELayer(open_workspace(), parts.router, parts.experts, shared_overlap="always")


WRONG_ROWS = {
    "size": (torch.zeros(4, 31), ShapeError, r"\[\.\.\., 32\] .* got \[4, 31\]"),
    "dtype": (torch.zeros(4, H).half(), DtypeError, r"hidden is torch\.float16 but the workspace moves torch\.float32"),
    "device": (torch.zeros(4, H, device="meta"), DeviceError, "hidden is on meta but the workspace is on cpu"),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_rows_that_do_not_fit_are_refused(open_workspace, case):
    hidden, error, message = WRONG_ROWS[case]
    parts, workspace = Parts.make(latent=False), open_workspace()
    layer = MoELayer(workspace, parts.router, parts.experts)
    workspace.begin_step(4)
    with pytest.raises(error, match=message):
        layer(hidden)


def test_more_rows_than_the_step_announced_are_refused(open_workspace):
    parts, workspace = Parts.make(latent=False), open_workspace()
    layer = MoELayer(workspace, parts.router, parts.experts)
    workspace.begin_step(4)
    with pytest.raises(CapacityError, match="5 rows but begin_step announced 4"):
        layer(torch.zeros(5, H))


# --- documentation ------------------------------------------------------------------------------------------------------

EXAMPLES = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / "layer.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_the_examples_of_the_page_run_as_they_stand(index):
    exec(compile(EXAMPLES[index], f"docs/layer.md, example {index + 1}", "exec"), {})


def test_the_page_has_an_example_for_each_part():
    assert len(EXAMPLES) == 4
    assert all(len(example.splitlines()) <= 30 for example in EXAMPLES)


# --- GPUs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["off", "between", "stream"])
def gpu_layer(request):
    """A latent layer with a shared expert on one GPU, in bfloat16, and its parts, in a step of 11 rows."""
    parts = Parts.make(latent=True, dtype=torch.bfloat16)
    config = MoEConfig(hidden_size=LATENT, num_experts=E, topk=K, dtype=torch.bfloat16)
    with Workspace(config, EPGroup(device="cuda"), max_tokens_per_rank=16, transport="local") as workspace:
        on_gpu = copy.deepcopy(parts)
        optional = {name: module.cuda() for name, module in on_gpu.optional(True, True).items()}
        layer = MoELayer(workspace, on_gpu.router.cuda(), on_gpu.experts.cuda(), shared_overlap=request.param, **optional)
        workspace.begin_step(len(parts.hidden))
        layer(parts.hidden.cuda())  # libraries may synchronise while they start
        torch.cuda.synchronize()
        yield layer, parts


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_layer_on_a_gpu_equals_the_plain_one_and_never_waits(gpu_layer):
    layer, parts = gpu_layer
    expected = plain_moe(parts.hidden, parts.router, parts.experts, parts.shared, parts.down, parts.up)
    hidden = parts.hidden.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = [layer(hidden) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(outputs[0].cpu().double(), expected, rtol=0, atol=1.5e-2 * expected.abs().max().item())
    assert all(same_bits(output, outputs[0]) for output in outputs)


@pytest.mark.gpu
def test_a_captured_chain_of_layers_gives_the_bits_of_the_eager_one(gpu_layer):
    layer, parts = gpu_layer
    first, second = parts.hidden.cuda(), parts.hidden.flip(0).cuda()

    def chain(hidden):
        for _ in range(8):
            hidden = hidden + layer(hidden)
        return hidden

    expected = chain(second)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = chain(first)
    first.copy_(second)
    for _ in range(3):
        graph.replay()
        assert same_bits(output, expected)
