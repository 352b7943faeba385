"""What makes a layer leave our kernels for the model's own function after loading, and what the log says of it."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tokenferry as tf
from foreign_experts import NUM_EXPERTS, Family, ScaledNorm
from tokenferry.experts import BorrowedExperts, ExpertScratch
from tokenferry.integrations.transformers import expert_parallel, fallbacks, kernel_experts
from tokenferry.integrations.transformers.fallbacks import Fallbacks
from tokenferry.integrations.transformers.kernel_experts import KernelExperts, NotServed, prepare_together
from tokenferry.integrations.transformers.settings import LayerShape, Options
from tokenferry.testing.tiny_models import make_tiny
from transformers_work import load

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs


def kernels_of(module: nn.Module) -> KernelExperts:
    return KernelExperts(module, range(NUM_EXPERTS), torch.float32)


# --- what is noticed ------------------------------------------------------------------------------------------------------


def give_other_data(module: Any) -> None:
    module.down_proj.data = module.down_proj.data.clone()


def give_another_dtype(module: Any) -> None:
    module.to(torch.bfloat16)


def turn_in_place(module: Any) -> None:
    module.down_proj.data = module.down_proj.data.transpose(1, 2)


def give_another_parameter(module: Any) -> None:
    module.down_proj = nn.Parameter(module.down_proj.data)


def ask_for_eager(module: Any) -> None:
    module.config._experts_implementation = "eager"


@pytest.mark.parametrize("change", [give_other_data, give_another_dtype, turn_in_place, give_another_parameter, ask_for_eager])
def test_kernels_no_longer_hold_after(change: Callable[[Any], None]) -> None:
    module = Family().make()
    kernels = kernels_of(module)
    assert kernels.holds
    change(module)
    assert not kernels.holds


def test_kernels_hold_after_weights_are_written_in_place() -> None:
    module = Family().make()
    kernels = kernels_of(module)
    module.load_state_dict({name: torch.randn_like(weight) for name, weight in module.state_dict().items()})
    assert kernels.holds


def write_norm(module: Any) -> None:
    norm = module.post_expert_norm
    norm.load_state_dict({"weight": norm.weight + 1})


def give_norm_other_data(module: Any) -> None:
    module.post_expert_norm.weight.data = module.post_expert_norm.weight.data + 1


@pytest.mark.parametrize("change", [write_norm, give_norm_other_data])
def test_a_changed_norm_is_noticed(change: Callable[[Any], None]) -> None:
    module = Family(norm=ScaledNorm).make()
    kernels = kernels_of(module)
    assert kernels.holds
    change(module)
    assert kernels.what_changed() == "the norm behind each expert was changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, -1.0, 0.3])
def test_a_norm_is_recognised_whatever_its_weight(value: float, dtype: torch.dtype) -> None:
    module = Family(norm=ScaledNorm).make(dtype)
    module.post_expert_norm.weight.fill_(value)
    scale = kernel_experts.known_norm(module)["norm_scale"]
    torch.testing.assert_close(scale, (1.0 + module.post_expert_norm.weight).float(), rtol=0, atol=0)


def test_trying_a_norm_out_leaves_its_weight_alone() -> None:
    module = Family(norm=ScaledNorm).make()
    before = module.post_expert_norm.weight.clone()
    kernels_of(module)
    assert torch.equal(module.post_expert_norm.weight, before)


# --- what is refused ------------------------------------------------------------------------------------------------------


class Packed(torch.Tensor):
    """As quantisers and distributed tensors have them."""


class OwnParameter(nn.Parameter):
    """A subclass of the parameter itself."""


@pytest.mark.parametrize("make", [lambda data: nn.Parameter(data.as_subclass(Packed)), OwnParameter], ids=["data", "parameter"])
def test_a_subclass_of_tensor_is_refused(make: Callable[[torch.Tensor], nn.Parameter]) -> None:
    module = Family().make()
    module.down_proj = make(module.down_proj.data)
    with pytest.raises(NotServed, match=r"its down_proj is a (Packed|OwnParameter)"):
        kernels_of(module)


# --- kernels that cannot be loaded ----------------------------------------------------------------------------------------

OPTIONS = Options(
    max_tokens_per_rank=8,
    transport="local",
    combine_dtype=None,
    exact=False,
    serialize=False,
    own_kernels=True,
    timeout_s=20.0,
    open_timeout_s=20.0,
)
SHAPE = LayerShape(hidden_size=32, num_experts=NUM_EXPERTS, topk=2, hidden_dtype=torch.float32, weight_dtype=torch.float32)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[KernelExperts]:
    """Two layers' kernels. Those of the first cannot be loaded."""
    both = [kernels_of(Family().make()), kernels_of(Family().make())]

    def prepare(borrowed: BorrowedExperts, *_: object, **__: object) -> None:
        if borrowed is both[0].borrowed:
            raise RuntimeError("out of resource: shared memory,\n  Required: 300000")

    monkeypatch.setattr(BorrowedExperts, "prepare", prepare)
    monkeypatch.setattr(kernel_experts, "ExpertScratch", lambda device: SimpleNamespace(device=device))
    return both


