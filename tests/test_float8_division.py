"""How compiled kernels divide by a scale, step by step in exact arithmetic: IEEE's quotients, wherever float8 can tell.

The interpreter divides by numpy, and so says nothing about the functions that GPUs get. Here these functions themselves are run:
`divide` with fused products that are rounded once from fractions, and `divide_narrow`, of which every case can be tried, with
arrays of such products.
"""

import dataclasses
import math
import types
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from quantiser import code_of, difficult_rows
from tokenferry import reference
from tokenferry.kernels import wire, wire_float8

pytestmark = pytest.mark.skipif(wire.INTERPRETED, reason="TRITON_INTERPRET=1 has another division")

SMALLEST_THAT_MATTERS = 2.0**-10
"""Half of the smallest float8: smaller quotients become zeros with their signs."""


def rounded(exact: Fraction) -> np.float32:
    """To nearest, to even. Through float64 rounded to odd, which leaves nothing in the middle that was not there."""
    near = float(exact)
    if Fraction(near) != exact and not np.float64(near).view(np.int64) & 1:
        near = math.nextafter(near, math.inf if exact > Fraction(near) else -math.inf)
    return np.float32(near)


def fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """a * b + c, rounded once. An exact zero is +0, but for -0 + -0, as IEEE has it; what is rounded to zero keeps its sign."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return np.float32(a * b) + c
    return np.copysign(rounded(exact), np.float32(1 if exact > 0 else -1))


def as_compiled(x: np.float32, scale: np.float32) -> np.float32:
    """`wire_float8.divide`, line by line, of one number."""
    language = types.SimpleNamespace(fma=fma, where=lambda condition, yes, no: yes if condition else no)
    divide = types.FunctionType(wire_float8.divide.fn.__code__, {"tl": language})
    return divide(x, scale, np.float32(1) / scale)


def numbers_of(rows: torch.Tensor, power_of_two: bool) -> list[tuple[np.float32, np.float32]]:
    """Each finite block's different numbers, with their scale."""
    scales = reference.quantize(rows, power_of_two_scales=power_of_two).scales
    found = []
    for row, of_row in zip(rows.float(), scales, strict=True):
        for block, scale in zip(row.split(128), of_row, strict=True):
            if block.isfinite().all():
                found += [(x, scale.numpy()[()]) for x in np.unique(block.numpy().view(np.int32)).view(np.float32)]
    return found


def rows_of(kind: str, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if kind == "difficult":
        return difficult_rows(dtype, 256)
    spread = torch.rand(12, 128, generator=generator) * 24 - 18
    signs = torch.randint(2, (12, 128), generator=generator) * 2 - 1
    return (signs * 2**spread * torch.logspace(-30, 30, 12, base=2)[:, None]).to(dtype)


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any-scale", "powers-of-two"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["difficult", "of-all-sizes"])
@pytest.mark.filterwarnings("ignore:(underflow|overflow) encountered:RuntimeWarning")
def test_quotients_are_those_of_ieee_wherever_float8_can_tell(kind: str, dtype: torch.dtype, power_of_two: bool) -> None:
    given = numbers_of(rows_of(kind, dtype), power_of_two)
    assert len(given) > 500
    for x, scale in given:
        quotient, wanted = as_compiled(x, scale), x / scale
        if abs(wanted) > SMALLEST_THAT_MATTERS:
            assert quotient == wanted, (x, scale)
        assert code_of(float(quotient)) == code_of(float(wanted)), (x, scale)


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38], ids=str)
@pytest.mark.filterwarnings("ignore:(underflow|overflow) encountered:RuntimeWarning")
def test_zeros_and_the_ends_of_float32_keep_their_signs(x: float) -> None:
    number = np.float32(x)
    for largest in (max(abs(number), np.float32(1e-4)), np.float32(3.4e38)):
        scale = largest / np.float32(448)
        quotient = as_compiled(number, scale)
        assert code_of(float(quotient)) == code_of(float(number / scale))


class Numbers(np.ndarray):
    """An array with the one method of Triton's tensors that `reciprocal_parts` calls."""

    def to(self, dtype: type, bitcast: bool) -> "Numbers":
        return self.view(dtype)


