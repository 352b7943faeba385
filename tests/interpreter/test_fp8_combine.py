"""Combine of float8 terms over symmetric memory, interpreted: in slots and in bulk, the bits of the reference."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

import switch
import tokenferry as tf
from cases import Case, run_case
from formats import FLOAT8, FORMATS, FP8_COMBINE, plain
from rank_pool import RankPools
from tokenferry.dispatched import QuantizedRows
from tokenferry.kernels import fp8_rows, wire_float8
from tokenferry.testing import run_ranks

from .test_few_tokens import FewTokensOnly
from .test_formats import INTERPRETER, SmallSlots, many
from .test_symmetric import random_steps

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_named_cases_give_the_bits_of_the_reference(world_size: int) -> None:
    every = [case for size, case in FP8_COMBINE.values() if size == world_size]
    cases = [dataclasses.replace(case, transport="p2p", counts="uneven") for case in every]
    expected = [sum(step.layers for step in case.steps) for case in cases]
    assert run_ranks(many, world_size, cases, env=INTERPRETER, timeout_s=120) == [expected] * world_size


def slots_and_bulk(world_size: int, **changed: object) -> Case:
    """Steps in slots before, between and after bulk ones. In bulk, terms that are handed over are copied to where the peers fetch
    them, and those in `combine_input()` are there."""
    empty = (0,) * (world_size - 1)
    bulk, few = (7, *empty), (3,) * world_size
    steps = (
        plain(few, layers=2),
        plain(bulk, layers=2),
        plain((*empty, 7), halves=True, quantized_terms=True),
        plain(few, layers=2, own_buffer=True, quantized_terms=True),
        plain((0,) * world_size, layers=2),
        plain((5,) * world_size, own_buffer=True, quantized_terms=True, layers=2),
        plain((2, *empty), layers=3, partial_dtype=torch.float32),
        plain(bulk, supplied=(4, *empty), own_buffer=True, quantized_terms=True, spare=0),
    )
    return Case(combine_dtype=FLOAT8, capacity=7, transport=SmallSlots(), steps=steps, **changed)


MIXED = {
    "H272": {"hidden_size": 272},
    "H512-float32": {"hidden_size": 512, "dtype": torch.float32},
    "H16": {"hidden_size": 16},
    "H640-fp8-dispatch": {"hidden_size": 640, "dispatch_format": "fp8_block128"},
}


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)], ids=["EP2", "EP3"])
@pytest.mark.parametrize("name", MIXED)
def test_slots_and_bulk_in_turn(on_ranks: RankPools, name: str, world_size: int) -> None:
    case = slots_and_bulk(world_size, **MIXED[name])
    assert on_ranks(run_case, world_size, case, env=INTERPRETER) == [sum(step.layers for step in case.steps)] * world_size


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)], ids=["EP2", "EP3"])
def test_many_blocks_of_bulk_terms(on_ranks: RankPools, world_size: int) -> None:
    """A program has 256 threads here: 40 rows of H 640 are 10 blocks."""
    uneven = (40, 3, 11)[:world_size]
    steps = (
        plain((40,) * world_size),
        plain(uneven[::-1], layers=2),
        plain(uneven, partial_dtype=torch.float32),
        plain((23,) * world_size, quantized_terms=True),
        plain(uneven, quantized_terms=True, own_buffer=True),
        plain((40, 40, 0)[:world_size], halves=True),
    )
    case = Case(hidden_size=640, combine_dtype=FLOAT8, capacity=40, transport=SmallSlots(), steps=steps)
    assert on_ranks(run_case, world_size, case, env=INTERPRETER) == [sum(step.layers for step in steps)] * world_size


def in_place_or_not(group: tf.EPGroup) -> list[float]:
    """Rank 0's terms lie in place, and rank 1's are copied. Then the other way about."""
    config = tf.MoEConfig(hidden_size=640, num_experts=4, topk=2)
    found = []
    with tf.Workspace(config, group, max_tokens_per_rank=40, transport=SmallSlots(), combine_dtype=FLOAT8) as ws:
        layer, rows = ws.dispatcher(), torch.zeros(40, 640, dtype=torch.bfloat16)
        for turn in range(4):
            ws.begin_step(40)
            got = layer.dispatch(rows, torch.zeros(40, 2, dtype=torch.int32), torch.ones(40, 2))
            terms = layer.combine_input()
            terms.values.copy_(torch.ones(80, 640).to(FLOAT8))
            terms.scales.fill_(turn + 1.0)
            if (group.rank + turn) % 2:
                found += layer.combine(torch.full((80, 640), turn + 1.0), got).unique().tolist()
            else:
                found += layer.combine(terms, got).unique().tolist()
    return found


def test_ranks_may_differ_in_whether_they_copy_terms(on_ranks: RankPools) -> None:
    assert on_ranks(in_place_or_not, 2, env=INTERPRETER) == [[2.0, 4.0, 6.0, 8.0]] * 2


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)], ids=["EP2", "EP3"])
def test_random_steps_in_slots_and_bulk(on_ranks: RankPools, world_size: int) -> None:
    every = [dataclasses.replace(step, payload="normal") for step in random_steps(world_size, 24, world_size, 7)]
    steps = tuple(dataclasses.replace(step, quantized_terms=number % 3 > 0) for number, step in enumerate(every))
    case = Case(hidden_size=144, topk=3, capacity=7, transport=SmallSlots(), combine_dtype=FLOAT8, steps=steps)
    assert on_ranks(run_case, world_size, case, env=INTERPRETER) == [sum(step.layers for step in steps)] * world_size


def test_launches_for_few_tokens(on_ranks: RankPools) -> None:
    """One program sees to three flags. In slots are at most two rows."""
    steps = (
        plain((1, 7), layers=2),
        plain((2, 2), layers=2, quantized_terms=True),
        plain((0, 5), quantized_terms=True, own_buffer=True, halves=True),
        plain((2, 1)),
    )
    case = Case(hidden_size=256, combine_dtype=FLOAT8, transport=FewTokensOnly(), steps=steps)
    assert on_ranks(run_case, 2, case, env=INTERPRETER) == [sum(step.layers for step in steps)] * 2


def over_multicast(group: tf.EPGroup, cases: list[Case]) -> list[int]:
    return [run_case(group, dataclasses.replace(case, transport=switch.Nvls(), counts="uneven")) for case in cases]


ON_RANKS = pytest.mark.parametrize("world_size", [2, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 3, 4))])


@ON_RANKS
def test_named_cases_give_the_bits_of_the_reference_over_multicast(on_ranks: RankPools, world_size: int) -> None:
    cases = [case for size, case in (*FP8_COMBINE.values(), *FORMATS.values()) if size == world_size]
    expected = [sum(step.layers for step in case.steps) for case in cases]
    assert on_ranks(over_multicast, world_size, cases, env=INTERPRETER, timeout_s=150) == [expected] * world_size


def test_over_multicast(on_ranks: RankPools) -> None:
    steps = (plain((3, 0, 5)), plain((1, 2, 2), quantized_terms=True, halves=True), plain((8, 1, 0)))
    case = Case(hidden_size=272, combine_dtype=FLOAT8, dispatch_format="fp8_block128", steps=steps)
    assert on_ranks(over_multicast, 3, [case], env=INTERPRETER) == [[len(steps)]] * 3


def test_debug_mode_poisons_and_lets_pass_what_is_right(on_ranks: RankPools) -> None:
    case = slots_and_bulk(2, hidden_size=272)
    compared = on_ranks(run_case, 2, case, env={**INTERPRETER, "TOKENFERRY_DEBUG": "1"})
    assert compared == [sum(step.layers for step in case.steps)] * 2


def unwritten(group: tf.EPGroup) -> list[bool]:
    config = tf.MoEConfig(hidden_size=272, num_experts=4, topk=2)
    with tf.Workspace(config, group, max_tokens_per_rank=3, transport="p2p", combine_dtype=FLOAT8) as ws:
        layer = ws.dispatcher()
        ws.begin_step(2)
        got = layer.dispatch(torch.zeros(2, 272, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2))
        terms = layer.combine_input()
        found = [bool(terms.values.to(torch.float32).isnan().all()), bool(terms.scales.isnan().all())]
        layer.combine(terms, got)
        return found


def test_terms_that_the_experts_did_not_write_are_nan_in_debug_mode(on_ranks: RankPools) -> None:
    assert on_ranks(unwritten, 2, env={**INTERPRETER, "TOKENFERRY_DEBUG": "1"}) == [[True, True]] * 2


def nbytes(group: tf.EPGroup) -> tuple[int, int]:
    config = tf.MoEConfig(hidden_size=272, num_experts=4, topk=2)
    with tf.Workspace(config, group, max_tokens_per_rank=9, transport="p2p", combine_dtype=FLOAT8) as ws:
        return tf.Workspace.required_bytes(config, group.size, 9, transport="p2p", combine_dtype=FLOAT8), ws.nbytes


def test_required_bytes_are_those_of_the_open_workspace(on_ranks: RankPools) -> None:
    for required, held in on_ranks(nbytes, 2, env=INTERPRETER):
        assert required == held


def in_solo(group: tf.EPGroup) -> list[float]:
    config = tf.MoEConfig(hidden_size=256, num_experts=4, topk=2)
    with tf.Workspace(config, group, max_tokens_per_rank=3, transport="p2p", combine_dtype=FLOAT8) as ws, ws.solo():
        layer = ws.dispatcher()
        ws.begin_step(2)
        layer.dispatch(torch.zeros(2, 256, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2))
        terms = layer.combine_input()
        terms.values.copy_(torch.full((6, 256), 2.0).to(FLOAT8))
        terms.scales.fill_(1.5)
        return layer.combine(terms).unique().tolist()


def test_solo_has_terms_of_its_own(on_ranks: RankPools) -> None:
    assert on_ranks(in_solo, 2, env=INTERPRETER) == [[3.0]] * 2


def other_scales(group: tf.EPGroup, num_tokens: int) -> list[float]:
    """Values in `combine_input()` and scales elsewhere, in bulk: the peers fetch both from the workspace's memory."""
    config = tf.MoEConfig(hidden_size=512, num_experts=4, topk=2)
    with tf.Workspace(config, group, max_tokens_per_rank=num_tokens, transport=SmallSlots(), combine_dtype=FLOAT8) as ws:
        layer = ws.dispatcher()
        ws.begin_step(num_tokens)
        rows = torch.zeros(num_tokens, 512, dtype=torch.bfloat16)
        got = layer.dispatch(rows, torch.zeros(num_tokens, 2, dtype=torch.int32), torch.ones(num_tokens, 2))
        terms = layer.combine_input()
        terms.values.copy_(torch.full_like(rows, 2.0).repeat(group.size, 1).to(FLOAT8))
        terms.scales.fill_(100.0)
        return layer.combine(QuantizedRows(terms.values, torch.full_like(terms.scales, 1.5)), got).unique().tolist()


