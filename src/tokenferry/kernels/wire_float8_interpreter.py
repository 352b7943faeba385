"""The device functions of `wire_float8` in numpy, for Triton's interpreter."""

from __future__ import annotations

import numpy as np
import triton.language as tl

from tokenferry.kernels.wire_interpreter import (
    _array,
    _tensor,
    load_peer,
    multicast,
    poll_and_clear,
    send,
)


def _float8_magnitudes() -> np.ndarray:
    """What the bits 0 to 126 of float8_e4m3fn stand for: 4 bits of exponent with bias 7, then 3 of mantissa; no infinities."""
    exponents, mantissas = np.divmod(np.arange(127), 8)
    return np.where(exponents == 0, mantissas * 2.0**-9, (8 + mantissas) * 2.0 ** (exponents - 10.0)).astype(np.float32)


_FLOAT8_MIDDLES = (_float8_magnitudes()[1:] + _float8_magnitudes()[:-1]) / np.float32(2)
"""Between each two neighbours; exact in float32."""


_FLOAT8_NUMBERS = np.concatenate([sign * np.append(_float8_magnitudes(), np.float32(np.nan)) for sign in (1, -1)])
"""Of all 256 patterns of bits."""


def divide(x, scale, reciprocal):
    x, scale = np.broadcast_arrays(_array(x), _array(scale))
    with np.errstate(all="ignore"):
        return _tensor(x / scale, tl.float32)


def reciprocal_parts(scale):
    """Nothing that `divide_narrow` reads here."""
    return scale, scale


def divide_narrow(x, scale, below, rest):
    return divide(x, scale, None)


def pack_float8(a, b, c, d):
    values = [_to_float8(_array(x)).astype(np.uint32) for x in (a, b, c, d)]
    return _tensor(sum(value << np.uint32(8 * place) for place, value in enumerate(values)), tl.uint32)


def unpack_float8(word):
    word = _array(word)
    values = [_FLOAT8_NUMBERS[word >> np.uint32(8 * place) & np.uint32(0xFF)] for place in range(4)]
    return tuple(_tensor(value, tl.float32) for value in values)


def to_float8(x):
    """Not by the interpreter's own conversion, which loses a carry (7.85 becomes 4)."""
    return _tensor(_to_float8(_array(x)), tl.float8e4nv)


def _to_float8(value):
    """The bits, by a search among all magnitudes of float8."""
    with np.errstate(invalid="ignore"):
        magnitude = np.minimum(np.abs(value), np.float32(448))
    above = np.searchsorted(_FLOAT8_MIDDLES, magnitude, side="left").astype(np.uint8)
    from_the_middle = np.append(_FLOAT8_MIDDLES, np.float32(0))[above] == magnitude
    bits = above + (from_the_middle & (above % 2 == 1)).astype(np.uint8)
    return np.where(np.isnan(value), np.uint8(0x7F), bits | np.signbit(value).astype(np.uint8) << np.uint8(7))


def send_word(address, word, mask, control_ptr):
    send(address, word, word, word, word, mask, control_ptr, 1)


def load_peer_word(address, mask):
    return load_peer(address, mask, 1)[0]


def multicast_word(address, word, mask, control_ptr):
    multicast(address, word, word, word, word, mask, control_ptr, 1)


def poll_and_clear_both(address, mask, word_address, word_mask, control_ptr, blamed, hint):
    packet = poll_and_clear(address, mask, control_ptr, blamed, hint, 4)
    return *packet, poll_and_clear(word_address, word_mask, control_ptr, blamed, hint, 1)[0]
