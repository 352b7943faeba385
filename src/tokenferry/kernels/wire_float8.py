"""Numbers to float8_e4m3fn: a part of `wire`, with the same two forms."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire, wire_ptx

_PACK_FLOAT8: tl.constexpr = tl.constexpr(wire_ptx.PACK_FLOAT8)

if not wire.INTERPRETED:

    @triton.jit
    def to_float8(x):
        """Numbers of magnitude up to 448 as float8_e4m3fn, rounded to nearest, to even from the middle; a NaN becomes 0x7F."""
        return x.to(tl.float8e4nv)

    @triton.jit
    def divide(x, scale, reciprocal):
        """x / scale as IEEE float32 rounds it, where `reciprocal` is 1 / scale, rounded so too, and quotients above 2**-11 matter
        alone: these become float8.

        One reciprocal serves all numbers of a block. A quotient that is corrected twice by its exact remainder is the rounded
        one (Markstein). `div.rn` takes twice the instructions, and branches to a subroutine for numbers far from 1, zeros among
        them: with it a round trip of one token took 6.8 microseconds, and 5.0 where rows came quantized (2 x H200, 2026-11-26).
        A remainder of zero leaves the first quotient, which may be -0.0.
        """
        first = x * reciprocal
        remainder = tl.fma(-first, scale, x)
        quotient = tl.fma(remainder, reciprocal, first)
        quotient = tl.fma(tl.fma(-quotient, scale, x), reciprocal, quotient)
        return tl.where(remainder == 0, first, quotient)

    @triton.jit
    def pack_float8(a, b, c, d):
        """The word with four numbers as `to_float8` rounds them, the first in the lowest byte."""
        return tl.inline_asm_elementwise(_PACK_FLOAT8, "=r,f,f,f,f", [a, b, c, d], dtype=tl.uint32, is_pure=True, pack=1)

else:
    from tokenferry.kernels.wire_interpreter import divide, pack_float8, to_float8  # noqa: F401  # the names that are defined above
