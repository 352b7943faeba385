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
    from tokenferry.kernels.wire_interpreter import unpack_mxfp4  # noqa: F401  # the name that is defined above
