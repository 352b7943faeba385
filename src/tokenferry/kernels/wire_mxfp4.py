"""Packed MXFP4 weights to bfloat16: a part of `wire`, with the same two forms."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire, wire_ptx

_UNPACK: tl.constexpr = tl.constexpr(wire_ptx.UNPACK_MXFP4)
_CONSTRAINTS: tl.constexpr = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r")
_BFLOAT16S: tl.constexpr = tl.constexpr((tl.bfloat16,) * 8)

if not wire.INTERPRETED:

    @triton.jit
    def unpack_mxfp4(word, scale):
        """The eight weights of each word, in the order of their columns of depth, exact. See `tokenferry.experts.mxfp4.pack` for
        how they lie in it.

        Args:
            word, scale: int32. `scale` is the stored byte, which stands for 2 ** (scale - 253) times what the bits say.
        """
        return tl.inline_asm_elementwise(_UNPACK, _CONSTRAINTS, [word, scale], dtype=_BFLOAT16S, is_pure=True, pack=1)

else:

    @triton.jit
    def unpack_mxfp4(word, scale):
        """As float32: the interpreter would multiply bfloat16 as if it were integers."""
        word = word.to(tl.uint32, bitcast=True)
        factor = (scale << 23).to(tl.float32, bitcast=True)
        first = word & 0x81C081C0
        second = (word << 3) & 0x81C081C0
        third = (word << 6) & 0x81C081C0
        fourth = (((word << 1) ^ (word >> 3)) & 0x81808180) | ((word >> 7) & 0x00400040)
        v0, v1 = two_numbers(first, factor)
        v2, v3 = two_numbers(second, factor)
        v4, v5 = two_numbers(third, factor)
        v6, v7 = two_numbers(fourth, factor)
        return v0, v1, v2, v3, v4, v5, v6, v7

    @triton.jit
    def two_numbers(pair, factor):
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
        return low * factor, high * factor
