"""`generate()` with decode steps that are recorded and replayed, on one rank without a GPU: tokens, what is recorded when, what
runs eagerly, and what the log says. `recorded_calls.py` stands in for CUDA graphs."""

import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

import tokenferry as tf
from graphed_model import LENGTH, Graphed
from recorded_calls import NOT_PERMITTED, StandIn
from tokenferry.integrations.transformers.compiled_forwards import CompiledBySize
from tokenferry.integrations.transformers.decode_graphs import MOST_GRAPHS, DecodeGraphs
from tokenferry.integrations.transformers.graph_choice import StepGraphs
from tokenferry.integrations.transformers.idle_graph import IdleGraph
from tokenferry.integrations.transformers.static_caches import MOST_KEPT
from tokenferry.testing.tiny_models import make_tiny
from transformers_work import load, prompts, quiet, unmodified

pytestmark = [
    pytest.mark.filterwarnings("default"),  # transformers warns of its own affairs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's compiler uses what PyTorch deprecates
]

TAKES_STATIC = "generate() takes a static cache, so that decode steps are CUDA graphs"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: make_tiny(family, folder / family) for family in ("qwen3_moe", "gpt_oss", "deepseek_v3")}


@pytest.fixture(params=["qwen3_moe"])
def graphed(request: pytest.FixtureRequest, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphed]:
    # On CPUs a dispatch looks at its ids, which waits for the device, and grouped_mm at the rows of each expert.
    monkeypatch.setattr("tokenferry.dispatcher.ids_out_of_range", lambda *_: None)
    quiet()
    path, stand_in = paths[request.param], StandIn()
    model = load(path, tf.EPGroup(device="cpu"), dtype=torch.float32, experts_implementation="batched_mm")
    parallel = model.expert_parallel
    decode = DecodeGraphs(parallel.workspace, parallel._end_step, stand_in)
    parallel.graphs = StepGraphs(
        decode,
        IdleGraph(parallel.workspace, parallel._run_without_tokens, parallel._end_step, stand_in),
        parallel.layers,
    )
    yield Graphed(model, unmodified(path, dtype=torch.float32), stand_in)
    parallel.close()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="tokenferry.integrations")
    return caplog


# --- the same tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphed", ["qwen3_moe", "gpt_oss", "deepseek_v3"], indirect=True)
def test_tokens_of_the_unmodified_model_from_replays(graphed: Graphed) -> None:
    graphed.expect_equal(new_tokens=20)
    assert graphed.stand_in.num_replayed >= 16


