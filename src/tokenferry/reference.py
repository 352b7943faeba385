"""The specification: dispatch, combine and the quantiser, with all ranks' tensors in one process, in plain PyTorch.

Every transport gives these bits (a NaN arrives as some NaN). Written to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from tokenferry.dispatched import FLOAT8, SCALE_BLOCK, Dispatched, HiddenRows, PartialRows, QuantizedRows, RowFormat

FLOAT8_MAX: Final = 448.0
"""Largest finite float8_e4m3fn."""
SMALLEST_AMAX: Final = 1e-4
"""A block whose numbers are all smaller is quantized as if this were its largest: its scale is one that can be divided by."""


def mask_padding(topk_idx: torch.Tensor, num_real_tokens: int) -> torch.Tensor:
    """`topk_idx` as int32, with -1 in every row >= `num_real_tokens`, and for a number that no int32 holds."""
    masked = topk_idx.to(torch.int32, copy=True)
    if topk_idx.dtype != torch.int32:
        masked.masked_fill_(masked != topk_idx, -1)  # cut off, 2**32 + 3 would be expert 3
    masked[num_real_tokens:] = -1
    return masked


def quantize(rows: torch.Tensor, *, power_of_two_scales: bool = False) -> QuantizedRows:
    """Rows in float8_e4m3fn with a float32 scale for every 128 columns. Every kernel that quantizes rows gives these bits.

    scale = max(largest magnitude of the block, 1e-4) / 448, then value = number / scale, kept within +-448 and rounded to the
    nearest float8, to even from the middle. Both divisions are those of IEEE float32. A block that holds a NaN or an infinity
    becomes NaN as a whole: its scale, and all its values (0x7F). What follows in the row's outputs would be NaN in any case, and
    an infinity that became 448 would hide a fault.

    Args:
        rows: [R, H] bfloat16, float16 or float32. The last block is shorter if 128 does not divide H.
        power_of_two_scales: each scale is rounded up to a power of two, before it divides.

    Example:
        224, -448, 1 and zeros: scale 1. Zeros: scale 1e-4 / 448, values 0. With powers of two, 300 and zeros: scale 1, value 288.
    """
    num_rows, size = rows.shape
    padded = torch.nn.functional.pad(rows.to(torch.float32), (0, -size % SCALE_BLOCK)).view(
        num_rows, -(-size // SCALE_BLOCK), SCALE_BLOCK
    )
    largest = padded.abs().amax(2)
    # Divided by a tensor: on CUDA torch multiplies by the reciprocal of a number, which was off by one unit in the last place.
    scales = largest.clamp(min=SMALLEST_AMAX) / torch.full_like(largest, FLOAT8_MAX)
    if power_of_two_scales:
        mantissa, exponent = torch.frexp(scales)  # scales = mantissa * 2 ** exponent, 0.5 <= mantissa < 1
        scales = torch.ldexp(torch.ones_like(scales), torch.where(mantissa == 0.5, exponent - 1, exponent))
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    values = (padded / scales.unsqueeze(2)).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).view(torch.uint8)
    values = values.masked_fill(scales.isnan().unsqueeze(2), 0x7F).flatten(1)[:, :size]
    return QuantizedRows(values.contiguous().view(FLOAT8), scales)


def in_format(rows: HiddenRows, dispatch_format: RowFormat) -> HiddenRows:
    """Rows as a dispatch of this format returns them. Rows that are quantized already stay as they are."""
    if not dispatch_format.is_quantized or isinstance(rows, QuantizedRows):
        return rows
    return quantize(rows, power_of_two_scales=dispatch_format.power_of_two_scales)


def in_combine_dtype(rows: PartialRows, combine_dtype: torch.dtype) -> PartialRows:
    """Partial rows as they travel. Those that are quantized already stay as they are."""
    if combine_dtype != FLOAT8:
        assert isinstance(rows, torch.Tensor), "rows of another dtype have no scales"
        return rows.to(combine_dtype)
    return rows if isinstance(rows, QuantizedRows) else quantize(rows)


def pad_hidden(hidden: HiddenRows, num_tokens: int) -> HiddenRows:
    """`hidden` with rows of zero bytes behind it, up to `num_tokens`."""
    if isinstance(hidden, QuantizedRows):  # `pad` serves no float8
        values = torch.nn.functional.pad(hidden.values.view(torch.uint8), (0, 0, 0, num_tokens - hidden.shape[0]))
        scales = torch.nn.functional.pad(hidden.scales, (0, 0, 0, num_tokens - hidden.shape[0]))
        return QuantizedRows(values.view(FLOAT8), scales)
    return torch.nn.functional.pad(hidden, (0, 0, 0, num_tokens - hidden.shape[0]))


def pad_rows(
    hidden: Any, topk_idx: torch.Tensor, topk_weights: torch.Tensor, num_tokens: int
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """What a rank that brings T' rows to a step of T sends: rows [T', T) are zero bytes with id -1, once they are in the
    dispatch's format."""
    missing = num_tokens - topk_idx.shape[0]
    pad = torch.nn.functional.pad
    return pad_hidden(hidden, num_tokens), pad(topk_idx, (0, 0, 0, missing), value=-1), pad(topk_weights, (0, 0, 0, missing))


