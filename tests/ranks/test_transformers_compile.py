"""Compiled models of transformers between two rank processes on gloo: the tokens of the unmodified model, and errors of peers.

As in `test_transformers.py` the ranks are started once, and each test looks at the results of one family or scenario.
"""

import contextlib
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import tokenferry as tf
from tokenferry.testing import run_ranks
from tokenferry.testing.tiny_models import FAMILIES, make_tiny
from transformers_work import Work, generate, load, quiet, unmodified

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.filterwarnings("default"),  # transformers warns of its own affairs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's compiler uses what PyTorch deprecates
]

WORK = (Work((5, 9), 6), Work((7,), 8))
TIMEOUT_S = 60.0
"""A rank compiles meanwhile."""
NO_COMPILED_CACHE = ("llama4",)
"""transformers says of its cache that it cannot be compiled: whole forwards without one are, instead."""
SHORT = ("qwen3_moe", "llama4")
"""The two kinds of layers; the other families are in the long tests."""


@dataclass(frozen=True)
class Outcome:
    """What a rank saw of a family.

    Attributes:
        tokens: compiled, with the experts on both ranks.
        expected: of the unmodified model, not compiled.
        graphs, graphs_unmodified: how many the compiler made of each.
    """

    tokens: list[list[int]]
    expected: list[list[int]]
    graphs: int
    graphs_unmodified: int
    error: str = ""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_tiny(family, folder / family)
    return folder


@pytest.fixture(scope="module")
def outcomes(models: Path, request: pytest.FixtureRequest) -> dict[str, list[Outcome]]:
    """By family, of each rank: of all families that the selected tests ask for."""
    here = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["family"] for item in here if hasattr(item, "callspec") and "family" in item.callspec.params}
    families = [family for family in FAMILIES if family in asked]
    by_rank = run_ranks(run_families, 2, families, models, timeout_s=400)
    return {family: [rank[number] for rank in by_rank] for number, family in enumerate(families)}


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family in SHORT else [pytest.mark.long]) for family in FAMILIES]
)
def test_tokens_of_the_unmodified_model(family: str, outcomes: dict[str, list[Outcome]]) -> None:
    for work, outcome in zip(WORK, outcomes[family], strict=True):
        assert not outcome.error, outcome.error
        assert [len(tokens) for tokens in outcome.tokens] == [work.new_tokens] * len(work.prompt_lengths)
        assert outcome.tokens == outcome.expected
        assert 0 < outcome.graphs <= outcome.graphs_unmodified


# --- peers that fail --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a call raised, after how long, and whether it all worked again after a reset, without another graph."""

    error: str
    seconds: float
    works_again: bool


@pytest.fixture(scope="module")
def seen(models: Path) -> dict[str, list[Seen]]:
    by_rank = run_ranks(run_scenarios, 2, models / "qwen3_moe", timeout_s=240)
    return {name: [rank[name] for rank in by_rank] for name in SCENARIOS}


@pytest.mark.parametrize("name", ["a_peer_raises", "the_experts_raise", "the_attention_raises_while_the_peer_is_idle"])
def test_the_peer_of_a_rank_that_raises_hears_it_at_once(name: str, seen: dict[str, list[Seen]]) -> None:
    own, peers = seen[name] if name != "a_peer_raises" else reversed(seen[name])
    assert "boom" in own.error
    assert peers.error.startswith("PeerFailedError")
    assert "boom" in peers.error
    assert peers.seconds < TIMEOUT_S / 2


@pytest.mark.parametrize("name", ["a_peer_raises", "the_experts_raise", "the_attention_raises_while_the_peer_is_idle"])
def test_after_a_reset_the_compiled_code_works_again(name: str, seen: dict[str, list[Seen]]) -> None:
    assert all(rank.works_again for rank in seen[name])


# --- the compiler's cache ---------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for CPU code")
def test_decode_steps_that_two_ranks_compiled_are_found_by_the_next_two_processes(models: Path, tmp_path: Path) -> None:
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    first, second = (run_ranks(compile_by_inductor, 2, models / "qwen3_moe", timeout_s=240, env=env) for _ in range(2))
    assert all(rank.lengths == [8] * len(WORK[0].prompt_lengths) for rank in (*first, *second))
    assert all(rank.hits + rank.misses > 0 for rank in first)
    assert sum(rank.misses for rank in first) > 0
    assert [(rank.hits, rank.misses) for rank in second] == [(rank.hits + rank.misses, 0) for rank in first]


# --- workers ----------------------------------------------------------------------------------------------------------------


def run_families(group: tf.EPGroup, families: list[str], models: Path) -> list[Outcome]:
    quiet()
    return [_run_family(group, models / family) for family in families]


def _run_family(group: tf.EPGroup, path: Path) -> Outcome:
    work = WORK[group.rank]
    kwargs = {"dtype": torch.float32} | ({"attn_implementation": "eager"} if path.name == "gpt_oss" else {})
    make = compiled_forwards if path.name in NO_COMPILED_CACHE else compiled_generate
    try:
        plain = unmodified(path, **kwargs)
        expected, _ = generate(plain, work, group.rank)
        _, graphs_unmodified = make(plain, work, group.rank)
        model = load(path, group, timeout_s=TIMEOUT_S, **kwargs)
        try:
            tokens, graphs = make(model, work, group.rank)
            model.expert_parallel.finish()
        finally:
            model.expert_parallel.close()
    except Exception:
        return Outcome([], [], 0, 0, traceback.format_exc())
    return Outcome(tokens, expected, graphs, graphs_unmodified)


