"""The operators are one set a process: what compiled code finds again in a second process and after a reset, and what stays."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._library.simple_registry import singleton

import tokenferry as tf
from tokenferry.layer_operator import moe, serve_layers
from tokenferry.testing import run_ranks
from tokenferry.testing.ranks import run_virtual

CONFIG = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=torch.float32)
ROWS = 4
GIVEN = torch.ones(ROWS, 8), torch.zeros(ROWS, 1, dtype=torch.int64), torch.ones(ROWS, 1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler uses what PyTorch deprecates
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for CPU code")


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def opened(transport: str = "local", group: tf.EPGroup | None = None, config: tf.MoEConfig = CONFIG) -> tf.Workspace:
    return tf.Workspace(config, group or tf.EPGroup(device="cpu"), max_tokens_per_rank=ROWS, transport=transport, counts="equal")


def forward_of(ws: tf.Workspace) -> Callable[..., torch.Tensor]:
    layer = ws.dispatcher()

    def forward(hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        ws.begin_step(ROWS)
        got = layer.dispatch(hidden, topk_idx, topk_weights)
        return layer.combine(got.hidden * 2, got) + 1

    return forward


# --- the compiler's cache -------------------------------------------------------------------------------------------------

IN_A_PROCESS = """
import json, sys, torch, tokenferry as tf
from torch._dynamo.utils import counters
dtype = getattr(torch, sys.argv[1])
config = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=dtype)
with tf.Workspace(config, tf.EPGroup(device="cpu"), max_tokens_per_rank=4, transport="local") as ws:
    layer = ws.dispatcher()
    ws.begin_step(4)
    layer.dispatch(torch.ones(4, 8, dtype=dtype), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    combine = torch.compile(lambda partial: layer.combine(partial).float() + 1, fullgraph=True)
    out = combine(torch.full((4, 8), 2.0))
caches = counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]
print(json.dumps([out.tolist() == [[3.0] * 8] * 4, *caches]))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor")


def compiled_in_a_process(cache: Path, dtype: str) -> list[Any]:
    """[whether the result is right, cache hits, cache misses]"""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS, dtype], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
@needs_compiler
def test_a_second_process_finds_what_the_first_one_compiled_but_nothing_of_another_dtype(cache: Path) -> None:
    assert compiled_in_a_process(cache, "float32") == [True, 0, 1]
    assert compiled_in_a_process(cache, "float32") == [True, 1, 0]
    assert compiled_in_a_process(cache, "bfloat16") == [True, 0, 1]


# --- resets ---------------------------------------------------------------------------------------------------------------


