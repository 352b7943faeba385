"""Experts with float8 weights on a GPU beside the library's operators on a CPU, with few rows an expert and with many."""

import copy
import dataclasses

import pytest
import torch

import tokenferry as tf
from quantized_experts import differing_terms, quantized_terms
from test_experts import Case
from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched
from tokenferry.experts import Experts

pytestmark = pytest.mark.gpu

CASES = {
    "swiglu": Case(dtype=torch.bfloat16, hidden_size=272, intermediate_size=256),
    "swiglu-bias-float16": Case(bias=True, dtype=torch.float16, hidden_size=144, intermediate_size=128),
    "relu-last-part-short": Case(Activation("relu"), True, torch.bfloat16, hidden_size=400, intermediate_size=160),
    "interleaved": Case(Activation("clamped_swiglu", interleaved=True), True, torch.bfloat16, 256, 128),
}
FEW, MANY = 20, 400
"""Rows, of which each of seven experts gets three sevenths."""


def on_gpu(rows: Dispatched) -> Dispatched:
    moved = {name: getattr(rows, name).cuda() for name in ("hidden", "topk_idx", "topk_weights", "valid_tokens")}
    return dataclasses.replace(rows, **moved)


def quantized(rows: Dispatched) -> Dispatched:
    return dataclasses.replace(rows, hidden=tf.reference.quantize(rows.hidden))


def both(name: str, num_rows: int) -> tuple[Experts, Experts, Dispatched]:
    """Experts on a CPU, the same on a GPU, and rows on the CPU."""
    experts, rows = dataclasses.replace(CASES[name], num_rows=num_rows).build()
    experts.quantize()
    return experts, copy.deepcopy(experts).cuda(), rows


@pytest.mark.parametrize("num_rows", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("name", CASES)
def test_float8_experts_are_near_the_library_s_operators(name: str, num_rows: int) -> None:
    """A sum in another order moves some activated numbers by a step of float8."""
    plain, ours, rows = both(name, num_rows)
    expected, got = plain(rows).float(), ours(on_gpu(rows))
    assert (got.cpu().float() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("num_rows", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("name", CASES)
def test_rows_that_come_quantized_give_the_same_bits(name: str, num_rows: int) -> None:
    _, ours, rows = both(name, num_rows)
    rows = on_gpu(rows)
    assert torch.equal(ours(quantized(rows)), ours(rows))


@pytest.mark.parametrize("num_rows", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("name", ["swiglu", "relu-last-part-short"])
def test_the_sum_is_quantized_as_the_specification_says(name: str, num_rows: int) -> None:
    _, ours, rows = both(name, num_rows)
    assert not differing_terms(*quantized_terms(ours, on_gpu(rows), num_rows))


@pytest.mark.parametrize("name", ["swiglu", "interleaved"])
def test_a_row_alone_has_the_bits_that_it_has_among_others(name: str) -> None:
    _, ours, rows = both(name, MANY)
    ours.batch_invariant = True
    rows = on_gpu(rows)
    one = dataclasses.replace(
        rows, hidden=rows.hidden[:1], topk_idx=rows.topk_idx[:1], topk_weights=rows.topk_weights[:1],
        valid_tokens=torch.ones_like(rows.valid_tokens),
    )  # fmt: skip
    assert torch.equal(ours(one), ours(rows)[:1])
