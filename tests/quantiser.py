"""A quantiser that shares nothing with the library's: float8 by a list of all its numbers and exact distances, in plain Python.

The float32 quotients are float64 quotients rounded once more, which gives the correctly rounded ones (53 bits are more than twice
24 and two).
"""

import bisect
import math
import struct
from fractions import Fraction

import torch

from tokenferry.testing.data import HOSTILE

POSITIVE = [
    Fraction(bits & 7, 512) if bits < 8 else Fraction(8 + (bits & 7), 8) * Fraction(2) ** ((bits >> 3) - 7) for bits in range(127)
]
"""What the float8_e4m3fn codes 0 to 126 stand for; 127 is NaN."""


def float32(number: float) -> float:
    return float(struct.unpack("f", struct.pack("f", number))[0])


def code_of(number: float) -> int:
    """The nearest float8, as bits; from the middle the even one."""
    size, sign = Fraction(abs(number)), 128 if math.copysign(1, number) < 0 else 0
    above = bisect.bisect_left(POSITIVE, size)
    candidates = [code for code in (above - 1, above) if 0 <= code < 127]
    return sign | min(candidates, key=lambda code: (abs(POSITIVE[code] - size), code & 1))


def quantize_block(numbers: list[float], power_of_two: bool) -> tuple[list[int], float]:
    """Codes and the scale of one block."""
    if not all(math.isfinite(number) for number in numbers):
        return [0x7F] * len(numbers), math.nan
    largest = max(float32(1e-4), *(abs(number) for number in numbers))
    scale = float32(largest / 448.0)
    if power_of_two:
        scale = 2.0 ** math.ceil(math.log2(scale))
    return [code_of(float32(number / scale)) for number in numbers], scale


def quantize_rows(rows: torch.Tensor, *, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, H] uint8 codes and [R, ceil(H / 128)] float32 scales."""
    codes, scales = [], []
    for row in rows.float().tolist():
        blocks = [quantize_block(row[start : start + 128], power_of_two) for start in range(0, len(row), 128)]
        codes.append([code for block, _ in blocks for code in block])
        scales.append([scale for _, scale in blocks])
    return torch.tensor(codes, dtype=torch.uint8), torch.tensor(scales, dtype=torch.float32)


def difficult_rows(dtype: torch.dtype, columns: int) -> torch.Tensor:
    """Rows that a careless quantiser gets wrong, each in its own block: ties, zeros of both signs, blocks of one large number,
    smallest numbers; then a row of infinities among ones, and two with NaNs too."""
    generator = torch.Generator().manual_seed(11)
    plain = torch.randn(5, columns, generator=generator)
    ties = torch.arange(columns) % 64 * 4.0 + 200.0
    ties[::128] = 448.0
    lonely = torch.randn(columns, generator=generator) * 1e-3
    lonely[5::128] = 3.0e4
    hostile = torch.tensor(HOSTILE)[torch.randint(len(HOSTILE), (2, columns), generator=generator)]
    if columns > 128:
        hostile[0, :128] = -0.0
    infinite = torch.ones(columns)
    infinite[3::128] = torch.inf
    scale = torch.tensor([1.0, 1e-4, 1e-6, 3e4, 1e-38])[:, None]
    lone = (ties[None], -ties[None], lonely[None], torch.zeros(1, columns), infinite[None])
    return torch.cat([plain * scale, *lone, hostile]).to(dtype)
