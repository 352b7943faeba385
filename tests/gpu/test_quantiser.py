"""The quantiser's kernels on a GPU: the bits of `tokenferry.reference.quantize`, on the CPU and on the GPU."""

import pytest
import torch

import tokenferry as tf
from quantiser import difficult_rows
from tokenferry.experts import quantize_weights
from tokenferry.kernels.expert_quantize import quantize_rows_kernel
from tokenferry.testing.numeric import first_difference

pytestmark = pytest.mark.gpu


def many_rows(dtype: torch.dtype, columns: int) -> torch.Tensor:
    """The difficult ones, and rows of every magnitude that the dtype has."""
    generator = torch.Generator().manual_seed(3)
    magnitudes = torch.logspace(-38, 38, 300) if dtype != torch.float16 else torch.logspace(-7, 4.5, 300)
    return torch.cat(
        [difficult_rows(dtype, columns), (torch.randn(300, columns, generator=generator) * magnitudes[:, None]).to(dtype)]
    )


def same_as_specified(values: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor) -> None:
    wanted = tf.reference.quantize(rows)
    assert not first_difference(scales.cpu().view(torch.int32), wanted.scales.view(torch.int32))
    assert not first_difference(values.cpu().view(torch.uint8), wanted.values.view(torch.uint8))


@pytest.mark.parametrize("columns", [128, 2880, 7168], ids=lambda columns: f"H{columns}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_specification_gives_the_same_bits_on_a_gpu(dtype: torch.dtype, columns: int) -> None:
    rows = many_rows(dtype, columns)
    got = tf.reference.quantize(rows.cuda())
    same_as_specified(got.values, got.scales, rows)


@pytest.mark.parametrize("columns", [128, 2880, 7168], ids=lambda columns: f"H{columns}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_experts_quantize_rows_to_the_bits_of_the_specification(dtype: torch.dtype, columns: int) -> None:
    rows = many_rows(dtype, columns)
    num_rows = rows.shape[0]
    values = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device="cuda")
    scales = torch.empty((num_rows, -(-columns // 128)), device="cuda")
    count = torch.tensor([num_rows], dtype=torch.int32, device="cuda")
    constants = {"L": 1, "X": columns, "IS_FIRST_PRODUCT": True, "MIN_ROWS": 1, "LANES": 1, "PDL": 0}
    quantize_rows_kernel[(64,)](rows.cuda(), count, count, values, scales, 0, num_rows, **constants)
    same_as_specified(values, scales, rows)


def test_weights_are_quantized_to_the_bits_of_the_cpu() -> None:
    """CUDA multiplies by the reciprocal of a number that it is told to divide by."""
    weights = torch.randn(3, 400, 272, generator=torch.Generator().manual_seed(1))
    (values, scales), (wanted, wanted_scales) = quantize_weights(weights.cuda()), quantize_weights(weights)
    assert not first_difference(scales.cpu().view(torch.int32), wanted_scales.view(torch.int32))
    assert not first_difference(values.cpu().view(torch.uint8), wanted.view(torch.uint8))
