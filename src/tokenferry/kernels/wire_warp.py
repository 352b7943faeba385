"""What the threads of a warp have in common: a part of `wire`, with the same two forms."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire, wire_ptx

_SAME_FOR_ALL: tl.constexpr = tl.constexpr(wire_ptx.SAME_FOR_ALL)
_UNCHANGED: tl.constexpr = tl.constexpr(wire_ptx.UNCHANGED)

if not wire.INTERPRETED:

    @triton.jit
    def same_for_all(number):
        """A scalar that all threads of a warp have alike, in a register that they share. A loop up to it then counts, and makes
        addresses for the tensor cores, in such registers too: without, 16 instructions in 235 of `expert_mxfp4_kernel` carried
        them over in each step."""
        return tl.inline_asm_elementwise(_SAME_FOR_ALL, "=r,r", [number], dtype=tl.int32, is_pure=True, pack=1)

    @triton.jit
    def finished(sums):
        """The sums of a product in a loop, once the tensor cores have made them. Where its first operand is in registers, Triton
        3.6 lets three quarters of a product go on while the loop's next step writes to these very registers. Seldom, and nearly
        always where four warps share a tensor core, numbers of the next step were multiplied then."""
        return tl.inline_asm_elementwise(_UNCHANGED, "=r,r", [sums], dtype=tl.float32, is_pure=True, pack=1)

else:

    @triton.jit
    def same_for_all(number):
        """The number: there is one thread."""
        return number

    @triton.jit
    def finished(sums):
        """The sums: nothing goes on beside."""
        return sums
