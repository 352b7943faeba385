"""Experts with packed MXFP4 weights beside the same experts with the bfloat16 weights that these stand for."""

import dataclasses

import torch

from test_experts import LOCAL, NUM_EXPERTS, Case
from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched
from tokenferry.experts import Experts, ExpertsConfig, mxfp4

BFLOAT16 = torch.bfloat16
CASES = {
    "gpt-oss": Case(Activation("clamped_swiglu", interleaved=True), True, BFLOAT16, 96, 160),
    "halves": Case(Activation("swiglu"), False, BFLOAT16, 64, 96),
    "no-gate": Case(Activation("relu"), True, BFLOAT16, 160, 32),
}
"""No size but one is a multiple of the 64 rows and columns that are packed together."""
LIMITS = (16, 17, 64, 65, 128, 129, 192, 193, 257)
"""Rows of one expert, on both sides of each number at which other tiles or the other launch take over."""


def checkpoint(num_experts: int, rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales of random weights around 1 / 16, every code among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_experts, rows, columns // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(120, 125, shape, dtype=torch.uint8, generator=generator)


def pair(case: Case, *, device: str = "cpu", **settings) -> tuple[Experts, Experts, Dispatched]:
    """Packed experts, plain ones with the same numbers, and rows for both."""
    shape = ExpertsConfig(
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_experts=NUM_EXPERTS,
        activation=case.activation,
        bias=case.bias,
    )
    columns = case.activation.num_columns(case.intermediate_size)
    up = checkpoint(NUM_EXPERTS, columns, case.hidden_size)
    down = checkpoint(NUM_EXPERTS, case.hidden_size, case.intermediate_size, seed=1)
    generator = torch.Generator().manual_seed(2)
    biases = []
    if case.bias:
        biases = [torch.randn(NUM_EXPERTS, size, generator=generator).bfloat16() for size in (columns, case.hidden_size)]
    packed, plain = (Experts(shape, LOCAL, device=device, **settings) for _ in range(2))
    packed.load_mxfp4(*up, *down, *biases)
    plain.load(mxfp4.dequantize(*up), mxfp4.dequantize(*down), *biases)
    return packed, plain, moved(case.rows(), device)


def moved(rows: Dispatched, device: str) -> Dispatched:
    return dataclasses.replace(
        rows,
        hidden=rows.hidden.to(device),
        topk_idx=rows.topk_idx.to(device),
        topk_weights=rows.topk_weights.to(device),
        valid_tokens=rows.valid_tokens.to(device),
    )


def of_one_expert(rows: Dispatched) -> Dispatched:
    """The same rows, each of which chooses the first local expert and no other."""
    topk_idx = torch.full_like(rows.topk_idx, -1)
    topk_idx[:, 0] = LOCAL.start
    return dataclasses.replace(rows, topk_idx=topk_idx)
