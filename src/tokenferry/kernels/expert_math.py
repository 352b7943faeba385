"""Arithmetic that several of the experts' kernels share: activations, and the quantisation of rows to float8.

Like `wire`, this file holds device functions alone and no kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire_float8

FP8_MAX: tl.constexpr = tl.constexpr(448.0)
"""Largest finite float8_e4m3fn."""
SCALE_BLOCK: tl.constexpr = tl.constexpr(128)
"""Weights share a scale per 128 x 128, rows per 1 x 128."""


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), float32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def clamp(x, low, high):
    """As torch.clamp: a NaN stays a NaN. By default Triton's minimum and maximum give the other number, which would hide a fault.

    Example:
        -3, 1, 9 and NaN between -2 and 2: -2, 1, 2, NaN.
    """
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activations without a gate, float32.

    Example:
        squared_relu of -1, 0, 3: 0, 0, 9.
    """
    if NAME == "squared_relu":
        x = clamp(x, 0.0, float("inf"))
        return x * x
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * sigmoid(2.0 * inner)  # 0.5 * (1 + tanh(y)) is sigmoid(2 y)
    elif NAME == "relu":
        return clamp(x, 0.0, float("inf"))
    elif NAME == "silu":
        return x * sigmoid(x)
    else:
        tl.static_assert(NAME == "none", "unknown activation")
        return x


@triton.jit
def activate_gated(gate, up, alpha, limit, NAME: tl.constexpr):
    """The activations with a gate, float32.

    Example:
        clamped_swiglu with alpha 0 and limit 2 of gate 9 and up -5: 2 * 0.5 * (-2 + 1) = -1.
    """
    if NAME == "swiglu":
        return gate * sigmoid(gate) * up
    elif NAME == "geglu":
        return activate(gate, "gelu") * up
    elif NAME == "geglu_tanh":
        return activate(gate, "gelu_tanh") * up
    elif NAME == "limited_swiglu":
        gate = clamp(gate, -float("inf"), limit)
        return gate * sigmoid(gate) * clamp(up, -limit, limit)
    else:
        tl.static_assert(NAME == "clamped_swiglu", "unknown activation")
        gate = clamp(gate, -float("inf"), limit)
        up = clamp(up, -limit, limit)
        return gate * sigmoid(gate * alpha) * (up + 1.0)


@triton.jit
def block_scale(largest, POWER_OF_TWO: tl.constexpr):
    """Scales of quantized blocks from their largest magnitudes: see `tokenferry.reference.quantize`, whose bits these are.

    Args:
        largest: uint32, the largest of the blocks' numbers as bits without the sign. Such bits are in the order of the numbers,
            with infinity and the NaNs above all, so that none of these is lost on the way.

    Example:
        448: scale 1. 0: 1e-4 / 448. Infinity and NaN: NaN, 0x7FC00000. 300 with POWER_OF_TWO: 1.
    """
    number = tl.maximum(largest.to(tl.float32, bitcast=True), 1e-4)
    # `/` may be off by two units in the last place.
    bits = tl.div_rn(number, tl.full(largest.shape, FP8_MAX, tl.float32)).to(tl.uint32, bitcast=True)
    if POWER_OF_TWO:
        bits = (bits + 0x7FFFFF) & 0x7F800000
    nan = tl.full(largest.shape, 0x7FC00000, tl.uint32)
    return tl.where(largest >= 0x7F800000, nan, bits).to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """The bits of float32 numbers without their signs, as `block_scale` takes them."""
    return x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def quantize(x, POWER_OF_TWO: tl.constexpr = False):
    """Rows of 128 float32 as float8_e4m3fn, and their scales. bfloat16 rows often lie exactly between two float8 numbers, where
    the rounding of the divisions decides which one is taken. No number is further than 448 from 0 once it is divided, but for
    rounding.

    Example:
        224, -448, 1 and zeros: scale 1. 112, -224, 0.5: scale 0.5 and the same float8. Zeros: scale 1e-4 / 448.
    """
    scale = block_scale(tl.max(magnitude(x), 1), POWER_OF_TWO)
    reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    quotient = wire_float8.divide(x, tl.broadcast_to(scale[:, None], x.shape), tl.broadcast_to(reciprocal[:, None], x.shape))
    return wire_float8.to_float8(quotient), scale
