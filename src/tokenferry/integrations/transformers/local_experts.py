"""This rank's experts of one MoE layer, run by the model's own code on gathered rows.

H hidden size, K top-k, E experts, e experts of this rank, R gathered rows, T rows of this rank.

An expert of another rank, and -1, becomes local number e with weight 0, which transformers' experts skip.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

GATHERED_BYTES: Final = 1 << 28
"""Weights that `batched_mm` may gather at a time."""


class LocalExperts(Protocol):
    """What a MoE layer needs of its experts."""

    owned: range

    def partial(
        self, hidden_RH: torch.Tensor, topk_idx_RK: torch.Tensor, topk_weights_RK: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """[R, H] in `dtype`: for each row the weighted sum over this rank's experts."""

    def each_choice(self, hidden_RH: torch.Tensor, topk_idx_RK: torch.Tensor, topk_weights_RK: torch.Tensor) -> torch.Tensor:
        """[R, K, H]: each choice's expert output before `sum_choices`, -0.0 where the expert is another rank's
        (x + -0.0 is x for every x, -0.0 included; x + 0.0 is not)."""

    def sum_choices(self, outputs_TKH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor) -> torch.Tensor:
        """[T, H]: the outputs of all choices put together in the order and the dtypes of the unmodified model."""


class RoutedExperts:
    """Experts with `@use_experts_implementation`: called with rows, choices and weights.

    Args:
        experts: the module, cut to this rank's experts.
        num_experts: E.
        owned: this rank's experts.
    """

    def __init__(self, experts: nn.Module, num_experts: int, owned: range) -> None:
        self._forward: Any = experts.forward  # as it is before the layer replaces it
        self.owned = owned

    def partial(
        self, hidden_RH: torch.Tensor, topk_idx_RK: torch.Tensor, topk_weights_RK: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """See `LocalExperts.partial`. In the rows' own dtype, the family's forward as it is. For a wider one, its forward for
        each choice, which is the same GEMM on the same rows, and its weighted sum without the last rounding."""
        local_idx_RK, is_own_RK = local_choices(topk_idx_RK, self.owned)
        weights_RK = topk_weights_RK.masked_fill(~is_own_RK, 0)
        if dtype == hidden_RH.dtype:
            summed: torch.Tensor = self._forward(hidden_RH, local_idx_RK, weights_RK)
            return summed
        return (self._run_choices(hidden_RH, local_idx_RK, is_own_RK, weights_RK.dtype) * weights_RK.unsqueeze(-1)).sum(
            dim=1, dtype=dtype
        )

    def each_choice(self, hidden_RH: torch.Tensor, topk_idx_RK: torch.Tensor, topk_weights_RK: torch.Tensor) -> torch.Tensor:
        """See `LocalExperts.each_choice`: unweighted."""
        local_idx_RK, is_own_RK = local_choices(topk_idx_RK, self.owned)
        outputs_RKH = self._run_choices(hidden_RH, local_idx_RK, is_own_RK, topk_weights_RK.dtype)
        return outputs_RKH.masked_fill_(~is_own_RK.unsqueeze(-1), -0.0)

    def sum_choices(self, outputs_TKH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor) -> torch.Tensor:
        """See `LocalExperts.sum_choices`: the end of transformers' grouped_mm forward."""
        return (outputs_TKH * topk_weights_TK.unsqueeze(-1)).sum(dim=1).to(outputs_TKH.dtype)

    def _run_choices(
        self, hidden_RH: torch.Tensor, local_idx_RK: torch.Tensor, is_own_RK: torch.Tensor, weight_dtype: torch.dtype
    ) -> torch.Tensor:
        """[R, K, H], unweighted: every choice as a row of its own with one expert and weight 1, which changes no bit."""
        num_rows, topk = local_idx_RK.shape
        rows = hidden_RH.repeat_interleave(topk, dim=0)
        outputs: torch.Tensor = self._forward(rows, local_idx_RK.reshape(-1, 1), is_own_RK.reshape(-1, 1).to(weight_dtype))
        return outputs.view(num_rows, topk, -1)


class Llama4Experts:
    """Experts of Llama 4: they take every row, multiplied by its weight (0 where not chosen), expert after expert.

    Args: as `RoutedExperts`.
    """

    def __init__(self, experts: nn.Module, num_experts: int, owned: range) -> None:
        self._forward: Any = experts.forward
        self._num_experts = num_experts
        self.owned = owned

    def partial(
        self, hidden_RH: torch.Tensor, topk_idx_RK: torch.Tensor, topk_weights_RK: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """See `LocalExperts.partial`."""
        return self._each_expert(hidden_RH, topk_idx_RK, topk_weights_RK).sum(dim=0, dtype=dtype)

    def each_choice(self, hidden_RH: torch.Tensor, topk_idx_RK: torch.Tensor, topk_weights_RK: torch.Tensor) -> torch.Tensor:
        """See `LocalExperts.each_choice`: weighted, since the weight is in the input."""
        local_idx_RK, is_own_RK = local_choices(topk_idx_RK, self.owned)
        outputs_eRH = self._each_expert(hidden_RH, topk_idx_RK, topk_weights_RK)
        row_R1 = torch.arange(hidden_RH.shape[0], dtype=torch.int64, device=hidden_RH.device).unsqueeze(1)
        outputs_RKH = outputs_eRH[local_idx_RK.clamp(max=len(self.owned) - 1), row_R1]
        return outputs_RKH.masked_fill_(~is_own_RK.unsqueeze(-1), -0.0)

    def sum_choices(self, outputs_TKH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor) -> torch.Tensor:
        """See `LocalExperts.sum_choices`: over all E experts, since a sum's bits depend on where its zeros stand."""
        outputs_ETH = outputs_TKH.new_zeros(self._num_experts, outputs_TKH.shape[0], outputs_TKH.shape[2])
        row_T1 = torch.arange(outputs_TKH.shape[0], dtype=torch.int64, device=outputs_TKH.device).unsqueeze(1)
        outputs_ETH[topk_idx_TK.long(), row_T1] = outputs_TKH
        return outputs_ETH.sum(dim=0)

    def _each_expert(self, hidden_RH: torch.Tensor, topk_idx_RK: torch.Tensor, topk_weights_RK: torch.Tensor) -> torch.Tensor:
        """[e, R, H]"""
        local_idx_RK, _ = local_choices(topk_idx_RK, self.owned)
        num_rows, num_own = hidden_RH.shape[0], len(self.owned)
        scores_Re = topk_weights_RK.new_zeros(num_rows, num_own + 1).scatter_(1, local_idx_RK, topk_weights_RK)[:, :num_own]
        routed = hidden_RH.repeat(num_own, 1) * scores_Re.transpose(0, 1).reshape(-1, 1)
        outputs: torch.Tensor = self._forward(routed)
        return outputs.view(num_own, num_rows, -1)


def local_choices(topk_idx_RK: torch.Tensor, owned: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Local expert numbers (int64; `len(owned)` for what is not this rank's), and where they are this rank's.

    Example: owned = range(2, 4), topk_idx = [[3, 0], [2, -1]] -> [[1, 2], [0, 2]], [[True, False], [True, False]].
    """
    shifted_RK = topk_idx_RK.to(torch.int64) - owned.start
    is_own_RK = (shifted_RK >= 0) & (shifted_RK < len(owned))
    return torch.where(is_own_RK, shifted_RK, len(owned)), is_own_RK


def experts_forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' grouped_mm, or its batched_mm where the rows are no multiple of 16 bytes long, which grouped_mm refuses.

    batched_mm gathers the weights of one expert for each choice of each row, so it gets a few rows at a time.
    """
    arguments = (hidden_states, top_k_index, top_k_weights)
    down = experts.down_proj
    summed: torch.Tensor
    if has_grouped_rows(experts):
        summed = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, *arguments)
        return summed
    bytes_per_row = 2 * down[0].nbytes * top_k_index.shape[-1]
    at_a_time = max(1, GATHERED_BYTES // bytes_per_row)
    batched_mm = ALL_EXPERTS_FUNCTIONS["batched_mm"]
    parts = [batched_mm(experts, *rows) for rows in zip(*(each.split(at_a_time) for each in arguments), strict=True)]
    summed = torch.cat(parts)
    return summed


def has_grouped_rows(experts: Any) -> bool:
    """Whether grouped_mm takes the experts' rows: whole packets of 16 bytes."""
    down = experts.down_proj
    return all(size * down.element_size() % 16 == 0 for size in down.shape[1:])
