"""Experts whose weights lie as other libraries store them, and rows for them: what the interpreter and the GPU tests share."""

from dataclasses import dataclass

import torch

from test_experts import LOCAL, NUM_EXPERTS, gathered
from tokenferry.activations import Activation
from tokenferry.experts import Experts, ExpertsConfig, ExpertWeights
from tokenferry.experts.plan import Plan


@dataclass(frozen=True)
class Layout:
    """How the matrices of a stack lie: by default [E, columns, depth], as `nn.Linear` has them."""

    activation: Activation
    bias: bool = False
    transposed: bool = False
    """[E, depth, columns]"""
    depth_first: bool = False
    """[depth, E, columns]"""
    plan: Plan | None = None
    dtype: torch.dtype = torch.bfloat16
    hidden_size: int = 40
    intermediate_size: int = 24

    def build(self, num_rows: int = 23):
        torch.manual_seed(4)
        shape = ExpertsConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_experts=NUM_EXPERTS,
            activation=self.activation,
            bias=self.bias,
        )
        experts = Experts(shape, LOCAL, dtype=self.dtype)
        for bias in (experts.up_bias, experts.down_bias):
            if bias is not None:
                bias.normal_()
        return experts, rows_for(self.hidden_size, self.dtype, num_rows)

    def stored(self, matrices: torch.Tensor) -> torch.Tensor:
        """As the other library's parameter has them, NaNs behind them: nothing may read beyond."""
        order = (2, 0, 1) if self.depth_first else (0, 2, 1) if self.transposed else (0, 1, 2)
        parameter = matrices.permute(order).contiguous()
        with_tail = torch.full((parameter.numel() + 4096,), torch.nan, dtype=parameter.dtype, device=parameter.device)
        with_tail[: parameter.numel()] = parameter.flatten()
        return with_tail[: parameter.numel()].view(parameter.shape)

    def view(self, experts: Experts) -> ExpertWeights:
        up, down = self.stored(experts.up_proj.data), self.stored(experts.down_proj.data)
        biases = {"up_bias": experts.up_bias, "down_bias": experts.down_bias}
        if self.depth_first:
            up, down = up.permute(1, 0, 2), down.permute(1, 0, 2)
        weights = ExpertWeights.view(up, down, transposed=self.transposed or self.depth_first, **biases)
        assert (weights.up_proj.data_ptr(), weights.down_proj.data_ptr()) == (up.data_ptr(), down.data_ptr())
        return weights


def rows_for(hidden_size: int, dtype: torch.dtype, num_rows: int = 23):
    generator = torch.Generator().manual_seed(5)
    idx = torch.rand(num_rows, NUM_EXPERTS, generator=generator).argsort(1)[:, :3].to(torch.int32)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    return gathered(hidden, idx, torch.rand(num_rows, 3, generator=generator))
