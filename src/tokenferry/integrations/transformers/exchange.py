"""One MoE layer's exchange: gather every rank's rows, run this rank's experts on them, sum at the rank that owns the token.

T this rank's rows, R gathered rows, H hidden size, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from tokenferry.dispatched import Dispatched, PartialRows, QuantizedRows
from tokenferry.dispatcher import Dispatcher
from tokenferry.integrations.transformers.local_experts import LocalExperts
from tokenferry.integrations.transformers.stopwatch import Stopwatch

Kernels = Callable[[Dispatched, PartialRows], PartialRows]
"""Writes this rank's partial rows of what was gathered where it is told, and returns these."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What a model hands to its experts.

    Attributes:
        hidden_TH: in the model's dtype.
        topk_idx_TK: global expert numbers.
        topk_weights_TK: in the family's own dtype. They travel as float32 and come back to this dtype for the experts.
    """

    hidden_TH: torch.Tensor
    topk_idx_TK: torch.Tensor
    topk_weights_TK: torch.Tensor


def exchange_sums(
    dispatcher: Dispatcher,
    experts: LocalExperts,
    rows: Rows,
    num_valid_rows: int | None,
    partial_dtype: torch.dtype,
    stopwatch: Stopwatch,
) -> torch.Tensor:
    """Each rank's experts run once on all gathered rows, and their weighted sums are added up.

    Args:
        num_valid_rows: V, if the host knows it: the experts then look at those rows only. None = at all R.
        partial_dtype: of the weighted sums. Wider than the model's own, each expert's output is rounded but their sum is not.

    Returns:
        [T, H]
    """
    with stopwatch.running():
        got = dispatcher.dispatch(rows.hidden_TH, rows.topk_idx_TK, rows.topk_weights_TK)
    num_gathered = got.hidden.shape[0]
    num_rows = num_gathered if num_valid_rows is None else num_valid_rows
    if num_rows == 0:
        partial_RH = rows.hidden_TH.new_empty(num_gathered, got.hidden.shape[1])
    else:
        hidden_RH = got.hidden[:num_rows]
        if isinstance(hidden_RH, QuantizedRows):
            hidden_RH = hidden_RH.dequantize(rows.hidden_TH.dtype)
        partial_RH = experts.partial(
            hidden_RH, got.topk_idx[:num_rows], _weights(got, rows)[:num_rows], partial_dtype
        ).contiguous()
    with stopwatch.running():
        return dispatcher.combine(partial_RH, got)


def exchange_partials(dispatcher: Dispatcher, kernels: Kernels, rows: Rows, stopwatch: Stopwatch) -> torch.Tensor:
    """As `exchange_sums` by our own kernels, for which the device's count of gathered rows is enough.

    Returns:
        [T, H]
    """
    with stopwatch.running():
        got = dispatcher.dispatch(rows.hidden_TH, rows.topk_idx_TK, rows.topk_weights_TK)
    partial_RH = kernels(got, dispatcher.combine_input())
    with stopwatch.running():
        return dispatcher.combine(partial_RH, got)


def exchange_choices(
    dispatcher: Dispatcher,
    experts: LocalExperts,
    rows: Rows,
    tokens_per_rank: Sequence[int],
    stopwatch: Stopwatch,
) -> torch.Tensor:
    """Bit for bit what the unmodified model computes, in any dtype, at K times the traffic.

    A GEMM's bits depend on how many rows it has, and a sum's on its order. So the experts run once for each rank's rows, as
    they would in that rank's own process, and the K expert outputs of a token travel one by one to the rank that owns it,
    which sums them as the model does. The workspace is K * H wide: each of the K * H columns has exactly one contributor.

    Args:
        tokens_per_rank: the counts of this step, on the host.

    Returns:
        [T, H]
    """
    hidden_size, topk = rows.hidden_TH.shape[1], rows.topk_idx_TK.shape[1]
    with stopwatch.running():
        got = dispatcher.dispatch(pad(rows.hidden_TH, (0, (topk - 1) * hidden_size)), rows.topk_idx_TK, rows.topk_weights_TK)
    hidden_RH, weights_RK = got.hidden[:, :hidden_size].contiguous(), _weights(got, rows)
    outputs = torch.zeros_like(got.hidden)
    start = 0
    for num_tokens in tokens_per_rank:
        rows_of_rank = slice(start, start + num_tokens)
        if num_tokens:
            outputs[rows_of_rank] = experts.each_choice(
                hidden_RH[rows_of_rank], got.topk_idx[rows_of_rank], weights_RK[rows_of_rank]
            ).reshape(num_tokens, -1)
        start += num_tokens
    with stopwatch.running():
        outputs_TKH = dispatcher.combine(outputs, got).view(-1, topk, hidden_size)
    return experts.sum_choices(outputs_TKH, rows.topk_idx_TK, rows.topk_weights_TK)


def _weights(got: Dispatched, rows: Rows) -> torch.Tensor:
    return got.topk_weights.to(rows.topk_weights_TK.dtype)
