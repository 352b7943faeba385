"""Experts modules as transformers' families have them, one for each layout and gate, small and random."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

NUM_EXPERTS, HIDDEN, INTERMEDIATE, TOPK = 4, 32, 24, 2


def softcapped(module: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.tanh(gate / 5) * 5 * torch.sigmoid(gate) * up


class ScaledNorm(nn.Module):
    """As muse_spark's: scaled first, then divided by the root of the mean square."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(size) * 0.3), eps

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        scaled = (rows.float() * (1.0 + self.weight).float()).type_as(rows).float()
        return (scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(rows)


GATES: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "clamped": lambda m, gate, up: (
        (up.clamp(-m.limit, m.limit) + 1) * gate.clamp(max=m.limit) * torch.sigmoid(m.alpha * gate.clamp(max=m.limit))
    ),
    "limited": lambda m, gate, up: F.silu(gate.clamp(max=m.swiglu_limit)) * up.clamp(-m.swiglu_limit, m.swiglu_limit),
    "softcapped": softcapped,
    "clamped-far": lambda m, gate, up: F.silu(gate.clamp(max=60.0)) * up,
    "clamped-far-up": lambda m, gate, up: F.silu(gate) * up.clamp(-60.0, 60.0),
    "clamped-behind": lambda m, gate, up: F.silu(gate).clamp(max=m.limit) * up.clamp(-m.limit, m.limit),
}


@dataclass(frozen=True)
class Family:
    """What a family asks `@use_experts_implementation` for, and how it activates."""

    gate: str | None = None
    """In `GATES`; None: the decorator's own, `act_fn(gate) * up`."""
    act: str = "silu"
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    gated: bool = True
    norm: type[nn.Module] | None = None

    def make(self, dtype: torch.dtype = torch.float32, implementation: str = "grouped_mm") -> Any:
        from transformers.activations import ACT2FN
        from transformers.integrations import use_experts_implementation

        family = self

        class Experts(nn.Module):
            def __init__(self, config: Any) -> None:
                super().__init__()
                self.num_experts, self.act_fn = NUM_EXPERTS, ACT2FN[family.act]
                self.limit, self.swiglu_limit, self.alpha = 0.5, 0.7, 1.702
                columns = 2 * INTERMEDIATE if family.gated else INTERMEDIATE
                shapes = {"gate_up_proj" if family.gated else "up_proj": (columns, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
                for name, shape in shapes.items():
                    size = shape[::-1] if family.transposed else shape
                    self.register_parameter(name, nn.Parameter(torch.randn(NUM_EXPERTS, *size) * 0.3))
                    if family.bias:
                        self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(NUM_EXPERTS, shape[0])))
                if family.norm:
                    self.post_expert_norm = family.norm(HIDDEN, eps=1e-5)

            def forward(self, *args: Any) -> torch.Tensor:
                raise AssertionError("the decorator's function runs")

        if self.gate is not None:

            def apply_gate(module: Any, product: torch.Tensor) -> torch.Tensor:
                halves = (product[..., ::2], product[..., 1::2]) if family.interleaved else product.chunk(2, dim=-1)
                return GATES[family.gate](module, *halves)

            Experts._apply_gate = apply_gate  # type: ignore[attr-defined]
        decorate = use_experts_implementation(
            is_concatenated=not self.interleaved,
            is_transposed=self.transposed,
            has_bias=self.bias,
            has_gate=self.gated,
        )
        torch.manual_seed(6)
        module = decorate(Experts)(SimpleNamespace(_experts_implementation=implementation)).to(dtype)
        module._is_expert_parallel = True
        module.has_post_expert_norm = self.norm is not None  # the decorator of transformers 5.17 does not take it
        return module.requires_grad_(False)


FAMILIES = {
    "as-qwen3_moe": Family(),
    "as-gpt_oss": Family("clamped", interleaved=True, transposed=True, bias=True),
    "as-openai_privacy_filter": Family("clamped", transposed=True, bias=True),
    "as-aria": Family(transposed=True),
    "as-deepseek_v4": Family("limited"),
    "as-gemma4": Family(act="gelu_pytorch_tanh"),
    "gelu": Family(act="gelu"),
    "as-nemotron_h": Family(act="relu2", gated=False),
    "as-muse_spark": Family(norm=ScaledNorm),
    "no-gate-bias-transposed": Family(act="gelu", gated=False, bias=True, transposed=True),
}
"""Those that our kernels serve."""

NOT_SERVED = {
    "softcapped": (Family("softcapped"), "none of ours"),
    "clamped-behind": (Family("clamped-behind"), "none of ours"),
    "clamped-far": (Family("clamped-far"), "none of ours"),
    "clamped-far-up": (Family("clamped-far-up"), "none of ours"),
    "a-norm-that-scales-behind": (Family(norm=nn.RMSNorm), "the norm behind each expert"),
    "a-norm-of-another-kind": (Family(norm=nn.LayerNorm), "the norm behind each expert"),
    "tanh": (Family(act="tanh"), "none of ours"),
}


def some_choices(num_rows: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(num_rows, HIDDEN, generator=generator)
    idx = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOPK] for _ in range(num_rows)])
    return hidden, idx, torch.rand(num_rows, TOPK, generator=generator)


def skip_what_is_newer(name: str) -> None:
    """Skips a family whose own function needs a newer transformers."""
    from transformers.integrations import use_experts_implementation

    if FAMILIES[name].norm and "has_post_expert_norm" not in inspect.signature(use_experts_implementation).parameters:
        pytest.skip("this transformers knows no norm behind an expert; 5.23 does")
