"""Which models get CUDA graphs, which caches are kept for them, and what of a cache a recording must not miss."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import tokenferry as tf
from tokenferry.errors import ConfigError
from tokenferry.integrations.transformers import from_config
from tokenferry.integrations.transformers.cache_state import HostState, NotRecordable, check_kind, is_plain, phase_of
from tokenferry.integrations.transformers.fixed_inputs import FixedInputs, shape_key
from tokenferry.integrations.transformers.graph_choice import make_graphs
from tokenferry.integrations.transformers.graphed_generation import without_graphs
from tokenferry.integrations.transformers.static_caches import (
    MOST_KEPT,
    MOST_KEPT_BYTES,
    StaticCaches,
    expected_bytes,
    num_bytes,
)
from tokenferry.testing.tiny_models import tiny_config

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs

CPU = torch.device("cpu")
FULL = tiny_config("qwen3_moe")
SLIDING = tiny_config("gpt_oss")


# --- which models -----------------------------------------------------------------------------------------------------------


def loaded(asked: Any, *, device: str = "cuda", collective: bool = False, exact: bool = False, kernels: bool = True) -> Any:
    """What `make_graphs` looks at of a model of two layers."""
    transport = SimpleNamespace(counts_pass_through_hosts=collective)
    workspace = SimpleNamespace(
        device=torch.device(device), active_transport=transport, transport="collective" if collective else "p2p"
    )
    layers = [SimpleNamespace(kernels=SimpleNamespace(holds=True) if kernels else None, module=None) for _ in range(2)]
    return SimpleNamespace(options=SimpleNamespace(cuda_graphs=asked, exact=exact), workspace=workspace, layers=layers)


def has_graphs(model: Any) -> bool:
    return make_graphs(model, lambda _: None, lambda: None) is not None  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("asked", [True, "auto"])
def test_graphs_on_gpus(asked: Any) -> None:
    assert has_graphs(loaded(asked))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(loaded(False), id="not-wanted"),
        pytest.param(loaded("auto", device="cpu"), id="cpu"),
        pytest.param(loaded("auto", collective=True), id="collective"),
        pytest.param(loaded("auto", exact=True), id="exact"),
    ],
)
def test_no_graphs_and_not_a_word(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert not has_graphs(model)
    assert caplog.messages == []


def test_no_graphs_where_the_librarys_function_runs_experts_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    assert not has_graphs(loaded("auto", kernels=False))
    [(_, level, line)] = caplog.record_tuples
    assert level == logging.WARNING
    assert "transformers' own function runs the experts of 2 of 2 MoE layers" in line
    assert has_graphs(loaded(True, kernels=False))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        pytest.param(loaded(True, collective=True), "load the model with transport='p2p' or 'nvls'", id="collective"),
        pytest.param(loaded(True, exact=True), "load the model without it", id="exact"),
    ],
)
def test_asking_for_what_cannot_be_is_refused(model: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"cuda_graphs=True, but .*{reason}"):
        has_graphs(model)


@pytest.mark.parametrize(
    ("asked", "message"), [(True, "but the group's device is cpu"), ("always", "must be True, False or \"auto\", got 'always'")]
)
def test_what_is_wrong_is_said_before_anything_is_loaded(asked: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_config(FULL, group=tf.EPGroup(device="cpu"), max_tokens_per_rank=4, cuda_graphs=asked)


# --- the compiler's own graphs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "mode", "options"),
    [
        ({}, "default", None),
        ({"mode": "max-autotune"}, "max-autotune-no-cudagraphs", None),
        ({"mode": "default", "dynamic": True}, "default", None),
        ({"options": {"max_autotune": True}}, None, {"max_autotune": True, "triton.cudagraphs": False}),
    ],
    ids=["transformers'-default", "max-autotune", "default", "options"],
)
def test_the_compiler_makes_no_graphs_of_its_own(asked: Any, mode: Any, options: Any) -> None:
    before = CompileConfig(**asked)
    config = without_graphs(before)
    assert (config.mode, config.options, config.dynamic) == (mode, options, before.dynamic)
    assert before == CompileConfig(**asked)


# --- caches that are kept ---------------------------------------------------------------------------------------------------


class Lender:
    """`StaticCaches`, and how long the caches are that it had made."""

    def __init__(self) -> None:
        self.caches, self.made = StaticCaches(), list[int]()

    def lend(self, batch: int, num_tokens: int) -> StaticCache:
        def make(length: int) -> StaticCache:
            self.made.append(length)
            return filled(StaticCache(config=FULL, max_cache_len=length), batch)

        cache = self.caches.lend(batch, num_tokens, make)
        self.caches.take_back()
        return cache


def filled(cache: StaticCache, batch: int = 1, num_tokens: int = 3) -> StaticCache:
    for layer in range(len(cache.layers)):
        cache.update(torch.ones(batch, 2, num_tokens, 16), torch.ones(batch, 2, num_tokens, 16), layer)
    return cache


def test_a_cache_is_lent_again_empty() -> None:
    lender = Lender()
    first = lender.lend(1, 50)
    again = lender.lend(1, 60)
    assert again is first
    assert again.get_seq_length() == 0
    assert not again.layers[0].keys.any()
    assert lender.made == [64]


@pytest.mark.parametrize(("batch", "num_tokens"), [(2, 60), (1, 65), (1, 20)], ids=["batch", "too-short", "much-too-long"])
def test_another_cache_is_made_where_none_fits(batch: int, num_tokens: int) -> None:
    lender = Lender()
    lender.lend(1, 128 if num_tokens == 20 else 60)
    lender.lend(batch, num_tokens)
    assert len(lender.made) == 2


def test_the_shortest_that_fits_is_lent() -> None:
    lender = Lender()
    long, short = lender.lend(1, 190), lender.lend(1, 120)
    assert lender.lend(1, 125) is short
    assert lender.lend(1, 150) is long


def test_one_that_is_lent_is_not_lent_twice() -> None:
    caches = StaticCaches()
    assert caches.lend("kind", 8, new) is not caches.lend("kind", 8, new)


def test_those_that_were_used_last_are_kept() -> None:
    lender = Lender()
    first = lender.lend(1, 8)
    for batch in range(2, MOST_KEPT + 1):
        lender.lend(batch, 8)
    assert lender.lend(1, 8) is first
    lender.lend(MOST_KEPT + 1, 8)  # in the place of the second
    num_made = len(lender.made)
    assert lender.lend(1, 8) is first
    lender.lend(2, 8)
    assert len(lender.made) == num_made + 1


def test_large_ones_are_not_kept_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenferry.integrations.transformers.static_caches.num_bytes", lambda _: MOST_KEPT_BYTES + 1)
    lender = Lender()
    first = lender.lend(1, 8)
    assert lender.lend(1, 8) is first
    lender.lend(2, 8)
    assert lender.lend(1, 8) is not first


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_the_bytes_of_a_cache_are_known_before_it_is_made(family: str) -> None:
    config = tiny_config(family)
    cache = StaticCache(config=config, max_cache_len=32)
    heads, latent = config.num_key_value_heads, family == "deepseek_v3"
    keys = torch.ones(3, heads, 1, config.qk_nope_head_dim + config.qk_rope_head_dim if latent else config.head_dim)
    values = torch.ones(3, heads, 1, config.v_head_dim if latent else config.head_dim)
    for layer in range(len(cache.layers)):
        cache.update(keys, values, layer)
    counters = sum(layer.cumulative_length.nbytes for layer in cache.layers)
    assert expected_bytes(config, 3, 32, torch.float32) == num_bytes(cache) - counters


def new(length: int) -> StaticCache:
    return StaticCache(config=FULL, max_cache_len=length)


# --- what the host keeps of a cache -----------------------------------------------------------------------------------------


def decode(cache: StaticCache) -> None:
    """What a decode forward does to it."""
    for layer in range(len(cache.layers)):
        cache.update(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), layer)


@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
def test_replays_count_what_the_host_counts(config: Any) -> None:
    cache = filled(StaticCache(config=config, max_cache_len=64))
    before = HostState(cache)
    decode(cache)
    state = before.replays(HostState(cache))
    counts = [getattr(layer, "cumulative_length_int", None) for layer in cache.layers]
    assert state.holds()
    state.advance()
    expected = [None if count is None else count + 1 for count in counts]
    assert [getattr(layer, "cumulative_length_int", None) for layer in cache.layers] == expected


def test_a_window_has_two_phases() -> None:
    cache = filled(StaticCache(config=SLIDING, max_cache_len=64), num_tokens=14)
    phases = []
    for _ in range(4):
        phases.append(any(phase_of(cache)))
        decode(cache)
    assert phases == [False, False, True, True]
    assert not is_plain(cache)
    assert is_plain(new(8))


def test_a_state_is_restored() -> None:
    cache = filled(StaticCache(config=SLIDING, max_cache_len=64))
    before = HostState(cache)
    kept = [dict(vars(layer)) for layer in cache.layers]
    decode(cache)
    cache.layers[0].keys, cache.layers[0].more = torch.zeros(1), 3  # type: ignore[union-attr]
    before.restore()
    assert [
        [value is vars(layer)[name] for name, value in values.items()] for layer, values in zip(cache.layers, kept, strict=True)
    ]
    assert not hasattr(cache.layers[0], "more")


def test_other_tensors_in_the_place_of_those_that_were_recorded_are_noticed() -> None:
    cache = filled(new(16))
    before = HostState(cache)
    decode(cache)
    state = before.replays(HostState(cache))
    cache.reorder_cache(torch.zeros(1, dtype=torch.long))
    assert not state.holds()


class Growing(StaticLayer):
    """A layer that no replay could follow."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = getattr(self, "seen", 0) + 2
        return super().update(*args, **kwargs)