@pytest.mark.parametrize("graphed", ["qwen3_moe", "gpt_oss"], indirect=True)
def test_a_padded_batch(graphed: Graphed) -> None:
    """Of gpt_oss until its windows, of 16 tokens, are full and move on from the padding."""
    ids = torch.tensor(prompts((LENGTH, LENGTH), 1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = graphed.plain.generate(ids, attention_mask=mask, max_new_tokens=14)
    assert graphed.model.generate(ids, attention_mask=mask, max_new_tokens=14).tolist() == expected.tolist()
    assert graphed.stand_in.num_replayed >= 10


def test_each_batch_size_has_a_graph_of_its_own_and_keeps_it(graphed: Graphed) -> None:
    for _ in range(2):
        for batch in (1, 2, 3):
            graphed.expect_equal(batch)
    assert graphed.stand_in.num_recorded == graphed.decode.num_graphs == 3


def test_a_prompt_in_parts(graphed: Graphed) -> None:
    graphed.expect_equal(batch=1, prefill_chunk_size=4)
    assert graphed.stand_in.num_replayed == 5  # the last part of the prompt, of one token, has warmed up


def test_a_cache_of_the_caller(graphed: Graphed) -> None:
    for _ in range(2):
        graphed.expect_equal(past_key_values=StaticCache(config=graphed.model.config, max_cache_len=20))
    assert graphed.stand_in.num_recorded == 2


@pytest.mark.parametrize("graphed", ["gpt_oss"], indirect=True)
def test_a_window_that_fills_while_decoding_takes_a_second_graph(graphed: Graphed) -> None:
    """Of 16 tokens; for both it warms up first."""
    graphed.expect_equal(new_tokens=20)
    assert (graphed.stand_in.num_recorded, graphed.stand_in.num_replayed) == (2, 17)


def test_a_cache_of_the_caller_goes_when_the_caller_lets_it_go_and_its_graph_too(graphed: Graphed) -> None:
    cache = StaticCache(config=graphed.model.config, max_cache_len=20)
    graphed.expect_equal(past_key_values=cache)
    assert graphed.decode.num_graphs == 1
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    graphed.expect_equal(cache_implementation="dynamic")
    assert graphed.decode.num_graphs == 0


def test_graphs_of_caches_that_are_kept_no_longer_go(graphed: Graphed) -> None:
    for batch in range(1, MOST_KEPT + 3):
        graphed.expect_equal(batch)
    assert graphed.stand_in.num_recorded == MOST_KEPT + 2
    gc.collect()
    graphed.expect_equal(MOST_KEPT + 2)
    assert graphed.decode.num_graphs == MOST_KEPT


# --- what belongs to the caller ---------------------------------------------------------------------------------------------


def test_a_cache_that_is_returned_can_be_continued_and_ours_is_kept(graphed: Graphed) -> None:
    ids = torch.tensor(prompts((LENGTH,), 0))
    made = graphed.model.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
    keys = made.past_key_values.layers[0].keys
    before = keys.clone()
    graphed.model.generate(ids + 1, max_new_tokens=6)
    assert graphed.stand_in.num_recorded == 1
    assert torch.equal(keys, before)
    expected = graphed.plain.generate(ids, max_new_tokens=40)
    longer = graphed.model.generate(made.sequences, past_key_values=made.past_key_values, max_new_tokens=34)
    assert longer.tolist() == expected.tolist()


@pytest.mark.parametrize("graphed", ["gpt_oss"], indirect=True)
def test_a_cache_that_is_returned_grows_where_ours_could_not_be_made_one(
    graphed: Graphed, said: pytest.LogCaptureFixture
) -> None:
    ids = torch.tensor(prompts((LENGTH,), 0))
    made = graphed.model.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
    assert isinstance(made.past_key_values, DynamicCache)
    [line] = said.messages
    assert "the call returns its cache" in line


def test_a_static_cache_that_was_asked_for_is_returned(graphed: Graphed) -> None:
    ids = torch.tensor(prompts((LENGTH,), 0))
    asked = {"max_new_tokens": 6, "cache_implementation": "static"}
    made = graphed.model.generate(ids, return_dict_in_generate=True, **asked)
    keys = made.past_key_values.layers[0].keys
    before = keys.clone()
    graphed.model.generate(ids + 1, **asked)
    assert isinstance(made.past_key_values, StaticCache)
    assert torch.equal(keys, before)


def test_hidden_states_and_logits_of_each_step_are_kept(graphed: Graphed) -> None:
    ids = torch.tensor(prompts((LENGTH,), 0))
    asked = {"output_hidden_states": True, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 6}
    made, expected = graphed.model.generate(ids, **asked), graphed.plain.generate(ids, **asked)
    assert graphed.stand_in.num_replayed == 4
    torch.testing.assert_close(made.logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(made.hidden_states, expected.hidden_states, rtol=0, atol=1e-4)


# --- what is taken, and said ------------------------------------------------------------------------------------------------


def test_a_static_cache_is_taken_where_none_was_named_and_the_log_says_so_once(
    graphed: Graphed, said: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        graphed.expect_equal()
    assert said.messages == [TAKES_STATIC]


def test_a_growing_cache_that_was_asked_for_runs_eagerly_and_the_log_says_so_once(
    graphed: Graphed, said: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        graphed.expect_equal(cache_implementation="dynamic")
    assert graphed.stand_in.num_recorded == 0
    [line] = said.messages
    assert "the cache 'dynamic' that was asked for cannot be part of a CUDA graph" in line


def test_beams_keep_their_own_cache(graphed: Graphed, said: pytest.LogCaptureFixture) -> None:
    ids = torch.tensor(prompts((LENGTH,), 0))
    for asked in ({}, {"cache_implementation": "static"}):
        expected = graphed.plain.generate(ids, max_new_tokens=6, num_beams=2)
        assert graphed.model.generate(ids, max_new_tokens=6, num_beams=2, **asked).tolist() == expected.tolist()
    assert graphed.stand_in.num_recorded == 0
    assert said.messages == []


# --- what cannot be recorded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphed", ["qwen3_moe", "gpt_oss"], indirect=True)
def test_a_recording_that_fails_leaves_everything_as_it_was(graphed: Graphed, said: pytest.LogCaptureFixture) -> None:
    """Of gpt_oss the host counts tokens, which the recording has counted too when it fails."""
    graphed.stand_in.fails_with = RuntimeError("no\nroom")
    for _ in range(2):
        graphed.expect_equal(new_tokens=20)
    assert graphed.decode.stopped
    assert said.messages == [
        TAKES_STATIC,
        "decode steps of generate() go on without CUDA graphs of the eager forward: RuntimeError: no room",
    ]


def test_a_forward_that_reads_the_device(graphed: Graphed, said: pytest.LogCaptureFixture) -> None:
    norm = graphed.model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda _module, _args, hidden: hidden + 0 * hidden.sum().item())
    graphed.expect_equal()
    assert said.messages[1:] == [
        f"decode steps of generate() go on without CUDA graphs of the eager forward: RuntimeError: {NOT_PERMITTED}"
    ]


def test_an_argument_of_another_kind(graphed: Graphed, said: pytest.LogCaptureFixture) -> None:
    graphed.model.generation_config.update(use_cache=True)
    forward = graphed.model.forward
    graphed.model.forward = lambda *args, note=None, **kwargs: forward(*args, **kwargs)
    prepare = graphed.model.prepare_inputs_for_generation
    graphed.model.prepare_inputs_for_generation = lambda *args, **kwargs: {**prepare(*args, **kwargs), "note": object()}
    graphed.expect_equal()
    assert said.messages[1:] == ["generate() runs decode steps eagerly: its argument note is a object"]


# --- what makes a graph out of date -----------------------------------------------------------------------------------------


def give_other_data(model: Any) -> None:
    for each in (model.lm_head.weight,):
        each.data = each.data.clone()


def add_a_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


def exchange_a_module(model: Any) -> None:
    other = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    other.weight = model.lm_head.weight
    model.lm_head = other


@pytest.mark.parametrize("change", [give_other_data, add_a_hook, exchange_a_module])
def test_a_changed_model_is_recorded_anew(graphed: Graphed, change: Any) -> None:
    graphed.expect_equal()
    change(graphed.model)
    graphed.expect_equal()
    assert graphed.stand_in.num_recorded == 2


def test_what_is_written_into_weights_is_followed(graphed: Graphed) -> None:
    graphed.expect_equal()
    for model in (graphed.model, graphed.plain):
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    graphed.expect_equal()
    assert graphed.stand_in.num_recorded == 1


def test_a_reset_lets_go_of_all_graphs(graphed: Graphed) -> None:
    graphed.expect_equal()
    graphed.model.expert_parallel.reset()
    assert graphed.decode.num_graphs == 0
    graphed.expect_equal()
    assert graphed.stand_in.num_recorded == 2


def test_at_most_so_many_graphs_are_kept(graphed: Graphed) -> None:
    ids = torch.tensor(prompts((2,), 0))
    caches = [StaticCache(config=graphed.model.config, max_cache_len=8) for _ in range(MOST_GRAPHS + 2)]
    for cache in caches:
        graphed.model.generate(ids, max_new_tokens=4, past_key_values=cache)
    assert graphed.stand_in.num_recorded == len(caches)
    assert graphed.decode.num_graphs == MOST_GRAPHS


# --- compiled forwards ------------------------------------------------------------------------------------------------------


def test_graphs_of_a_compiled_forward(graphed: Graphed, said: pytest.LogCaptureFixture) -> None:
    """Recorded once nothing is compiled any more."""
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True  # CPUs too
    torch._dynamo.reset()
    graphed.expect_equal(new_tokens=8, compile_config=config)
    assert (graphed.stand_in.num_recorded, graphed.stand_in.num_replayed) == (1, 5)
    graphed.expect_equal(new_tokens=8, compile_config=config)
    assert (graphed.stand_in.num_recorded, graphed.stand_in.num_replayed) == (1, 12)
    assert said.messages == [TAKES_STATIC]


def test_a_forward_that_does_not_compile_is_recorded_as_it_is(graphed: Graphed, said: pytest.LogCaptureFixture) -> None:
    config = CompileConfig(backend=refuse, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    graphed.expect_equal(new_tokens=8, compile_config=config)
    assert graphed.stand_in.num_replayed == 6
    assert "without CUDA graphs of the specially compiled forward: BackendCompilerFailed" in said.messages[1]


def test_each_batch_size_is_compiled_apart(graphed: Graphed, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_all(graphed, monkeypatch, "eager")
    counters.clear()
    for batch in (2, 3, 4):
        graphed.expect_equal(batch, new_tokens=20)
    assert counters["stats"]["unique_graphs"] == 3
    assert graphed.stand_in.num_replayed >= 42


def test_a_size_that_does_not_compile_is_recorded_as_it_is(
    graphed: Graphed, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    compile_all(graphed, monkeypatch, refuse)
    graphed.expect_equal(new_tokens=8)
    assert {name for name, *_ in graphed.decode._graphs} == {"eager"}
    assert "without CUDA graphs of the compiled forward: BackendCompilerFailed" in said.messages[1]


def test_a_forward_that_was_compiled_too_often_is_recorded_as_it_is(
    graphed: Graphed, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    """What dynamo raises then is no TorchDynamoException."""

    def refuse_more(*_: Any, **__: Any) -> Any:
        raise FailOnRecompileLimitHit("64 of 64")

    compile_all(graphed, monkeypatch, "eager")
    monkeypatch.setattr(CompiledBySize, "__call__", refuse_more)
    graphed.expect_equal(new_tokens=8)
    assert graphed.stand_in.num_replayed == 6
    assert "without CUDA graphs of the compiled forward: FailOnRecompileLimitHit: 64 of 64" in said.messages[1]


def compile_all(graphed: Graphed, monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """On CPUs too, and by a backend that the stand-in can follow."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **kwargs: compiled(call, backend=backend, **kwargs))
    monkeypatch.setattr(type(graphed.model), "_valid_auto_compile_criteria", lambda *_: True)
    graphed.decode.wants_compiled = True
    torch._dynamo.reset()


def refuse(*_: Any) -> Any:
    """A backend of the compiler."""
    raise RuntimeError("not today")


# --- steps without tokens ---------------------------------------------------------------------------------------------------


def test_a_rank_without_tokens_replays_its_step(graphed: Graphed) -> None:
    parallel = graphed.model.expert_parallel
    for _ in range(3):
        parallel.finish()
    assert (graphed.stand_in.num_recorded, graphed.stand_in.num_replayed) == (1, 2)
    assert parallel.take_part(done=False) == (False, 0)
    assert parallel.take_part(done=True) == (True, 0)


def test_a_step_without_tokens_is_recorded_anew_with_other_experts(graphed: Graphed) -> None:
    """A rank without tokens runs its experts on the others' rows."""
    parallel = graphed.model.expert_parallel
    for _ in range(3):
        parallel.finish()
    experts = parallel.layers[0].module
    experts.down_proj = torch.nn.Parameter(2 * experts.down_proj.detach())
    parallel.finish()
    assert (graphed.stand_in.num_recorded, graphed.stand_in.num_replayed) == (2, 3)


def test_a_step_without_tokens_that_cannot_be_recorded_runs_eagerly(graphed: Graphed, said: pytest.LogCaptureFixture) -> None:
    graphed.stand_in.fails_with = RuntimeError("no room")
    for _ in range(3):
        graphed.model.expert_parallel.finish()
    assert said.messages == [
        "steps without tokens run eagerly, since one could not be recorded as a CUDA graph: RuntimeError: no room"
    ]