@pytest.mark.parametrize("num_tokens", [2, 5], ids=["slots", "bulk"])
def test_scales_of_other_memory_are_not_taken_for_those_in_place(on_ranks: RankPools, num_tokens: int) -> None:
    assert on_ranks(other_scales, 2, num_tokens, env=INTERPRETER) == [[6.0]] * 2


@triton.jit
def places_and_numbers(words, out, numbers, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    row, column = fp8_rows.place(lanes, 272)
    tl.store(out + lanes * 2, row)
    tl.store(out + lanes * 2 + 1, column)
    a, b, c, d = wire_float8.unpack_float8(tl.load(words + lanes).to(tl.uint32, bitcast=True))
    tl.store(numbers + lanes * 4, a)
    tl.store(numbers + lanes * 4 + 1, b)
    tl.store(numbers + lanes * 4 + 2, c)
    tl.store(numbers + lanes * 4 + 3, d)


def of_64_threads(group: tf.EPGroup) -> tuple[list[list[int]], bool]:
    every = torch.arange(256, dtype=torch.uint8)
    places, numbers = torch.zeros(64, 2, dtype=torch.int32), torch.zeros(256)
    places_and_numbers[(1,)](every.view(torch.int32), places, numbers, BLOCK=64)
    wanted = every.view(FLOAT8).to(torch.float32)
    return places[[16, 17, 32]].tolist(), torch.equal(numbers.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_the_example_of_place_and_what_all_float8_numbers_are() -> None:
    """272 lies behind the row, so that thread 17 has no column."""
    assert run_ranks(of_64_threads, 1, env=INTERPRETER) == [([[0, 256], [0, 272], [1, 0]], True)]
