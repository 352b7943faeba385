"""This rank's experts on weights that are another library's parameters: the way in for the integrations.

Legend of shape suffixes: R gathered rows, K choices of a row, H hidden size, L experts of this rank (`e` elsewhere).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched, PartialRows
from tokenferry.errors import ShapeError
from tokenferry.experts.apply import apply_checked
from tokenferry.experts.plan import class_of_rows
from tokenferry.experts.scratch import ExpertScratch
from tokenferry.experts.weights import ExpertWeights, check_rows, check_weights


class BorrowedExperts:
    """Experts that own no weights. Layers that never run at the same time share one scratch on a device.

    Args:
        weights: of this rank's L experts, as views (see `ExpertWeights.view`). They are read anew by each call.
        expert_range: which global experts these are.
        activation: between the products.
        dtype: of the hidden rows.
        batch_invariant: see `Experts`.

    Raises:
        ShapeError, DtypeError, DeviceError: parts that do not fit one another.

    Example:
        experts = BorrowedExperts(ExpertWeights.view(w13, w2), group.expert_range(E), Activation(), dtype=torch.bfloat16)
        experts.prepare(ExpertScratch(device), topk=8, max_rows=ep_size * max_tokens_per_rank, out_dtypes=[torch.bfloat16])
        ...
        dispatcher.combine(experts(got, out=dispatcher.combine_input()), got)
    """

    def __init__(
        self,
        weights: ExpertWeights,
        expert_range: range,
        activation: Activation,
        *,
        dtype: torch.dtype,
        batch_invariant: bool = False,
    ) -> None:
        L, H, _ = weights.sizes
        if len(expert_range) != L:
            raise ShapeError(f"the weights are of {L} experts but expert_range is {expert_range}; give the range of these")
        check_weights(weights, activation)
        check_rows(torch.empty(0, H, dtype=dtype, device=weights.down_proj.device), weights)
        self.weights, self.expert_range, self.activation, self.dtype = weights, expert_range, activation, dtype
        self.batch_invariant = batch_invariant
        self.scratch: ExpertScratch | None = None
        """Memory and kernels after `prepare`; without, the library's operators do the work."""
        self._max_rows: int | None = None

    def prepare(
        self,
        scratch: ExpertScratch,
        *,
        topk: int,
        max_rows: int,
        out_dtypes: Iterable[torch.dtype],
        index_dtype: torch.dtype = torch.int32,
        quantized_rows: bool = False,
    ) -> None:
        """Compiles and loads the kernels, and takes their memory, for calls with up to `max_rows` gathered rows.

        Before the first step: loading a kernel waits for the device, so never while a peer waits, nor during a capture.

        Args:
            scratch: one for all layers of a device.
            topk: K.
            max_rows: C·EP. No row may name an expert twice.
            out_dtypes: of the partial rows that calls will ask for: the workspace's `combine_dtype`, and others if need be.
            index_dtype: of the ids that a dispatch gives.
            quantized_rows: whether it gives `QuantizedRows`.
        """
        from tokenferry.experts import triton_path  # here: Triton is not everywhere

        self.scratch, self._max_rows = scratch, max_rows
        for out_dtype in set(out_dtypes):
            triton_path.prepare(
                scratch,
                self.weights,
                self.activation,
                topk=topk,
                index_dtype=index_dtype,
                out_dtype=out_dtype,
                batch_invariant=self.batch_invariant,
                max_rows=max_rows,
                hidden_dtype=self.dtype,
                quantized_rows=quantized_rows,
            )

    @torch.no_grad()
    def __call__(self, dispatched: Dispatched, out: PartialRows | None = None) -> Any:
        """`apply_experts` with these weights: [R, H] partial rows, in `out` if given."""
        return apply_checked(
            dispatched,
            self.weights,
            self.expert_range.start,
            self.activation,
            out,
            scratch=self.scratch,
            batch_invariant=self.batch_invariant,
            max_rows=class_of_rows(self._max_rows, dispatched.max_expert_rows, self.batch_invariant),
            dtype=self.dtype,
        )