def test_a_layer_that_changes_on_the_host_is_refused() -> None:
    cache = new(16)
    cache.layers[1] = Growing(16)
    filled(cache)
    before = HostState(cache)
    decode(cache)
    with pytest.raises(NotRecordable, match="each forward changes `seen` of a Growing of its cache"):
        before.replays(HostState(cache))


def test_a_layer_that_keeps_a_list_is_refused() -> None:
    cache = filled(new(16))
    vars(cache.layers[0])["history"] = []
    with pytest.raises(NotRecordable, match="`history` of a StaticLayer of its cache is a list"):
        HostState(cache)


@pytest.mark.parametrize("cache", [DynamicCache(), None, "text"], ids=["dynamic", "none", "text"])
def test_other_caches_are_refused(cache: Any) -> None:
    with pytest.raises(NotRecordable, match=f"its cache is a {type(cache).__name__}"):
        check_kind(cache)


# --- arguments --------------------------------------------------------------------------------------------------------------


def arguments(batch: int = 2, **others: Any) -> dict[str, Any]:
    ids = torch.arange(batch).reshape(batch, 1)
    return {"input_ids": ids, "attention_mask": {"full": ids.float(), "none": None}, "use_cache": True, **others}


@pytest.mark.parametrize(
    "other",
    [arguments(3), arguments(use_cache=False), arguments(position_ids=torch.zeros(1)), arguments(attention_mask=None)],
    ids=["batch", "value", "more", "mask"],
)
def test_arguments_that_share_no_recording(other: dict[str, Any]) -> None:
    assert shape_key(arguments()) == shape_key(arguments())
    assert shape_key(other) != shape_key(arguments())


def test_fixed_inputs_are_filled_in_place_and_are_not_the_callers() -> None:
    first, cache = arguments(past_key_values=new(8)), new(8)
    fixed = FixedInputs(first, CPU)
    given = fixed.arguments({**arguments(), "past_key_values": cache})
    assert given["past_key_values"] is cache
    assert given["input_ids"].data_ptr() != first["input_ids"].data_ptr()
    address = given["attention_mask"]["full"].data_ptr()
    second = arguments()
    second["attention_mask"]["full"] += 5
    fixed.fill(second)
    assert torch.equal(given["attention_mask"]["full"], second["attention_mask"]["full"])
    assert given["attention_mask"]["full"].data_ptr() == address