def test_kernels_that_cannot_be_loaded_are_told_with_the_reason(two: list[KernelExperts]) -> None:
    _, failed = prepare_together(two, tf.EPGroup(device="cpu"), OPTIONS, SHAPE)
    reason = "its kernels could not be loaded: RuntimeError: out of resource: shared memory, Required: 300000"
    assert failed == {two[0]: reason}


def test_a_layer_whose_kernels_cannot_be_loaded_goes_to_the_library(
    two: list[KernelExperts], caplog: pytest.LogCaptureFixture
) -> None:
    layers: Any = [LayerStub(kernels) for kernels in two]
    with caplog.at_level(logging.WARNING, logger="tokenferry"):
        assert Fallbacks().prepare(layers, group=tf.EPGroup(device="cpu"), options=OPTIONS, shape=SHAPE) is not None
    assert [layer.kernels for layer in layers] == [None, two[1]]
    assert "1 of 2 MoE layers run by transformers' own expert function: its kernels could not be loaded" in caplog.text


class LayerStub:
    """As much of an `ExpertLayer` as preparing looks at."""

    def __init__(self, kernels: KernelExperts) -> None:
        self.kernels: KernelExperts | None = kernels
        self.packed = None


# --- a loaded model -------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """By our experts' operators on borrowed views, which stand in for the kernels where there is no GPU."""
    monkeypatch.setattr(ExpertScratch, "serves", staticmethod(lambda device: True))
    monkeypatch.setattr(fallbacks, "prepare_together", lambda *_: (None, {}))
    loaded = load(make_tiny("mixtral", tmp_path), tf.EPGroup(device="cpu"))
    assert all(layer.kernels for layer in loaded.expert_parallel.layers)
    yield loaded
    loaded.expert_parallel.close()


def run_on_other_weights(model: Any) -> None:
    for layer in model.expert_parallel.layers:
        layer.module.down_proj.data = torch.zeros_like(layer.module.down_proj)
    model(IDS)


def test_the_log_says_once_that_layers_fall_back(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tokenferry"):
        run_on_other_weights(model)
        model(IDS)
    [line] = [record.getMessage() for record in caplog.records if "own expert function" in record.getMessage()]
    assert "MoE layer 0 of 2" in line and "its parameters are no longer those that were borrowed" in line


def test_new_data_is_what_the_next_forward_computes_with(model: Any) -> None:
    before = model(IDS).logits
    run_on_other_weights(model)
    assert not torch.allclose(model(IDS).logits, before)


def test_an_implementation_that_is_set_after_loading_runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = expert_parallel.exchange_sums
    monkeypatch.setattr(expert_parallel, "exchange_sums", lambda *args: calls.append(args) or real(*args))
    model.set_experts_implementation("eager")
    model(IDS)
    assert len(calls) == 2


@pytest.fixture
def reads(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows where the model asks the device how many rows are valid."""
    times: list[int] = []
    monkeypatch.setattr(model.expert_parallel, "_read_valid_rows", lambda step: times.append(1))
    return times


def test_valid_rows_are_not_read_while_our_kernels_run(model: Any, reads: list[int]) -> None:
    model(IDS)
    assert not reads


def test_valid_rows_are_read_once_a_step_after_layers_fell_back(model: Any, reads: list[int]) -> None:
    run_on_other_weights(model)
    model(IDS)
    assert len(reads) == 2
