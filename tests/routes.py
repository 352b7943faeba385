"""Rows for the routing kernel, and what it has to make of them; interpreted and on GPUs alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from test_router import DEEPSEEK, RULES
from tokenferry.router import RouterConfig, _route_by_kernel, route


@dataclass(frozen=True)
class Routes:
    """Rows of distinct logits under one set of rules."""

    rules: str
    num_experts: int = 16
    topk: int = 4
    num_rows: int = 5
    dtype: torch.dtype = torch.float32
    idx_dtype: torch.dtype = torch.int32
    num_off: int = 0
    """Experts with a correction of -inf."""

    def __str__(self) -> str:
        off = f"-{self.num_off}off" if self.num_off else ""
        return f"{self.rules}-E{self.num_experts}-K{self.topk}-T{self.num_rows}-{str(self.dtype).removeprefix('torch.')}{off}"

    @property
    def config(self) -> RouterConfig:
        sizes = {"hidden_size": 4, "num_experts": self.num_experts, "topk": self.topk, "idx_dtype": self.idx_dtype}
        return RouterConfig(**{**sizes, **RULES[self.rules]})

    def logits(self) -> torch.Tensor:
        """Distinct in every dtype, apart from one another by more than any rounding of scores."""
        generator = torch.Generator().manual_seed(self.num_experts)
        rows = [torch.randperm(self.num_experts, generator=generator) for _ in range(self.num_rows)]
        logits = torch.stack(rows) if rows else torch.empty(0, self.num_experts)
        return (logits / 16 - self.num_experts / 32).to(self.dtype)

    def correction(self) -> torch.Tensor | None:
        if not self.config.score_correction_bias:
            return None
        correction = torch.randn(self.num_experts, generator=torch.Generator().manual_seed(2)) * 0.3
        correction[torch.randperm(self.num_experts, generator=torch.Generator().manual_seed(3))[: self.num_off]] = -torch.inf
        return correction

    def error(self, device: str) -> str:
        """What the kernel says on `device` against PyTorch's operators on the CPU; "" if the same."""
        logits, correction = self.logits(), self.correction()
        want_weights, want_idx = route(logits, self.config, correction)
        moved = None if correction is None else correction.to(device)
        weights, idx = (each.cpu() for each in _route_by_kernel(logits.to(device), self.config, moved))
        if idx.dtype != want_idx.dtype or not torch.equal(idx, want_idx):
            return f"experts {idx.tolist()}, not {want_idx.tolist()}"
        if weights.dtype != torch.float32 or not torch.allclose(weights, want_weights, rtol=3e-6, atol=0):
            return f"weights {weights.tolist()}, not {want_weights.tolist()}"
        return ""


CASES = (
    *(Routes(rules) for rules in RULES),
    *(Routes(rules, dtype=torch.bfloat16) for rules in ("softmax", "deepseek")),
    Routes("softmax", num_experts=8, topk=2),
    Routes("softmax", num_experts=8, topk=8),
    Routes("softmax", num_experts=1, topk=1),
    Routes("softmax-renormalised", num_experts=60, topk=7, idx_dtype=torch.int64),
    Routes("softmax-of-chosen", num_experts=32, topk=3, dtype=torch.float16),
    Routes("deepseek", num_experts=256, topk=8),
    Routes("deepseek", num_experts=24, topk=5),
    Routes("sigmoid-correction", num_experts=600, topk=22),  # more than one warp
    Routes("softmax", num_rows=0),
    *(Routes(rules, num_off=off) for rules in ("sigmoid-correction", "deepseek") for off in (3, 7, 13, 16)),
    Routes("deepseek", num_experts=256, topk=8, num_off=200),
)


def hostile(device: str) -> dict[str, bool]:
    """Rows that leave no right answer but one: valid experts, each once, the lower number first among equals."""
    plain = RouterConfig(hidden_size=4, num_experts=6, topk=3)
    groups = RouterConfig(**{"hidden_size": 4, "num_experts": 16, "topk": 4, **DEEPSEEK})
    chosen = RouterConfig(hidden_size=4, num_experts=6, topk=3, topk_before_score=True)

    def idx(rows: list[list[float]], config: RouterConfig = plain) -> list[list[int]]:
        correction = torch.zeros(config.num_experts, device=device) if config.score_correction_bias else None
        return _route_by_kernel(torch.tensor(rows, device=device), config, correction)[1].tolist()

    nan, inf = float("nan"), float("inf")
    return {
        "equals": idx([[1.0] * 6, [0.0, -0.0, 0.0, 1.0, 0.0, 0.0]]) == [[0, 1, 2], [3, 0, 1]],
        "equal groups": idx([[0.5] * 16], groups) == [[0, 1, 2, 3]],
        "all NaN": idx([[nan] * 6]) == [[0, 1, 2]],
        "NaN comes first": idx([[1.0, nan, 3.0, 2.0, -nan, 0.0]], chosen) == [[1, 4, 2]],
        "all NaN in groups": sorted(idx([[nan] * 16], groups)[0]) == [0, 1, 2, 3],
        "minus infinity": idx([[-inf, -inf, 0.0, -inf, -inf, -inf]], chosen) == [[2, 0, 1]],
        "groups of infinities": len(set(idx([[-inf] * 16], groups)[0])) == 4,
    }


def example(device: str) -> tuple[list[list[float]], list[list[int]], list[list[float]]]:
    """The worked example of `route_kernel`."""
    logits = torch.tensor([[1.0, 4.0, 1.0, 2.0]], device=device).log()
    config = RouterConfig(hidden_size=4, num_experts=4, topk=2)
    weights, idx = _route_by_kernel(logits, config, None)
    shared = RouterConfig(hidden_size=4, num_experts=4, topk=2, renormalize=True)
    return weights.tolist(), idx.tolist(), _route_by_kernel(logits, shared, None)[0].tolist()


def switched_off_example(device: str) -> tuple[list[list[float]], list[list[int]]]:
    """The second one: three of four experts are off."""
    logits = torch.tensor([[1.0, 4.0, 1.0, 2.0]], device=device).log()
    config = RouterConfig(hidden_size=4, num_experts=4, topk=2, score_correction_bias=True)
    correction = torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf], device=device)
    weights, idx = _route_by_kernel(logits, config, correction)
    return weights.tolist(), idx.tolist()
