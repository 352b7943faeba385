"""Decode forwards whose layers are compiled one by one, on one rank without a GPU: the same tokens, by one piece of code for all
layers. `recorded_calls.py` stands in for CUDA graphs."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from transformers import StaticCache

import tokenferry as tf
from tokenferry.integrations.transformers import from_config
from tokenferry.integrations.transformers.compiled_layers import CompiledByLayers, layers_alike
from tokenferry.testing.tiny_models import tiny_config
from transformers_work import quiet

pytestmark = [
    pytest.mark.filterwarnings("default"),  # transformers warns of its own affairs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's compiler uses what PyTorch deprecates
]

PIECES = 3
"""A layer, the norm behind the last one, and the angles of the positions."""


def model_of(family: str, num_layers: int) -> Any:
    config = copy.deepcopy(tiny_config(family))
    config.num_hidden_layers = num_layers
    group = tf.EPGroup(device="cpu")
    return from_config(config, group=group, max_tokens_per_rank=64, dtype=torch.float32, experts_implementation="batched_mm")


@pytest.fixture
def models(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Of the family and the numbers of layers that the test names."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **kwargs: compiled(call, backend="eager", **kwargs))
    torch._dynamo.reset()
    quiet()
    family, depths = request.param
    made = [model_of(family, depth) for depth in depths]
    yield made
    for model in made:
        model.expert_parallel.close()


def by_layers(model: Any) -> CompiledByLayers:
    layers = layers_alike(model, model.expert_parallel.layers)
    assert layers is not None
    return CompiledByLayers(model, layers, model.expert_parallel)


@torch.no_grad()
def decoded(model: Any, call: Any, batch: int, length: int = 32) -> list[list[int]]:
    """Tokens of a few steps behind a prompt, which runs eagerly."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    ids = torch.randint(3, 200, (batch, 9), generator=torch.Generator().manual_seed(batch))
    made = [model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(4):
        made.append(call(input_ids=made[-1], past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(made, 1).tolist()


@pytest.mark.parametrize("models", [("qwen3_moe", (2, 12)), ("mixtral", (3,))], indirect=True, ids=["qwen3_moe", "mixtral"])
def test_any_number_of_layers_is_compiled_once_for_a_batch_size(models: list[Any]) -> None:
    for model in models:
        call = by_layers(model)
        for batch in (2, 1):
            before = counters["stats"]["unique_graphs"]
            assert decoded(model, call, batch) == decoded(model, model, batch)
            assert counters["stats"]["unique_graphs"] - before == PIECES


@pytest.mark.parametrize("models", [("qwen3_moe", (2,))], indirect=True, ids=["qwen3_moe"])
def test_a_second_length_of_the_cache_compiles_the_layer_once_more_and_a_third_nothing(models: list[Any]) -> None:
    [model] = models
    call, compiled = by_layers(model), []
    for length in (32, 48, 64):
        before = counters["stats"]["unique_graphs"]
        assert decoded(model, call, 2, length) == decoded(model, model, 2, length)
        compiled.append(counters["stats"]["unique_graphs"] - before)
    assert compiled == [PIECES, 1, 0]


@pytest.mark.parametrize("models", [("qwen3_moe", (2,))], indirect=True, ids=["qwen3_moe"])
def test_afterwards_the_model_is_as_before(models: list[Any]) -> None:
    [model] = models
    decoded(model, by_layers(model), 1)
    assert not any("forward" in vars(module) for module in (*model.model.layers, model.model.norm, model.model.rotary_emb))
    assert not model.expert_parallel.calls_in_turn
    assert decoded(model, model, 1) == decoded(model, torch.compile(model), 1)


@pytest.mark.parametrize("models", [("qwen3_moe", (2,))], indirect=True, ids=["qwen3_moe"])
@pytest.mark.parametrize(("piece", "error"), [("layer", TorchDynamoException), ("module_0", RuntimeError)], ids=["layer", "norm"])
def test_what_fails_behind_a_layer_is_no_reason_to_run_the_layers_again(
    models: list[Any], piece: str, error: type[Exception]
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise TorchDynamoException("not today")

    [model] = models
    call = by_layers(model)
    decoded(model, call, 1)
    call._compiled[f"decode_{piece}_1"] = refuse
    with pytest.raises(error) as caught:
        decoded(model, call, 1)
    assert ("after its first layer had run" in str(caught.value)) == (piece != "layer")


@pytest.mark.parametrize("models", [("gpt_oss", (2,)), ("deepseek_v3", (2,))], indirect=True, ids=["windows", "a dense layer"])
def test_layers_that_differ_share_no_code(models: list[Any]) -> None:
    [model] = models
    assert layers_alike(model, model.expert_parallel.layers) is None


@pytest.mark.parametrize("models", [("qwen3_moe", (2,))], indirect=True, ids=["qwen3_moe"])
def test_a_forward_that_somebody_has_replaced_is_not_passed_by(models: list[Any]) -> None:
    [model] = models
    assert layers_alike(model, model.expert_parallel.layers) is not None
    layer = model.model.layers[1]
    layer.forward = layer.forward
    assert layers_alike(model, model.expert_parallel.layers) is None
