"""This rank's experts as a function of gathered rows.

Legend of shape suffixes: R gathered rows, K choices of a row, H hidden size, L experts of this rank (`e` elsewhere).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched, PartialRows, QuantizedRows
from tokenferry.errors import DeviceError, DtypeError
from tokenferry.experts import torch_path
from tokenferry.experts.scratch import ExpertScratch
from tokenferry.experts.weights import ExpertWeights, check_out, check_rows, check_weights


def apply_experts(
    dispatched: Dispatched,
    weights: ExpertWeights,
    first_expert: int,
    activation: Activation,
    out: PartialRows | None = None,
    *,
    scratch: ExpertScratch | None = None,
    batch_invariant: bool = False,
    max_rows: int | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """The weighted sum, for each gathered row, over this rank's experts.

    Products are in the weights' dtype, the activation in float32 (rounded once), the sum over a row's K choices in float32, in
    their order, rounded once to the dtype of `out`. A row without a local expert gives +0.0. Deterministic: no atomics. With
    `scratch`, rows >= V are neither read nor written, whatever their ids.

    Args:
        dispatched: R rows; a choice counts if its id is in [first_expert, first_expert + L). Ids -1, other ranks' ids, and
            so rows >= V, are left out, whatever their hidden values and weights are, NaNs included.
        weights: of this rank's L experts.
        first_expert: global number of the first of them.
        activation: between the products.
        out: [R, H] to write into, bfloat16, float16 or float32, or `QuantizedRows`, into which the sum's float32 numbers are
            quantized as they are made; e.g. `dispatcher.combine_input()`. None: a new tensor in the dtype of `dispatched.hidden`.
        scratch: working memory for the kernels of CUDA tensors; layers that never run at the same time share one. None: the
            library's operators, which are slower and take temporary memory for R·K pairs.
        batch_invariant: with `scratch`: a row's bits do not depend on how many other rows there are.
        dtype: with `QuantizedRows`: of the rows between the products, and of a new `out`; of hidden rows otherwise. Default: the
            weights', bfloat16 for float8 weights. float8 weights multiply `QuantizedRows` as they are, others what these stand
            for, rounded to `dtype`.
        max_rows: with `scratch`: a promise that no expert gets more rows (C·EP, if no row names an expert twice). Broken, the
            result is right and slower. `dispatched.max_expert_rows` is not looked at here: `Experts` chooses by it between
            kernels that it has prepared.

    Returns:
        `out`, [R, H].

    Raises:
        ShapeError, DtypeError, DeviceError: operands that do not fit one another; before anything is launched.
    """
    check_weights(weights, activation)
    settings: dict[str, Any] = {"batch_invariant": batch_invariant, "max_rows": max_rows, "dtype": dtype}
    return apply_checked(dispatched, weights, first_expert, activation, out, scratch=scratch, **settings)


def apply_checked(
    dispatched: Dispatched,
    weights: ExpertWeights,
    first_expert: int,
    activation: Activation,
    out: PartialRows | None = None,
    *,
    scratch: ExpertScratch | None,
    batch_invariant: bool,
    max_rows: int | None,
    dtype: torch.dtype | None,
) -> Any:
    """`apply_experts` with weights that `check_weights` has let pass."""
    hidden_RH = dispatched.hidden
    check_rows(hidden_RH, weights)
    is_quantized = isinstance(hidden_RH, QuantizedRows)
    if not is_quantized:
        dtype = hidden_RH.dtype
    elif dtype is None:
        dtype = torch.bfloat16 if weights.up_scale is not None else weights.up_proj.dtype
    elif weights.is_packed and dtype != torch.bfloat16:
        raise DtypeError(f"dtype is {dtype} but MXFP4 experts take rows as bfloat16, in which their weights are exact")
    if out is None:
        out = torch.empty(hidden_RH.shape, dtype=dtype, device=hidden_RH.device)
    else:
        check_out(out, hidden_RH)
    if hidden_RH.shape[0] == 0:
        return out
    if scratch is not None:
        if scratch.device != hidden_RH.device:
            raise DeviceError(f"scratch is on {scratch.device} but hidden is on {hidden_RH.device}; make one there")
        from tokenferry.experts import triton_path  # here: Triton is not everywhere

        return triton_path.run(
            dispatched,
            weights,
            first_expert,
            activation,
            out,
            scratch,
            batch_invariant=batch_invariant,
            max_rows=max_rows,
            dtype=dtype,
        )
    if is_quantized:
        has_float8_weights = weights.up_scale is not None and not weights.is_packed
        hidden_RH = hidden_RH.dequantize(torch.float32 if has_float8_weights else dtype)
        dispatched = replace(dispatched, hidden=hidden_RH)
    path = torch_path.choose_path(hidden_RH, weights)
    return torch_path.run(path, dispatched, weights, first_expert, activation, out, dtype=dtype, is_rounded=is_quantized)
