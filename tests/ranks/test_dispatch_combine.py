"""Dispatch and combine between rank processes on gloo: the bits of the reference, whatever the counts, routing and dtypes."""

import pytest
import torch
from hypothesis import given, settings

import tokenferry as tf
from cases import CASES, Case, StepCase, run_case, run_layer, same
from formats import FORMATS, FP8_COMBINE
from rank_pool import RankPools
from scenarios import PROPERTY, scenarios
from tokenferry.testing.data import make_inputs

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("name", CASES)
def test_bits_as_reference(on_ranks: RankPools, name: str) -> None:
    world_size, case = CASES[name]
    assert on_ranks(run_case, world_size, case) == [sum(step.layers for step in case.steps)] * world_size


@pytest.mark.parametrize("name", FORMATS)
def test_bits_as_reference_in_each_format(on_ranks: RankPools, name: str) -> None:
    world_size, case = FORMATS[name]
    assert on_ranks(run_case, world_size, case) == [sum(step.layers for step in case.steps)] * world_size


@pytest.mark.parametrize("name", FP8_COMBINE)
def test_bits_as_reference_of_float8_terms(on_ranks: RankPools, name: str) -> None:
    world_size, case = FP8_COMBINE[name]
    assert on_ranks(run_case, world_size, case) == [sum(step.layers for step in case.steps)] * world_size


@settings(max_examples=15, **PROPERTY)
@given(scenarios())
def test_any_scenario_gives_the_bits_of_the_reference(on_ranks: RankPools, scenario: tuple[int, Case]) -> None:
    world_size, case = scenario
    assert on_ranks(run_case, world_size, case) == [sum(step.layers for step in case.steps)] * world_size


@pytest.mark.long
@pytest.mark.timeout(900)
@settings(max_examples=600, **PROPERTY)
@given(scenarios(capacity=33))
def test_many_scenarios_give_the_bits_of_the_reference(on_ranks: RankPools, scenario: tuple[int, Case]) -> None:
    world_size, case = scenario
    assert on_ranks(run_case, world_size, case) == [sum(step.layers for step in case.steps)] * world_size


# --- two workspaces -------------------------------------------------------------------------------------------------


def two_workspaces(group: tf.EPGroup) -> None:
    small, large = Case(hidden_size=8, topk=1).config, Case(hidden_size=40, topk=4, dtype=torch.float32).config
    with (
        tf.Workspace(small, group, max_tokens_per_rank=4, transport="collective") as first,
        tf.Workspace(large, group, max_tokens_per_rank=9, transport="collective") as second,
    ):
        layers = first.dispatcher(), second.dispatcher()
        for seed in range(5):
            for ws, tokens in ((first, (3, 1)), (second, (0, 9))):
                ws.begin_step(tokens[group.rank])
            own = make_inputs(small, (3, 1), seed=seed)[group.rank]
            got = layers[0].dispatch(own.hidden, own.topk_idx, own.topk_weights)
            run_layer(second, layers[1], StepCase((0, 9), seed=seed), 0)
            same("combined", layers[0].combine(own.partial, got), layers_reference(small, seed)[group.rank])


def layers_reference(config: tf.MoEConfig, seed: int) -> list[torch.Tensor]:
    inputs = make_inputs(config, (3, 1), seed=seed)
    return tf.reference.combine([i.partial for i in inputs], (3, 1), config.dtype, config.dtype)


def test_two_workspaces_of_different_shape_interleave(on_ranks: RankPools) -> None:
    on_ranks(two_workspaces, 2)


def differing_settings(group: tf.EPGroup) -> str:
    with pytest.raises(tf.ConfigError) as caught:
        tf.Workspace(Case(hidden_size=8 + group.rank).config, group, max_tokens_per_rank=4)
    return str(caught.value)


def test_settings_that_differ_are_an_error_on_every_rank(on_ranks: RankPools) -> None:
    said = on_ranks(differing_settings, 2)
    assert said[0].startswith("hidden_size differs between ranks: rank 0 has 8, rank 1 has 9")
    assert said[1].startswith("hidden_size differs between ranks: rank 1 has 9, rank 0 has 8")


def differing_formats(group: tf.EPGroup) -> str:
    row_format = tf.RowFormat("fp8_block128", power_of_two_scales=group.rank == 1)
    with pytest.raises(tf.ConfigError) as caught:
        tf.Workspace(Case().config, group, max_tokens_per_rank=4, dispatch_format=row_format)
    return str(caught.value)


def test_formats_that_differ_are_an_error_on_every_rank(on_ranks: RankPools) -> None:
    said = "rank 0 has 'fp8_block128', rank 1 has 'fp8_block128 with power-of-two scales'; open the workspace with equal settings"
    assert on_ranks(differing_formats, 2)[0] == f"dispatch_format differs between ranks: {said}"


def equal_formats(group: tf.EPGroup) -> int:
    """One rank takes the bytes of a hidden row, the other says the same number."""
    config = Case().config
    row_bytes = config.hidden_size * config.dtype.itemsize if group.rank else None
    with tf.Workspace(config, group, max_tokens_per_rank=4, dispatch_format=tf.RowFormat("bytes", row_bytes=row_bytes)) as ws:
        return ws.dispatch_format.columns(config)


def test_formats_are_compared_and_not_their_spellings(on_ranks: RankPools) -> None:
    first, second = on_ranks(equal_formats, 2)
    assert first == second


def two_groups(group: tf.EPGroup) -> bool:
    other = tf.EPGroup.from_store(group.store, group.rank, group.size)
    third = tf.EPGroup.from_store(group.store, group.rank, group.size)
    case = Case(steps=(StepCase((2, 3)),))
    return all(run_case(each, case) == 1 for each in (other, third, group))


def test_groups_on_one_store_do_not_read_each_others_words(on_ranks: RankPools) -> None:
    assert all(on_ranks(two_groups, 2))


@pytest.mark.parametrize("transport", ["local", "collective"])
def test_ids_come_in_the_dtype_asked_for(transport: str) -> None:
    group = tf.EPGroup(device="cpu")
    with tf.Workspace(Case().config, group, max_tokens_per_rank=4, transport=transport, index_dtype=torch.int64) as ws:
        ws.begin_step(1)
        ids = torch.tensor([[3, -1]], dtype=torch.int32)
        got = ws.dispatcher().dispatch(torch.zeros(1, 16, dtype=torch.bfloat16), ids, torch.ones(1, 2))
        assert got.topk_idx.dtype == torch.int64 and got.topk_idx.tolist() == [[3, -1]]
