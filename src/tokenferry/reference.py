"""The specification: dispatch and combine with all ranks' tensors in one process, in plain PyTorch.

Every transport gives these bits (a NaN arrives as some NaN). Written to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenferry.dispatched import Dispatched


def mask_padding(topk_idx: torch.Tensor, num_real_tokens: int) -> torch.Tensor:
    """`topk_idx` as int32, with -1 in every row >= `num_real_tokens`, and for a number that no int32 holds."""
    masked = topk_idx.to(torch.int32, copy=True)
    if topk_idx.dtype != torch.int32:
        masked.masked_fill_(masked != topk_idx, -1)  # cut off, 2**32 + 3 would be expert 3
    masked[num_real_tokens:] = -1
    return masked


def pad_rows(
    hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a rank that brings T' rows to a step of T sends: rows [T', T) are zeros with id -1."""
    missing = num_tokens - hidden.shape[0]
    pad = torch.nn.functional.pad
    return pad(hidden, (0, 0, 0, missing)), pad(topk_idx, (0, 0, 0, missing), value=-1), pad(topk_weights, (0, 0, 0, missing))


def dispatch(
    hiddens: Sequence[torch.Tensor],
    topk_idxs: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor],
    num_real_tokens: Sequence[int] | None = None,
) -> Dispatched:
    """All ranks' inputs -> what every rank receives, with R = V.

    Args:
        hiddens: a [T_r, H] tensor for each rank.
        topk_idxs: [T_r, K] int32 or int64 each.
        topk_weights: [T_r, K] float32, bfloat16 or float16 each.
        num_real_tokens: for each rank the rows that carry real tokens; the rows after them get id -1. Default: all.

    Example:
        Two ranks with 2 and 1 rows, of which rank 0's second is padding:
        ids [[3], [1]] and [[0]] arrive as [[3], [-1], [0]], and valid_tokens is [3].
    """
    real = [hidden.shape[0] for hidden in hiddens] if num_real_tokens is None else num_real_tokens
    hidden = torch.cat(list(hiddens))
    return Dispatched(
        hidden=hidden,
        topk_idx=torch.cat([mask_padding(idx, count) for idx, count in zip(topk_idxs, real, strict=True)]),
        topk_weights=torch.cat([weights.to(torch.float32) for weights in topk_weights]),
        valid_tokens=torch.tensor([hidden.shape[0]], dtype=torch.int32, device=hidden.device),
    )


def combine(
    partials: Sequence[torch.Tensor], tokens_per_rank: Sequence[int], combine_dtype: torch.dtype, out_dtype: torch.dtype
) -> list[torch.Tensor]:
    """All ranks' partial rows -> the combined rows of every rank.

    Every rank's term, the owner's own included, is rounded to `combine_dtype`; the terms are summed in float32 in rank
    order, starting with rank 0's term (a leading zero would lose -0.0), and rounded once to `out_dtype`.

    Args:
        partials: a [R, H] tensor for each rank, R >= sum(tokens_per_rank).
        tokens_per_rank: T_r for each rank.

    Returns:
        For each rank a [T_r, H] tensor of `out_dtype`.

    Example:
        Two ranks with one row each: partials [[1.], [2.]] and [[10.], [20.]] combine to [[11.]] on rank 0 and [[22.]] on rank 1.
    """
    num_valid = sum(tokens_per_rank)
    total = sum_in_rank_order([partial[:num_valid].to(combine_dtype) for partial in partials]).to(out_dtype)
    return [rows.clone() for rows in total.split(list(tokens_per_rank))]


def sum_in_rank_order(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The float32 sum of `terms`, from the first to the last, without a leading zero."""
    total = terms[0].to(torch.float32, copy=True)
    for term in terms[1:]:
        total += term.to(torch.float32)
    return total