def exact_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray | float) -> np.ndarray:
    """a * b + c of float32, rounded once: float64 has room for the exact sum, which is looked at."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), np.asarray(c, np.float64)
    total = product + addend
    there = total - product
    assert not np.any((product - (total - there)) + (addend - there)), "the sum took more than 53 bits"
    return total.astype(np.float32)


def divided_narrowly(x: np.ndarray, scale: np.ndarray, units_off: int) -> np.ndarray:
    """`wire_float8.divide_narrow` by `reciprocal_parts`, line by line, where the hardware's reciprocal is so many units off."""
    near = ((np.float32(1) / scale).view(np.int32) + units_off).view(np.float32).view(Numbers)
    language = types.SimpleNamespace(
        fma=exact_fma, float32=np.float32, uint32=np.uint32, inline_asm_elementwise=lambda *args, **options: near
    )
    given = {"tl": language, "_RECIPROCAL": None}
    below, rest = types.FunctionType(wire_float8.reciprocal_parts.fn.__code__, given)(scale)
    assert np.all(rest > 0), "or a -0.0 would become 0.0"
    return types.FunctionType(wire_float8.divide_narrow.fn.__code__, given)(x, scale, below, rest)


def codes_of(numbers: np.ndarray) -> list[int]:
    return [code_of(float(number)) for number in numbers]


@dataclasses.dataclass(frozen=True)
class Narrow:
    """Every number with so many bits, divided by the scale of every block whose largest number has `exponent`."""

    name: str
    bits: int
    exponent: int
    power_of_two: bool = False


NARROW = [
    Narrow("bfloat16", 8, 0),
    Narrow("bfloat16-smallest-scales", 8, -14),
    Narrow("bfloat16-largest-scales", 8, 127),
    Narrow("bfloat16-subnormal-rest", 8, 112),
    Narrow("bfloat16-powers-of-two", 8, 0, power_of_two=True),
    Narrow("float16", 11, 0),
    Narrow("float16-smallest-scales", 11, -14),
    Narrow("float16-powers-of-two", 11, 0, power_of_two=True),
]
BELOW_THE_LARGEST = (0, 1, 8, 14, 15, 16, 17, 18, 19, 20)
"""Powers of two: quotients near 448, two normal binades of float8, which are alike, and all that become subnormal or zeros."""


@pytest.mark.parametrize("units_off", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("case", NARROW, ids=lambda case: case.name)
def test_every_quotient_of_narrow_numbers_is_the_float8_of_ieee_s(case: Narrow, units_off: int) -> None:
    """Both numbers and scales repeat with every power of two, so that these are all. PTX promises a unit at most."""
    significands = np.arange(2 ** (case.bits - 1), 2**case.bits, dtype=np.float64)
    numbers = (significands * 2.0 ** (case.exponent - case.bits + 1)).astype(np.float32)
    scales = np.maximum(numbers, np.float32(1e-4)) / np.float32(448)
    if case.power_of_two:
        scales = ((scales.view(np.uint32) + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)).view(np.float32)
    compared = 0
    for scale in np.split(np.unique(scales), range(64, len(np.unique(scales)), 64)):
        for shift in BELOW_THE_LARGEST:
            x = np.broadcast_to(numbers * np.float32(2.0**-shift), (len(scale), len(numbers)))
            of_x = np.broadcast_to(scale[:, None], x.shape)
            wanted = x / of_x
            got = divided_narrowly(x, np.ascontiguousarray(of_x), units_off)
            differs = got != wanted
            assert np.all(np.abs(got - wanted) <= np.abs(np.spacing(wanted)))
            assert codes_of(got[differs]) == codes_of(wanted[differs])
            compared += x.size
    assert compared >= 1280


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-38, -1e-38], ids=str)
@pytest.mark.filterwarnings("ignore:underflow encountered:RuntimeWarning")
def test_narrow_zeros_keep_their_signs(x: float) -> None:
    for largest in (np.float32(1e-4), np.float32(1), np.float32(3.38e38)):
        scale = np.array([largest / np.float32(448)])
        quotient = divided_narrowly(np.array([x], np.float32), scale, 0)
        assert code_of(float(quotient[0])) == (0x80 if math.copysign(1, x) < 0 else 0)


def test_a_nan_scale_makes_every_quotient_a_nan() -> None:
    """Float8 of it is 0x7F: products of PTX make NaNs without a sign, and its conversion keeps none."""
    language = types.SimpleNamespace(fma=lambda a, b, c: a * b + c, where=lambda condition, yes, no: yes if condition else no)
    divide = types.FunctionType(wire_float8.divide.fn.__code__, {"tl": language})
    nan = np.float32(np.nan)
    narrow = types.FunctionType(wire_float8.divide_narrow.fn.__code__, {"tl": language})
    for x in (0.0, -0.0, 1.0, np.inf, -np.inf, np.nan):
        assert np.isnan(divide(np.float32(x), nan, nan))
        assert np.isnan(narrow(np.float32(x), nan, nan, nan))
