"""The dense products of batch-invariant layers and of routers, interpreted: every shape of tiles, rows alone and among others."""

import pytest
import torch

import tokenferry as tf
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}
SHAPES = {
    "fixed_linear": {"one-tile": (5, 64, 16), "odd": (67, 76, 19), "steps": (3, 256, 40), "wide": (2, 40, 1030)},
    "router_linear": {"one-program-a-column": (4, 64, 16), "odd": (6, 76, 9), "blocks": (2, 2100, 3)},
}
"""T, D, N."""
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def everything(group: tf.EPGroup) -> dict[str, tuple[dict[str, float], list[bool], list[list[float]]]]:
    from tokenferry.kernels.fixed_linear import fixed_linear  # here: whether kernels are interpreted is settled by then
    from tokenferry.kernels.router_linear import router_linear

    products = {"fixed_linear": fixed_linear, "router_linear": router_linear}
    return {name: everything_of(products[name], shapes) for name, shapes in SHAPES.items()}


def everything_of(product, shapes) -> tuple[dict[str, float], list[bool], list[list[float]]]:
    errors, same = {}, []
    for name, (T, D, N) in shapes.items():
        for dtype, tolerance in TOLERANCE.items():
            torch.manual_seed(5)
            rows, weight, bias = torch.randn(T, D, dtype=dtype), torch.randn(N, D, dtype=dtype), torch.randn(N, dtype=dtype)
            expected = rows.double() @ weight.double().T + bias.double()
            got = product(rows, weight, bias, dtype)
            errors[f"{name}-{dtype}"] = ((got.double() - expected).abs().max() / expected.abs().max()).item() / tolerance
            same += [torch.equal(product(rows[i : i + 1], weight, bias, dtype), got[i : i + 1]) for i in (0, T - 1)]
    example = product(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 1], [0, 2]]), torch.tensor([10.0, 20]), torch.float32)
    return errors, same, example.tolist()


@pytest.fixture(scope="module")
def said() -> dict[str, tuple[dict[str, float], list[bool], list[list[float]]]]:
    return run_ranks(everything, 1, env=INTERPRETER, timeout_s=240)[0]


@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_a_float64_product(said, name) -> None:
    assert {case: error for case, error in said[name][0].items() if not error <= 1} == {}


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_alone_has_the_same_bits(said, name) -> None:
    assert all(said[name][1])


@pytest.mark.parametrize("name", SHAPES)
def test_the_worked_example(said, name) -> None:
    assert said[name][2] == [[13.0, 24.0], [17.0, 28.0]]
