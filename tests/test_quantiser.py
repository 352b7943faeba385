"""`tokenferry.reference.quantize` against a quantiser of another make, and against numbers worked by hand."""

import math

import pytest
import torch

import tokenferry as tf
from quantiser import difficult_rows, quantize_rows
from tokenferry import reference
from tokenferry.dispatched import QuantizedRows, RowFormat
from tokenferry.testing import same_bits

NAN_CODE = 0x7F


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any-scale", "powers-of-two"])
@pytest.mark.parametrize("columns", [16, 128, 256, 2880], ids=lambda columns: f"H{columns}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_bits_are_those_of_an_independent_quantiser(dtype: torch.dtype, columns: int, power_of_two: bool) -> None:
    rows = difficult_rows(dtype, columns)
    got = reference.quantize(rows, power_of_two_scales=power_of_two)
    codes, scales = quantize_rows(rows, power_of_two=power_of_two)
    assert torch.equal(got.values.view(torch.uint8), codes)
    assert same_bits(got.scales, scales)


def test_a_scale_makes_the_largest_number_448() -> None:
    got = reference.quantize(torch.tensor([[224.0, -448.0, 1.0], [112.0, -224.0, 0.5]]))
    assert got.scales.tolist() == [[1.0], [0.5]]
    assert got.values.float().tolist() == [[224.0, -448.0, 1.0]] * 2


def test_zeros_have_a_scale_that_can_be_divided_by() -> None:
    got = reference.quantize(torch.zeros(1, 16))
    assert got.scales.item() == torch.tensor(1e-4).div(448).item()
    assert got.dequantize().abs().max().item() == 0


@pytest.mark.parametrize("fault", [math.nan, -math.nan, math.inf, -math.inf], ids=["nan", "minus-nan", "inf", "minus-inf"])
def test_a_block_with_a_nan_or_an_infinity_is_nan_as_a_whole_and_no_other(fault: float) -> None:
    rows = torch.ones(1, 256, dtype=torch.bfloat16)
    rows[0, 130] = fault
    got = reference.quantize(rows)
    assert got.scales[0, 0].item() > 0 and got.scales.view(torch.int32)[0, 1].item() == 0x7FC00000
    assert got.values.view(torch.uint8)[0, 128:].tolist() == [NAN_CODE] * 128
    assert got.dequantize()[0, :128].tolist() == [1.0] * 128 and bool(got.dequantize()[0, 128:].isnan().all())


@pytest.mark.parametrize("found", [1, 3], ids=["too-few", "too-many"])
def test_rows_without_a_scale_for_every_128_columns_stand_for_nothing(found: int) -> None:
    rows = QuantizedRows(torch.zeros(2, 144, dtype=torch.float8_e4m3fn), torch.ones(2, found))
    with pytest.raises(tf.ShapeError, match=f"scales have {found} columns but values have 144, which need 2"):
        rows.dequantize()


def test_dequantized_rows_are_within_a_sixteenth_of_what_they_stand_for() -> None:
    rows = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    got = reference.quantize(rows).dequantize(torch.float32)
    smallest = rows.abs().amax() / 448 * 2**-6  # of a normal float8; below, the steps are of one size
    assert bool(((got - rows).abs() <= rows.abs() / 16 + smallest / 16).all())


def test_no_rows_have_no_scales() -> None:
    got = reference.quantize(torch.empty(0, 130))
    assert got.shape == (0, 130) and got.scales.shape == (0, 2) and got.dequantize().shape == (0, 130)


def test_a_part_of_the_rows_is_a_view() -> None:
    rows = reference.quantize(torch.ones(4, 130))
    part = rows[1:3]
    assert part.shape == (2, 130) and part.scales.shape == (2, 2)
    assert part.values.data_ptr() == rows.values[1:].data_ptr()


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden_size", "wanted"), [(7168, 7392), (2880, 2976), (2048, 2112), (256, 272)])
def test_bytes_of_a_quantized_row_in_a_message(hidden_size: int, wanted: int) -> None:
    config = tf.MoEConfig(hidden_size=hidden_size, num_experts=2, topk=1)
    assert RowFormat.of("fp8_block128").wire_bytes(config) == wanted


def test_bytes_have_the_size_of_a_hidden_row_unless_another_is_given() -> None:
    config = tf.MoEConfig(hidden_size=24, num_experts=2, topk=1)
    assert [RowFormat.of("bytes").wire_bytes(config), RowFormat(name="bytes", row_bytes=7).wire_bytes(config)] == [48, 7]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "fp4"}, "one of same, fp8_block128, bytes, got 'fp4'"),
        ({"name": "bytes", "row_bytes": 0}, "row_bytes must be a positive int, got 0"),
        ({"name": "same", "row_bytes": 64}, "row_bytes is 64 but hidden_size gives that of format 'same'"),
        ({"name": "bytes", "power_of_two_scales": True}, "rows of format 'bytes' have no scales"),
        ({"name": "fp8_block128", "power_of_two_scales": 1}, "power_of_two_scales must be a bool, got 1"),
    ],
    ids=["unknown", "no-bytes", "bytes-of-same", "scales-of-bytes", "not-a-bool"],
)
def test_formats_that_cannot_be(given: dict, said: str) -> None:
    with pytest.raises(tf.ConfigError, match=said):
        RowFormat(**given)


# --- dispatch by the specification ------------------------------------------------------------------------------------


def test_the_specification_of_dispatch_quantizes_what_is_not_yet() -> None:
    plain, ready = torch.full((1, 16), 2.0), reference.quantize(torch.full((2, 16), 4.0))
    ids, weights = [torch.zeros(1, 1), torch.zeros(2, 1)], [torch.ones(1, 1), torch.ones(2, 1)]
    got = reference.dispatch([plain, ready], ids, weights, dispatch_format="fp8_block128")
    assert got.hidden.dequantize()[:, 0].tolist() == [2.0, 4.0, 4.0]


def test_rows_that_are_not_supplied_are_zero_bytes() -> None:
    hidden, ids, _ = reference.pad_rows(reference.quantize(torch.ones(1, 16)), torch.zeros(1, 1), torch.ones(1, 1), 3)
    assert hidden.values.float()[1:].abs().max().item() == 0 and hidden.scales[1:].tolist() == [[0.0], [0.0]]
    assert ids.flatten().tolist() == [0, -1, -1]
