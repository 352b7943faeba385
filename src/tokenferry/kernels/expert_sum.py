"""The weighted sum of a row's expert outputs, in the order of its K choices, in float32; then rounded, or quantized."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import expert_math, wire
from tokenferry.kernels.expert_math import SCALE_BLOCK

SIGNATURE = {
    "outputs": "*DTYPE",
    "topk_idx": "*IDX",
    "topk_weights": "*fp32",
    "valid_tokens": "*i32",
    "out": "*OUT",
    "out_scales": "*fp32",
    "out_scale_stride": "i32",
    "first_row": "i32",
    "num_rows": "i32",
    "first_expert": "i32",
    "norm_scale": "*fp32",
    "norm_epsilon": "fp32",
    "L": "constexpr",
    "K": "constexpr",
    "H": "constexpr",
    "BLOCK": "constexpr",
    "NORM": "constexpr",
    "QUANTIZES": "constexpr",
    "PDL": "constexpr",
}


@triton.jit
def scaled_outputs(source, norm_scale, column, size):
    """An output's columns times the norm's scale, rounded to the outputs' dtype; zeros from `size` on.

    Example:
        1, 2, 3 and scales 5, 5, 5 with size 2: 5, 10, 0.
    """
    scale = tl.load(norm_scale + column, mask=column < size, other=0.0)
    value = tl.load(source + column, mask=column < size, other=0.0).to(tl.float32) * scale
    return value.to(source.dtype.element_ty).to(tl.float32)


@triton.jit
def expert_sum_kernel(
    outputs,
    topk_idx,
    topk_weights,
    valid_tokens,
    out,
    out_scales,
    out_scale_stride,
    first_row,
    num_rows,
    first_expert,
    norm_scale,
    norm_epsilon,
    L: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    QUANTIZES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs take rows in turn. Choices of experts elsewhere are left out by selection, not by a weight of zero, since what
    `outputs` holds for them may be NaN.

    Args:
        outputs: [num_rows * K, H]; row r * K + k is the output for choice k of row first_row + r, if its expert is here.
        topk_weights: [R, K]; read for local choices only.
        out: [R, H]. Rows >= V are not written; a row without a local expert becomes +0.0.
        out_scales, out_scale_stride: with QUANTIZES `out` is float8, and these are its scales, [R, ceil(H / 128)], and the
            distance between their rows: the float32 sums are quantized, for a combine in float8. BLOCK is a multiple of 128.
        norm_scale: [H], read if NORM: each output is first multiplied by it, and divided by the root of the mean of its squares
            and `norm_epsilon`; rounded after both, as a model's own code does.

    Example:
        Output 2 with NORM, scale 2, epsilon 48 and weight 7: 4 / sqrt(16 + 48) * 7 = 3.5.
        With QUANTIZES, one output of 224, -448 and zeros with weight 2: the same numbers in float8, scale 2.
        Outputs 1 and 2^-9 for choices 0 and 2 with weights 2 and 512, choice 1 elsewhere and NaN: 2 * 1 + 512 * 2^-9 = 3.
    """
    CHUNKS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    rows = tl.maximum(tl.minimum(tl.load(valid_tokens) - first_row, num_rows), 0)
    for task in range(tl.program_id(0), rows * CHUNKS, tl.num_programs(0)):
        row = task // CHUNKS
        column = (task % CHUNKS) * BLOCK + tl.arange(0, BLOCK)
        choices = (first_row + row).to(tl.int64) * K
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            local = tl.load(topk_idx + choices + k) - first_expert
            is_local = (local >= 0) & (local < L)
            weight = tl.load(topk_weights + choices + k, mask=is_local, other=0.0)
            source = outputs + (row * K + k).to(tl.int64) * H
            value = tl.load(source + column, mask=column < tl.where(is_local, H, 0), other=0.0).to(tl.float32)
            if NORM:
                squares = tl.zeros([BLOCK], tl.float32)
                for first in range(0, H, BLOCK):
                    here = first + tl.arange(0, BLOCK)
                    part = scaled_outputs(source, norm_scale, here, tl.where(is_local, H, 0))
                    squares += part * part
                inverse = tl.div_rn(tl.full([], 1.0, tl.float32), tl.sqrt_rn(tl.sum(squares) / H + norm_epsilon))
                value = scaled_outputs(source, norm_scale, column, tl.where(is_local, H, 0)) * inverse
                value = value.to(outputs.dtype.element_ty).to(tl.float32)
            total = tl.where(is_local, total + value * weight, total)
        target = out + (first_row + row).to(tl.int64) * H
        if QUANTIZES:
            q, scale = expert_math.quantize(tl.reshape(total, [BLOCK // SCALE_BLOCK, SCALE_BLOCK]))
            tl.store(target + column, tl.reshape(q, [BLOCK]), mask=column < H)
            group = (task % CHUNKS) * (BLOCK // SCALE_BLOCK) + tl.arange(0, BLOCK // SCALE_BLOCK)
            scales_of_row = out_scales + (first_row + row).to(tl.int64) * out_scale_stride
            tl.store(scales_of_row + group, scale, mask=group < (H + SCALE_BLOCK - 1) // SCALE_BLOCK)
        else:
            tl.store(target + column, total.to(out.dtype.element_ty), mask=column < H)
