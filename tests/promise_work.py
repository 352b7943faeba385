"""Kinds of experts, rows of few and of many to an expert, and steps that promise few or nothing."""

from dataclasses import dataclass

import torch

import tokenferry as tf
from tokenferry.activations import Activation
from tokenferry.experts import Experts, ExpertsConfig

E, K, H = 4, 2, 128
CAPACITY = 62
KEPT = (4, 3)
"""Rows of the two ranks: at most 8 an expert."""
BROKEN = (4, CAPACITY)
"""Rank 0 promises 4, and one of its experts gets 66 rows: more than `FEW_ROWS`. Rank 1 promises nothing."""


@dataclass(frozen=True)
class Kind:
    """One kind of experts.

    Attributes:
        num_launches: of both products and of what quantizes rows, in a step without a promise, and in one that promises few rows.
    """

    num_launches: tuple[int, int]
    weights: str = "plain"
    intermediate_size: int = 128
    batch_invariant: bool = False
    dtype: torch.dtype = torch.bfloat16

    def experts(self, group: tf.EPGroup) -> Experts:
        config = ExpertsConfig(
            hidden_size=H, intermediate_size=self.intermediate_size, num_experts=E, activation=Activation("swiglu"), bias=True
        )
        torch.manual_seed(7)
        made = Experts(config, group.expert_range(E), dtype=self.dtype, device=group.device, batch_invariant=self.batch_invariant)
        N = 2 * self.intermediate_size
        if self.weights == "mxfp4":
            parts = [
                part
                for rows, depth in ((N, H), (H, self.intermediate_size))
                for part in (
                    torch.randint(0, 256, (E, rows, depth // 32, 16), dtype=torch.uint8),
                    torch.full((E, rows, depth // 32), 122, dtype=torch.uint8),
                )
            ]
            made.load_mxfp4(*parts, torch.randn(E, N), torch.randn(E, H))
            return made
        matrices = torch.randn(E, N, H) * H**-0.5, torch.randn(E, H, self.intermediate_size) * self.intermediate_size**-0.5
        made.load(*matrices, torch.randn(E, N), torch.randn(E, H))
        if self.weights == "float8":
            made.quantize()
        return made


KINDS = {
    "bfloat16": Kind((4, 2)),
    "bfloat16-batch-invariant": Kind((2, 2), batch_invariant=True),
    "float32": Kind((2, 2), dtype=torch.float32),
    "float8": Kind((6, 2), "float8", intermediate_size=96),
    "float8-in-blocks": Kind((5, 3), "float8"),
    "mxfp4": Kind((4, 2), "mxfp4"),
    "mxfp4-batch-invariant": Kind((2, 2), "mxfp4", batch_invariant=True),
}


def rows_of(group: tf.EPGroup, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every row names expert 0, and one other."""
    generator = torch.Generator().manual_seed(group.rank)
    idx = torch.stack([torch.zeros(count, dtype=torch.int64), torch.randint(1, E, (count,), generator=generator)], dim=1)
    rows = torch.randn(count, H, generator=generator).to(dtype), idx, torch.rand(count, K, generator=generator)
    hidden, idx, weights = (tensor.to(group.device) for tensor in rows)
    return hidden, idx, weights


def step(ws: tf.Workspace, layer: tf.Dispatcher, experts: Experts, count: int, max_tokens: int | None) -> torch.Tensor:
    ws.begin_step(count, max_tokens=max_tokens)
    got = layer.dispatch(*rows_of(ws.group, count, ws.config.dtype))
    assert got.max_expert_rows == (None if max_tokens is None else max_tokens * ws.group.size)
    return layer.combine(experts(got, out=layer.combine_input()), got)