def compiled_generate(model: Any, work: Work, rank: int) -> tuple[list[list[int]], int]:
    """Tokens of `generate()` with a static cache, every decode step compiled; and the number of graphs."""
    from transformers import CompileConfig

    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # CPUs too
    model.generation_config.update(cache_implementation="static", compile_config=config)
    torch._dynamo.reset()
    counters.clear()
    tokens, _ = generate(model, work, rank)
    return tokens, counters["stats"]["unique_graphs"]


def compiled_forwards(model: Any, work: Work, rank: int) -> tuple[list[list[int]], int]:
    """The same by forwards of all tokens so far, each compiled."""
    torch._dynamo.reset()
    counters.clear()
    model.generation_config.update(use_cache=False)
    with replaced(model, torch.compile(model.forward, fullgraph=True, backend="eager")):
        tokens, _ = generate(model, work, rank)
    return tokens, counters["stats"]["unique_graphs"]


@dataclass(frozen=True)
class Compiled:
    """How many tokens each prompt got, and how many graphs the compiler's cache had, and had not."""

    lengths: list[int]
    hits: int
    misses: int


def compile_by_inductor(group: tf.EPGroup, path: Path) -> Compiled:
    """Both ranks decode prompts of the same lengths, so that their graphs are the same."""
    from transformers import CompileConfig

    quiet()
    model = load(path, group, timeout_s=TIMEOUT_S, dtype=torch.float32)
    config = CompileConfig(mode="default", fullgraph=True)
    config._compile_all_devices = True
    model.generation_config.update(cache_implementation="static", compile_config=config)
    counters.clear()
    tokens, _ = generate(model, Work(WORK[0].prompt_lengths, 8), group.rank)
    model.expert_parallel.finish()
    model.expert_parallel.close()
    found = counters["inductor"]
    return Compiled([len(each) for each in tokens], found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])


def run_scenarios(group: tf.EPGroup, path: Path) -> dict[str, Seen]:
    quiet()
    model = load(path, group, timeout_s=TIMEOUT_S, dtype=torch.float32)
    expected, _ = generate(model, WORK[group.rank], group.rank)
    model.expert_parallel.finish()
    compiled_generate(model, WORK[group.rank], group.rank)
    model.expert_parallel.finish()
    return {name: _observed(scenario, model, group, expected) for name, scenario in SCENARIOS.items()}


def _observed(scenario: Callable[..., None], model: Any, group: tf.EPGroup, expected: list[list[int]]) -> Seen:
    start, error = time.monotonic(), ""
    try:
        scenario(model, group)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    seconds = time.monotonic() - start
    model.expert_parallel.reset()
    graphs = counters["stats"]["unique_graphs"]
    tokens, _ = generate(model, WORK[group.rank], group.rank)
    model.expert_parallel.finish()
    return Seen(error, seconds, tokens == expected and counters["stats"]["unique_graphs"] == graphs)


def a_peer_raises(model: Any, group: tf.EPGroup) -> None:
    """Rank 1 in an eager forward; rank 0 waits for it in a compiled one."""
    if group.rank == 1:
        with replaced(model.model.layers[1].self_attn, boom):
            model(torch.ones(1, 3, dtype=torch.long))
    generate(model, WORK[0], 0)


def the_experts_raise(model: Any, group: tf.EPGroup) -> None:
    """Rank 0's, within the operator of a compiled forward."""
    if group.rank == 1:
        model.expert_parallel.finish()
    experts = model.expert_parallel.layers[1].experts
    calls, forward = [], experts._forward

    def boom_in_the_third_step(*rows: torch.Tensor) -> torch.Tensor:
        calls.append(rows)
        if len(calls) > 2:
            raise RuntimeError("boom")
        result: torch.Tensor = forward(*rows)
        return result

    experts._forward = boom_in_the_third_step
    try:
        generate(model, WORK[0], 0)
    finally:
        experts._forward = forward


def the_attention_raises_while_the_peer_is_idle(model: Any, group: tf.EPGroup) -> None:
    """Rank 0's, in compiled code between two operators."""
    if group.rank == 1:
        model.expert_parallel.finish()
    torch.library.define("tokenferry_tests::boom", "(Tensor hidden) -> Tensor")
    torch.library.impl("tokenferry_tests::boom", "CompositeExplicitAutograd")(_boom_while_decoding)
    torch.library.register_fake("tokenferry_tests::boom")(torch.empty_like)
    norm = model.model.layers[1].input_layernorm
    forward = norm.forward
    with replaced(norm, lambda hidden: torch.ops.tokenferry_tests.boom(forward(hidden))):
        generate(model, WORK[0], 0)


def _boom_while_decoding(hidden: torch.Tensor) -> torch.Tensor:
    if hidden.shape[1] == 1:
        raise RuntimeError("boom")
    return hidden.clone()


def boom(*_: object, **__: object) -> None:
    """A module's forward that raises."""
    raise RuntimeError("boom")


@contextlib.contextmanager
def replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it a module has another forward. Afterwards it is as before, for the compiler too."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


SCENARIOS = {each.__name__: each for each in (a_peer_raises, the_experts_raise, the_attention_raises_while_the_peer_is_idle)}
