"""transformers' own experts functions on the weights of our `Experts`, to compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tokenferry.dispatched import Dispatched
from tokenferry.experts import Experts

ExpertsFunction = Callable[..., torch.Tensor]


def experts_functions() -> dict[str, ExpertsFunction]:
    """transformers' experts functions by name; empty without transformers, or if it has them under other names."""
    try:
        from transformers.integrations import moe
    except ImportError:
        return {}
    names = ("grouped_mm", "batched_mm")
    return {name: getattr(moe, f"{name}_experts_forward") for name in names if hasattr(moe, f"{name}_experts_forward")}


class TransformersExperts(nn.Module):
    """One of those functions in the place of `Experts` in a `MoELayer`.

    It is given the valid rows alone, whose number the host must know: all ranks bring the same number of tokens here.
    """

    def __init__(self, experts: Experts, function: ExpertsFunction, num_valid: int) -> None:
        super().__init__()
        self._local_range, self._activation = experts.expert_range, experts.config.activation
        self._function, self._num_valid = function, num_valid
        # The attributes that transformers' functions read of the module that they are given:
        self.num_experts = len(experts.expert_range)
        self.has_gate, self.has_bias, self.is_transposed = True, experts.config.bias, False
        self.has_post_expert_norm, self.is_concatenated, self._is_expert_parallel = False, True, True
        self.gate_up_proj, self.down_proj = experts.up_proj, experts.down_proj
        self.gate_up_proj_bias, self.down_proj_bias = experts.up_bias, experts.down_bias
        self.config = None

    def _apply_gate(self, up: torch.Tensor) -> torch.Tensor:
        activation = self._activation
        gate, up = (up[..., 0::2], up[..., 1::2]) if activation.interleaved else up.chunk(2, dim=-1)
        if activation.name == "swiglu":
            return F.silu(gate) * up
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return (up + 1) * gate * torch.sigmoid(gate * activation.alpha)

    def forward(self, dispatched: Dispatched, out: torch.Tensor) -> torch.Tensor:
        """See `Experts.forward`."""
        valid = self._num_valid
        local = dispatched.topk_idx[:valid].long() - self._local_range.start
        is_local = (local >= 0) & (local < self.num_experts)
        local = torch.where(is_local, local, self.num_experts)
        weights = torch.where(is_local, dispatched.topk_weights[:valid], 0.0)
        out[:valid].copy_(self._function(self, dispatched.hidden[:valid], local, weights))
        return out
