"""How compiled kernels divide by a scale, step by step in exact arithmetic: IEEE's quotients, wherever float8 can tell.

The interpreter divides by numpy, and so says nothing about the function that GPUs get. Here that function itself is run, with
fused products that are rounded once from fractions.
"""

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


def test_a_nan_scale_makes_every_quotient_a_nan() -> None:
    """Float8 of it is 0x7F: products of PTX make NaNs without a sign, and its conversion keeps none."""
    language = types.SimpleNamespace(fma=lambda a, b, c: a * b + c, where=lambda condition, yes, no: yes if condition else no)
    divide = types.FunctionType(wire_float8.divide.fn.__code__, {"tl": language})
    nan = np.float32(np.nan)
    assert all(np.isnan(divide(np.float32(x), nan, nan)) for x in (0.0, -0.0, 1.0, np.inf, -np.inf, np.nan))
