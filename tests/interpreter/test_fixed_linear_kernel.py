"""The dense product of batch-invariant layers, interpreted: every shape of tiles, and rows alone beside rows among others."""

import pytest
import torch

import tokenferry as tf
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}
SHAPES = {"one-tile": (5, 64, 16), "odd": (67, 76, 19), "steps": (3, 256, 40), "wide": (2, 40, 1030)}
"""T, D, N."""
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def everything(group: tf.EPGroup) -> tuple[dict[str, float], list[bool], list[list[float]]]:
    from tokenferry.kernels.fixed_linear import fixed_linear  # here: whether kernels are interpreted is settled by then

    errors, same = {}, []
    for name, (T, D, N) in SHAPES.items():
        for dtype, tolerance in TOLERANCE.items():
            torch.manual_seed(5)
            rows, weight, bias = torch.randn(T, D, dtype=dtype), torch.randn(N, D, dtype=dtype), torch.randn(N, dtype=dtype)
            expected = rows.double() @ weight.double().T + bias.double()
            got = fixed_linear(rows, weight, bias, dtype)
            errors[f"{name}-{dtype}"] = ((got.double() - expected).abs().max() / expected.abs().max()).item() / tolerance
            same += [torch.equal(fixed_linear(rows[i : i + 1], weight, bias, dtype), got[i : i + 1]) for i in (0, T - 1)]
    example = fixed_linear(
        torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 1], [0, 2]]), torch.tensor([10.0, 20]), torch.float32
    )
    return errors, same, example.tolist()


@pytest.fixture(scope="module")
def said() -> tuple[dict[str, float], list[bool], list[list[float]]]:
    return run_ranks(everything, 1, env=INTERPRETER)[0]


def test_it_equals_a_float64_product(said) -> None:
    assert {name: error for name, error in said[0].items() if not error <= 1} == {}


def test_a_row_alone_has_the_same_bits(said) -> None:
    assert all(said[1])


def test_the_worked_example(said) -> None:
    assert said[2] == [[13.0, 24.0], [17.0, 28.0]]
