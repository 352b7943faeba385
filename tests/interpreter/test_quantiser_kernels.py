"""The experts' own quantiser, interpreted: the bits of `tokenferry.reference.quantize`."""

import pytest
import torch
import triton
import triton.language as tl

import tokenferry as tf
from quantiser import difficult_rows
from tokenferry.kernels import expert_math, expert_quantize
from tokenferry.testing import run_ranks
from tokenferry.testing.numeric import first_difference

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}


def experts_quantizer(group: tf.EPGroup, columns: int, dtype: torch.dtype) -> list[str]:
    rows = difficult_rows(dtype, columns)
    wanted, num_rows = tf.reference.quantize(rows), rows.shape[0]
    values, scales = torch.empty_like(wanted.values), torch.full_like(wanted.scales, 7.0)
    count = torch.tensor([num_rows], dtype=torch.int32)
    expert_quantize.quantize_rows_kernel[(2,)](
        rows, count, count, values, scales, 0, num_rows, L=1, X=columns, IS_FIRST_PRODUCT=True, MIN_ROWS=1, LANES=1, PDL=0
    )
    return [
        first_difference(values.view(torch.uint8), wanted.values.view(torch.uint8)),
        first_difference(scales.view(torch.int32), wanted.scales.view(torch.int32)),
    ]


@pytest.mark.parametrize("columns", [128, 2880], ids=lambda columns: f"H{columns}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_experts_quantize_rows_to_the_bits_of_the_specification(dtype: torch.dtype, columns: int) -> None:
    assert run_ranks(experts_quantizer, 1, columns, dtype, env=INTERPRETER, timeout_s=240) == [["", ""]]


@triton.jit
def powers_of_two(rows, values, scales):
    row = tl.arange(0, 16)
    column = tl.arange(0, 128)
    x = tl.load(rows + row[:, None] * 128 + column[None, :])
    value, scale = expert_math.quantize(x, POWER_OF_TWO=True)
    tl.store(values + row[:, None] * 128 + column[None, :], value)
    tl.store(scales + row, scale)


def scales_of_powers_of_two(group: tf.EPGroup) -> list[str]:
    rows = torch.zeros(16, 128)
    difficult = difficult_rows(torch.float32, 128)
    rows[: difficult.shape[0]] = difficult
    wanted = tf.reference.quantize(rows, power_of_two_scales=True)
    values, scales = torch.empty_like(wanted.values), torch.empty(16)
    powers_of_two[(1,)](rows, values, scales)
    return [
        first_difference(values.view(torch.uint8), wanted.values.view(torch.uint8)),
        first_difference(scales.view(torch.int32), wanted.scales[:, 0].contiguous().view(torch.int32)),
    ]


def test_scales_rounded_up_to_powers_of_two_have_the_bits_of_the_specification() -> None:
    assert run_ranks(scales_of_powers_of_two, 1, env=INTERPRETER, timeout_s=240) == [["", ""]]
