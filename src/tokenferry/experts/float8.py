"""Block-scaled float8_e4m3fn: weights share a scale per 128 x 128, rows are quantized per 1 x 128 when they are multiplied.

The numbers are those of deepseek-v3's checkpoints: value = float8 * scale, a block's largest magnitude becomes 448. The library's
scaled grouped product takes one scale a row or one per 32 numbers (torch 2.11, Hopper), not these: our own kernel multiplies.

Legend of shape suffixes: L experts, Y rows and X columns of a matrix, P rows that are multiplied.
"""

from __future__ import annotations

import torch

from tokenferry import reference
from tokenferry.dispatched import FLOAT8, SCALE_BLOCK
from tokenferry.errors import ShapeError
from tokenferry.reference import FLOAT8_MAX


def quantize_weights(weights_LYX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacked matrices in float8, and the scales of their blocks.

    Args:
        weights_LYX: [L, Y, X], any floating dtype. Y and X need not be multiples of 128.

    Returns:
        [L, Y, X] float8_e4m3fn and [L, ceil(Y / 128), ceil(X / 128)] float32. A block of zeros has scale 1.

    Raises:
        ShapeError: not three-dimensional.
    """
    if weights_LYX.dim() != 3:
        raise ShapeError(f"weights must be [experts, rows, columns], got {list(weights_LYX.shape)}")
    quantized = torch.empty(weights_LYX.shape, dtype=FLOAT8, device=weights_LYX.device)
    scales = []
    for expert, matrix_YX in enumerate(weights_LYX):  # one at a time: a float32 copy of all would be four times the result
        largest = _by_block(matrix_YX.float()).abs().amax((1, 3))
        # By a tensor: CUDA multiplies by the reciprocal of a number, and a scale would differ from the CPU's by its last bit.
        scale = torch.where(largest > 0, largest / torch.full_like(largest, FLOAT8_MAX), 1.0)
        quantized[expert] = (matrix_YX.float() / _spread(scale, matrix_YX.shape)).to(FLOAT8)
        scales.append(scale)
    return quantized, torch.stack(scales)


def dequantize(weight_YX: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One matrix in float32."""
    return weight_YX.float() * _spread(scale, weight_YX.shape)


def rounded_rows(rows_PX: torch.Tensor) -> torch.Tensor:
    """Rows as the product sees them: quantized per 1 x 128, in float32."""
    return reference.quantize(rows_PX).dequantize()


def _by_block(matrix_YX: torch.Tensor) -> torch.Tensor:
    rows, columns = matrix_YX.shape
    padded = torch.nn.functional.pad(matrix_YX, (0, -columns % SCALE_BLOCK, 0, -rows % SCALE_BLOCK))
    return padded.view(padded.shape[0] // SCALE_BLOCK, SCALE_BLOCK, padded.shape[1] // SCALE_BLOCK, SCALE_BLOCK)


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return scale.repeat_interleave(SCALE_BLOCK, 0).repeat_interleave(SCALE_BLOCK, 1)[: shape[0], : shape[1]]
