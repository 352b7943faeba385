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
    def pack_float8(a, b, c, d):
        """The word with four numbers as `to_float8` rounds them, the first in the lowest byte."""
        return tl.inline_asm_elementwise(_PACK_FLOAT8, "=r,f,f,f,f", [a, b, c, d], dtype=tl.uint32, is_pure=True, pack=1)

else:
    from tokenferry.kernels.wire_interpreter import pack_float8, to_float8  # noqa: F401  # the names that are defined above
