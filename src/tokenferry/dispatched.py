"""What a dispatch hands to the experts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatched:
    """All ranks' rows, in rank order. R rows, of which the first V are real (`R` is static where a graph needs it).

    Attributes:
        hidden: [R, H] in the configuration's dtype. Rows >= V are undefined, NaNs included.
        topk_idx: [R, K] global expert numbers, int32 or the workspace's `index_dtype`; -1 = no expert: padding rows, and every
            row >= V.
        topk_weights: [R, K] float32, carried unchanged, also where the id is -1. Rows >= V are undefined.
        valid_tokens: [1] int32, V, on the device.

    On symmetric transports these are views of the workspace's buffers, valid until the matching `combine_begin`. On `local` (one
    rank, and `solo()` over the collective transport) they may be the very tensors that `dispatch` was given; elsewhere they never
    share memory with them.
    """

    hidden: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    valid_tokens: torch.Tensor
    handle: object = field(default=None, repr=False)
    """Which dispatch of which workspace this is; private to `Dispatcher`."""
