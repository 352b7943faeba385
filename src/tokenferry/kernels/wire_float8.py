"""Numbers to float8_e4m3fn and back, and the single words that their scales are: a part of `wire`, with the same two forms."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire, wire_ptx

_PACK_FLOAT8: tl.constexpr = tl.constexpr(wire_ptx.PACK_FLOAT8)
_UNPACK_FLOAT8: tl.constexpr = tl.constexpr(wire_ptx.UNPACK_FLOAT8)
_RECIPROCAL: tl.constexpr = tl.constexpr(wire_ptx.RECIPROCAL)
_SEND1: tl.constexpr = tl.constexpr(wire_ptx.send(1))
_MULTICAST1: tl.constexpr = tl.constexpr(wire_ptx.multicast(1))
_LOAD_PEER1: tl.constexpr = tl.constexpr(wire_ptx.load_peer(1))
_POLL_BOTH: tl.constexpr = tl.constexpr(wire_ptx.POLL_AND_CLEAR_BOTH)
_LOAD_CONSTRAINTS: tl.constexpr = tl.constexpr(wire_ptx.LOAD_CONSTRAINTS)
_STORE_CONSTRAINTS: tl.constexpr = tl.constexpr(wire_ptx.STORE_CONSTRAINTS)
_POLL_BOTH_CONSTRAINTS: tl.constexpr = tl.constexpr(wire_ptx.POLL_BOTH_CONSTRAINTS)

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
    def reciprocal_parts(scale):
        """1 / scale as the sum of two float32, for `divide_narrow`: the first a few units in its last place too small, so that
        the second is above 0, and together within 2**-40 of it. Where scales are above 2**103 the second may be subnormal, and
        both together are within 2**-30. The hardware's reciprocal may be off by a unit."""
        near = tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [scale], dtype=tl.float32, is_pure=True, pack=1)
        below = (near.to(tl.uint32, bitcast=True) - 4).to(tl.float32, bitcast=True)
        return below, tl.fma(below, -scale, 1.0) * near

    @triton.jit
    def divide_narrow(x, scale, below, rest):
        """x / scale, rounded to float32, wherever it becomes another float8 than a neighbour of it would; x has the bits of a
        bfloat16 or float16, the scale is that of a block of such numbers, and `below` and `rest` are its `reciprocal_parts`.

        The product is off by far less than the quotient of two such numbers can lie from where float32 rounds the other way
        beside the middle of two float8 numbers: tests try all. Both parts are above 0, so that a -0.0 stays one.
        `divide` takes nine instructions, with the two that Triton makes of its signs, and this takes two.
        """
        return tl.fma(x, below, x * rest)

    @triton.jit
    def pack_float8(a, b, c, d):
        """The word with four numbers as `to_float8` rounds them, the first in the lowest byte."""
        return tl.inline_asm_elementwise(_PACK_FLOAT8, "=r,f,f,f,f", [a, b, c, d], dtype=tl.uint32, is_pure=True, pack=1)

    @triton.jit
    def unpack_float8(word):
        """The four numbers of a word, exactly, as float32."""
        return tl.inline_asm_elementwise(
            _UNPACK_FLOAT8, "=&f,=&f,=&f,=&f,r", [word], dtype=(tl.float32,) * 4, is_pure=True, pack=1
        )

    @triton.jit
    def send_word(address, word, mask, control_ptr):
        """`wire.send` of one word. Words that the threads of a warp send to neighbouring addresses go as one packet."""
        tl.inline_asm_elementwise(
            _SEND1,
            _STORE_CONSTRAINTS,
            [address, word, word, word, word, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def multicast_word(address, word, mask, control_ptr):
        """`wire.multicast` of one word."""
        tl.inline_asm_elementwise(
            _MULTICAST1,
            _STORE_CONSTRAINTS,
            [address, word, word, word, word, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def load_peer_word(address, mask):
        """`wire.load_peer` of one word."""
        word, _x, _y, _z = tl.inline_asm_elementwise(
            _LOAD_PEER1, _LOAD_CONSTRAINTS, [address, mask.to(tl.int32)], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
        )
        return word

    @triton.jit
    def poll_and_clear_both(address, mask, word_address, word_mask, control_ptr, blamed, hint):
        """`wire.poll_and_clear` of a packet of four words and, for the threads of `word_mask`, of a word elsewhere, at once: one
        wait after another would take two round trips to the L2 cache. A thread of `word_mask` is one of `mask` too."""
        tl.static_assert(address.shape[0] % tl.extra.cuda.num_threads() == 0, "a packet needs exactly one owner thread")
        return tl.inline_asm_elementwise(
            _POLL_BOTH,
            _POLL_BOTH_CONSTRAINTS,
            [address, mask.to(tl.int32), word_address, word_mask.to(tl.int32), control_ptr, blamed, hint],
            dtype=(tl.uint32,) * 5,
            is_pure=False,
            pack=1,
        )

else:
    from tokenferry.kernels.wire_float8_interpreter import (  # noqa: F401  # the names that are defined above
        divide,
        divide_narrow,
        load_peer_word,
        multicast_word,
        pack_float8,
        poll_and_clear_both,
        reciprocal_parts,
        send_word,
        to_float8,
        unpack_float8,
    )