def compilations_with_resets(group: tf.EPGroup, transport: str) -> int:
    """How often a forward is compiled that runs before two resets, between them, and after them."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with opened(transport, group) as ws, torch.no_grad():
        compiled = torch.compile(forward_of(ws), fullgraph=True, backend=backend)
        for turn in range(3):
            if turn:
                ws.reset()
            torch.testing.assert_close(compiled(*GIVEN), torch.full((ROWS, 8), 2.0 * group.size + 1))
    return len(graphs)


@pytest.mark.parametrize("transport", ["local", "collective"])
def test_a_reset_compiles_nothing_anew(transport: str) -> None:
    assert compilations_with_resets(tf.EPGroup(device="cpu"), transport) == 1


@pytest.mark.interpreter
def test_a_reset_that_gives_new_buffers_compiles_nothing_anew() -> None:
    assert run_ranks(compilations_with_resets, 2, "p2p", timeout_s=120, env={"TRITON_INTERPRET": "1"}) == [1, 1]


def test_what_was_opened_in_inference_mode_is_compiled_outside_of_it() -> None:
    with torch.inference_mode():
        ws = opened()
    with ws, torch.no_grad():
        assert not ws.operators.order.is_inference()
        compiled = torch.compile(forward_of(ws), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*GIVEN), torch.full((ROWS, 8), 3.0))


def test_a_second_workspace_does_not_hear_the_first_ones_calls() -> None:
    with opened() as first, opened() as second, torch.no_grad():
        torch.compile(forward_of(first), fullgraph=True, backend="eager")(*GIVEN)
        torch.compile(forward_of(second), fullgraph=True, backend="eager")(*GIVEN)
        first.reset()
        with pytest.raises(tf.StateError, match="no step has begun"):
            _ = first.step
        assert second.step.index == 1


def test_one_function_for_many_workspaces_is_compiled_twice_at_most() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def forward(ws: tf.Workspace, layer: tf.Dispatcher) -> torch.Tensor:
        ws.begin_step(ROWS)
        got = layer.dispatch(*GIVEN)
        return layer.combine(got.hidden * 2, got)

    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    for _ in range(4):
        with opened() as ws, torch.no_grad():
            assert torch.equal(compiled(ws, ws.dispatcher()), 2 * GIVEN[0])
    assert len(graphs) <= 2


# --- numbers --------------------------------------------------------------------------------------------------------------


def test_numbers_count_up_and_stay_through_resets() -> None:
    with opened() as first, opened() as second:
        first.reset()
        assert second.number == first.number + 1


def numbers_of_a_rank(group: tf.EPGroup) -> list[int]:
    with opened("collective", group) as first, opened("collective", group) as second:
        return [first.number, second.number]


@pytest.mark.ranks
def test_ranks_have_the_same_numbers() -> None:
    ours, theirs = run_ranks(numbers_of_a_rank, 2)
    assert ours == theirs == [0, 1]


def test_virtual_ranks_have_numbers_of_their_own_in_an_order_of_their_own() -> None:
    ranks = run_virtual(numbers_of_a_rank, 3)
    assert len({number for rank in ranks for number in rank}) == 6
    assert all(second == first + 1 for first, second in ranks)


def test_a_refused_workspace_takes_no_number() -> None:
    with opened() as first:
        with pytest.raises(tf.ConfigError):
            tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=0)
        with opened() as second:
            assert second.number == first.number + 1


# --- a whole layer as one operator ----------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "compile.md").read_text()


def test_the_example_of_the_page_runs_as_it_stands() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "docs/compile.md", "exec"), {})


def test_a_layer_operator_returns_what_the_compiler_is_told() -> None:
    """Also of rows that are not contiguous: the result is."""
    with opened() as ws:
        serve_layers(ws, lambda layer, hidden, *_: hidden.contiguous() * (layer + 2))
        hidden = torch.ones(8, ROWS).t()
        arguments = ws.number, 1, hidden, *GIVEN[1:]
        torch.library.opcheck(torch.ops.tokenferry.moe, arguments, test_utils=("test_schema", "test_faketensor"))
        assert torch.equal(moe(*arguments), torch.full((ROWS, 8), 3.0))


def test_a_layer_operator_without_layers_says_what_to_call() -> None:
    with opened() as ws, pytest.raises(tf.StateError, match=r"call serve_layers\(\) once it is open"):
        moe(ws.number, 0, *GIVEN)


# --- what stays -----------------------------------------------------------------------------------------------------------


def registered() -> tuple[int, int, int]:
    """Namespaces, descriptions of results, and workspaces in the table."""
    from tokenferry import operators

    gc.collect()
    fakes = sum("tokenferry" in name for name in singleton._data)
    return sum("tokenferry" in name for name in vars(torch.ops)), fakes, len(operators._WORKSPACES._by_number)


def test_nothing_stays_of_workspaces_that_are_gone() -> None:
    before = registered()
    for _ in range(100):
        with opened() as ws:
            ws.reset()
    del ws
    assert registered() == before


def test_code_that_outlived_its_workspace_says_so() -> None:
    with opened() as ws:
        number, order = ws.number, ws.operators.order
    del ws
    gc.collect()
    with pytest.raises(tf.StateError, match="compiled code outlived its workspace"):
        torch.ops.tokenferry.combine_fresh(order, torch.ones(1, 8), None, number, 0, 1, torch.float32)