def dispatch(
    hiddens: Sequence[Any],
    topk_idxs: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor],
    num_real_tokens: Sequence[int] | None = None,
    dispatch_format: str | RowFormat = "same",
) -> Dispatched:
    """All ranks' inputs -> what every rank receives, with R = V.

    Args:
        hiddens: a [T_r, H] tensor for each rank, or `QuantizedRows` with "fp8_block128", or [T_r, row_bytes] uint8 with "bytes".
        topk_idxs: [T_r, K] int32 or int64 each.
        topk_weights: [T_r, K] float32, bfloat16 or float16 each.
        num_real_tokens: for each rank the rows that carry real tokens; the rows after them get id -1. Default: all.
        dispatch_format: as `Workspace` takes it.

    Example:
        Two ranks with 2 and 1 rows, of which rank 0's second is padding:
        ids [[3], [1]] and [[0]] arrive as [[3], [-1], [0]], and valid_tokens is [3].
    """
    real = [hidden.shape[0] for hidden in hiddens] if num_real_tokens is None else num_real_tokens
    row_format = RowFormat.of(dispatch_format)
    hidden = _concatenated([in_format(rows, row_format) for rows in hiddens])
    return Dispatched(
        hidden=hidden,
        topk_idx=torch.cat([mask_padding(idx, count) for idx, count in zip(topk_idxs, real, strict=True)]),
        topk_weights=torch.cat([weights.to(torch.float32) for weights in topk_weights]),
        valid_tokens=torch.tensor([hidden.shape[0]], dtype=torch.int32, device=hidden.device),
    )


def _concatenated(rows: Sequence[Any]) -> HiddenRows:
    if isinstance(rows[0], QuantizedRows):
        values = torch.cat([each.values.view(torch.uint8) for each in rows])  # `cat` serves no float8 on some devices
        return QuantizedRows(values.view(FLOAT8), torch.cat([each.scales for each in rows]))
    return torch.cat(list(rows))


def combine(
    partials: Sequence[PartialRows], tokens_per_rank: Sequence[int], combine_dtype: torch.dtype, out_dtype: torch.dtype
) -> list[torch.Tensor]:
    """All ranks' partial rows -> the combined rows of every rank.

    Every rank's term, the owner's own included, is rounded to `combine_dtype`; the terms are summed in float32 in rank
    order, starting with rank 0's term (a leading zero would lose -0.0), and rounded once to `out_dtype`. float8 terms are
    quantized, with a scale for every 128 columns (see `quantize`), and each number is its value times its scale, rounded to
    float32 before it is added.

    Args:
        partials: a [R, H] tensor for each rank, R >= sum(tokens_per_rank); of float8 terms it may be `QuantizedRows`.
        tokens_per_rank: T_r for each rank.

    Returns:
        For each rank a [T_r, H] tensor of `out_dtype`.

    Example:
        Two ranks with one row each: partials [[1.], [2.]] and [[10.], [20.]] combine to [[11.]] on rank 0 and [[22.]] on rank 1.
        As float8, rows of 128 columns 300 and 1: the scales are 300 / 448 and 1 / 448, the values 448 both, and their sum is 301.
    """
    num_valid = sum(tokens_per_rank)
    total = sum_in_rank_order([in_combine_dtype(partial[:num_valid], combine_dtype) for partial in partials]).to(out_dtype)
    return [rows.clone() for rows in total.split(list(tokens_per_rank))]


def sum_in_rank_order(terms: Sequence[PartialRows]) -> torch.Tensor:
    """The float32 sum of `terms`, from the first to the last, without a leading zero."""
    total = _as_float32(terms[0])
    for term in terms[1:]:
        total += _as_float32(term)
    return total


def _as_float32(term: PartialRows) -> torch.Tensor:
    """A new tensor."""
    return term.dequantize() if isinstance(term, QuantizedRows) else term.to(torch.float32, copy=True)
