"""Linear layers whose rows have the same bits whatever other rows there are: parts of a batch-invariant layer.

A library's product takes another kernel for another number of rows, which adds in another order.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

from tokenferry.ambient import uncompiled
from tokenferry.errors import DtypeError


@uncompiled
def fixed_linear(
    rows_TD: torch.Tensor,
    weight_ND: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.linear` of [T, D] rows, a row's bits independent of T and of the other rows. No gradients.

    Sums are float32, the bias is added to the sum, and the result rounded once. On CUDA it is one kernel with one cut for every
    T, elsewhere each row is multiplied by itself. A compiler does not look inside.

    Args:
        out_dtype: of the result; None: that of the rows. With float32 the sums themselves.

    Raises:
        DtypeError: rows and weight are of different dtypes.
    """
    if rows_TD.dtype != weight_ND.dtype:
        raise DtypeError(f"rows are {rows_TD.dtype} but the weight is {weight_ND.dtype}; convert one of them")
    out_dtype = out_dtype or rows_TD.dtype
    with torch.no_grad():
        if rows_TD.is_cuda:
            from tokenferry.kernels import fixed_linear as kernel  # here: Triton is not everywhere

            result: torch.Tensor = kernel.fixed_linear(rows_TD, weight_ND, bias_N, out_dtype)
            return result
        rows_TD = rows_TD.to(torch.promote_types(rows_TD.dtype, out_dtype))
        weight_ND, bias_N = weight_ND.to(rows_TD.dtype), None if bias_N is None else bias_N.to(rows_TD.dtype)
        out_TN = torch.empty(rows_TD.shape[0], weight_ND.shape[0], dtype=out_dtype, device=rows_TD.device)
        for row, out in zip(rows_TD.split(1), out_TN.split(1), strict=True):
            out.copy_(F.linear(row, weight_ND, bias_N))
        return out_TN


class FixedLinear(nn.Linear):
    """A `torch.nn.Linear` for inference by `fixed_linear`, e.g. the latent projections of a batch-invariant layer."""

    batch_invariant: Final = True

    def prepare(self) -> None:
        """On CUDA: loads what a call launches. Loading waits for the device, so not amid steps."""
        weight: torch.Tensor = self.weight
        if weight.is_cuda:
            self(torch.zeros(1, self.in_features, dtype=weight.dtype, device=weight.device))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., N]."""
        rows_TD = input.reshape(-1, self.in_features)
        output_TN: torch.Tensor = fixed_linear(rows_TD, self.weight, self.bias)
        return output_TN.view(*input.shape[:-1], self.out_features)
