"""Compiled models of transformers on one rank: one graph with one operator a layer, what compiles anew and what does not."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import tokenferry as tf
from tokenferry.testing.tiny_models import tiny_config
from transformers_work import CAPACITY, quiet

pytestmark = [
    pytest.mark.filterwarnings("default"),  # transformers warns of its own affairs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's compiler uses what PyTorch deprecates
]
NUM_LAYERS = 12
IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def deep() -> Iterator[Any]:
    model = made(NUM_LAYERS)
    yield model
    model.expert_parallel.close()


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    model = made(2)
    yield model
    model.expert_parallel.close()


def made(num_layers: int) -> Any:
    from tokenferry.integrations.transformers import from_config

    quiet()
    config = tiny_config("qwen3_moe")
    config.num_hidden_layers = num_layers
    group = tf.EPGroup(device="cpu")
    return from_config(config, group=group, max_tokens_per_rank=CAPACITY, dtype=torch.float32)


def logits(call: Callable[..., Any], ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = call(ids, use_cache=False).logits
        return found


class Graphs:
    """A backend of torch.compile that runs a graph as it is, and keeps it."""

    def __init__(self) -> None:
        self.kept: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        self.kept.append(graph)
        return graph.forward

    def operators(self) -> list[torch.fx.Node]:
        """Ours, in the order in which they stand in the first graph."""
        return [node for node in self.kept[0].graph.nodes if str(node.target).startswith("tokenferry.")]


def test_twelve_layers_are_one_graph_with_an_operator_for_each_that_changes_nothing(deep: Any) -> None:
    assert torch._dynamo.config.recompile_limit < NUM_LAYERS
    counters.clear()
    graphs = Graphs()
    assert torch.equal(logits(torch.compile(deep, fullgraph=True, backend=graphs)), logits(deep))
    assert counters["stats"]["unique_graphs"] == len(graphs.kept) == 1
    assert not counters["graph_break"]
    operators = graphs.operators()
    assert [node.args[:2] for node in operators] == [(deep.expert_parallel.workspace.number, n) for n in range(NUM_LAYERS)]
    assert {node.target for node in operators} == {torch.ops.tokenferry.moe.default}
    assert not torch.ops.tokenferry.moe.default._schema.is_mutable
    assert all(before in ancestors(after) for before, after in itertools.pairwise(operators))


def ancestors(node: torch.fx.Node) -> set[torch.fx.Node]:
    found, left = set(), [node]
    while left:
        new = [given for given in left.pop().all_input_nodes if given not in found]
        found.update(new)
        left += new
    return found


def test_the_second_batch_size_compiles_anew_and_further_ones_do_not(model: Any) -> None:
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for num_prompts, num_graphs in ((4, 1), (2, 2), (3, 2), (4, 2), (1, 3)):  # the compiler always has code of its own for 1
        ids = IDS.view(4, 5)[:num_prompts]
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids), atol=1e-4, rtol=0)
        assert len(graphs.kept) == num_graphs


def test_a_model_that_compiles_itself(model: Any) -> None:
    graphs = Graphs()
    expected = logits(model)
    model.compile(fullgraph=True, backend=graphs)
    try:
        assert torch.equal(logits(model), expected)
    finally:
        model._compiled_call_impl = None
    assert len(graphs.kept) == 1


def test_layers_that_are_compiled_one_by_one_share_two_graphs(deep: Any) -> None:
    """A layer's number becomes an input with the second layer. With a graph for each, the ninth would pass dynamo's limit."""
    graphs = Graphs()
    expected = logits(deep)
    for layer in deep.model.layers:
        layer.mlp.compile(fullgraph=True, backend=graphs)
    try:
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
            assert torch.equal(logits(deep), expected)
    finally:
        for layer in deep.model.layers:
            layer.mlp._compiled_call_impl = None
    assert len(graphs.kept) <= 2


def test_a_model_that_breaks_the_graph_in_each_layer_passes_the_limit_and_is_still_right(
    deep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `fullgraph`: dynamo then runs layers eagerly, and must not look into what the host does in them."""

    def breaking(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(hidden: torch.Tensor) -> Any:
            torch._dynamo.graph_break()
            return forward(hidden)

        return call

    expected = logits(deep)
    for layer in deep.model.layers:
        monkeypatch.setattr(layer.mlp.gate, "forward", breaking(layer.mlp.gate.forward))
    counters.clear()
    assert torch.equal(logits(torch.compile(deep, backend="eager")), expected)
    assert counters["stats"]["unique_graphs"] > torch._dynamo.config.recompile_limit


def test_a_reset_compiles_nothing_anew(model: Any) -> None:
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    expected = logits(compiled)
    model.expert_parallel.reset()
    assert torch.equal(logits(compiled), expected)
    assert len(graphs.kept) == 1


def test_a_forward_with_gradients_on_passes_none_through_the_experts(model: Any) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.enable_grad():
        found = compiled(IDS, use_cache=False).logits
    assert torch.equal(found, logits(model))


# --- errors -----------------------------------------------------------------------------------------------------------------


def test_too_many_tokens_are_a_capacity_error_and_the_model_goes_on(model: Any) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(tf.CapacityError, match=f"this forward has {CAPACITY + 1} tokens"):
        logits(compiled, torch.full((1, CAPACITY + 1), 5))
    assert torch.equal(logits(compiled), logits(model))


def test_a_compiled_forward_that_ended_early_is_a_state_error_in_the_next_call(model: Any) -> None:
    hidden = torch.ones(1, 3, 64)
    with torch.no_grad():
        torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")(hidden)
    with pytest.raises(tf.StateError, match="a forward ended before its last MoE layer"):
        model.expert_parallel.finish()
    model.expert_parallel.reset()


def test_layers_out_of_order_are_a_state_error(model: Any) -> None:
    with pytest.raises(tf.StateError, match="in another order than the first one"), torch.no_grad():
        torch.compile(model.model.layers[1].mlp, fullgraph=True, backend="aot_eager")(torch.ones(1, 3, 64))
    model.expert_parallel.reset()


def test_a_closed_model_says_so_in_compiled_code() -> None:
    model = made(1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits(compiled)
    model.expert_parallel.close()
    with pytest.raises(tf.StateError, match="the workspace is closed"):
        logits(compiled)


# --- the compiler's cache ---------------------------------------------------------------------------------------------------

IN_A_PROCESS = """
import json, torch
from torch._dynamo.utils import counters
from test_transformers_compile import logits, made
model = made(1)
close = torch.allclose(logits(torch.compile(model, fullgraph=True)), logits(model), atol=1e-4)
print(json.dumps([close, counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]]))
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for CPU code")
def test_a_second_process_finds_what_the_first_one_compiled(tmp_path: Path) -> None:
    folder = str(Path(__file__).parent)
    env = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "PYTHONPATH": os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    said = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(json.loads(done.stdout.splitlines()[-1]))
    assert said == [[True, 0, 1], [True, 1, 0]]
