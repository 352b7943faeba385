"""The sums of float8 terms on the rank that owns the token: each number times its scale, added in float32 in rank order.

Like `wire`, this file holds device functions alone and no kernel. A thread has the sums of 16 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import fp8_rows, wire, wire_float8


@triton.jit
def zeros(BLOCK: tl.constexpr):
    """Sums before the first term."""
    s = tl.zeros([BLOCK], tl.float32)
    return s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s


@triton.jit
def add_word(is_first, s0, s1, s2, s3, word, scale):
    """Four sums with a word of values added. The first term is taken as it is: 0 + -0.0 would be 0."""
    x0, x1, x2, x3 = wire_float8.unpack_float8(word)
    x0 = x0 * scale  # rounded before it is added: kernels are compiled without fused products
    x1 = x1 * scale
    x2 = x2 * scale
    x3 = x3 * scale
    s0 = tl.where(is_first, x0, s0 + x0)
    s1 = tl.where(is_first, x1, s1 + x1)
    s2 = tl.where(is_first, x2, s2 + x2)
    s3 = tl.where(is_first, x3, s3 + x3)
    return s0, s1, s2, s3


@triton.jit
def add_term(is_first, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, v0, v1, v2, v3, scale_bits):
    """The sums with a term added: a packet of values, and their scale's bits."""
    scale = scale_bits.to(tl.float32, bitcast=True)
    s0, s1, s2, s3 = add_word(is_first, s0, s1, s2, s3, v0, scale)
    s4, s5, s6, s7 = add_word(is_first, s4, s5, s6, s7, v1, scale)
    s8, s9, s10, s11 = add_word(is_first, s8, s9, s10, s11, v2, scale)
    s12, s13, s14, s15 = add_word(is_first, s12, s13, s14, s15, v3, scale)
    return s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15


@triton.jit
def store_eight(address, live, a, b, c, d, e, f, g, h, OUT: tl.constexpr):
    """Eight sums, each rounded once to OUT."""
    if tl.float32 == OUT:
        wire.store(address, wire.pack(a, a, OUT), wire.pack(b, b, OUT), wire.pack(c, c, OUT), wire.pack(d, d, OUT), live, 4)
        wire.store(address + 16, wire.pack(e, e, OUT), wire.pack(f, f, OUT), wire.pack(g, g, OUT), wire.pack(h, h, OUT), live, 4)
    else:
        wire.store(address, wire.pack(a, b, OUT), wire.pack(c, d, OUT), wire.pack(e, f, OUT), wire.pack(g, h, OUT), live, 4)


@triton.jit
def store_sums(thread, num_wanted, out_ptr, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
               H: tl.constexpr, OUT: tl.constexpr):  # fmt: skip
    """Each thread's sums to their places in the first `num_wanted` rows."""
    row, column = fp8_rows.place(thread, H)
    kept = (row < num_wanted) & (column < H)
    OUT_BYTES: tl.constexpr = OUT.primitive_bitwidth // 8
    address = out_ptr + (row.to(tl.int64) * H + column) * OUT_BYTES
    store_eight(address, kept, s0, s1, s2, s3, s4, s5, s6, s7, OUT)
    store_eight(address + 8 * OUT_BYTES, kept, s8, s9, s10, s11, s12, s13, s14, s15, OUT)
