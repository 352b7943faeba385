"""Calls of the fused experts as Megatron-Core makes them, and what they must give, in float64."""

from dataclasses import dataclass
from typing import Any

import torch

LOCAL, FIRST, NUM_EXPERTS, TOPK = 3, 2, 7, 2
"""Experts of this rank, the number of the first, all experts, and choices of a row."""


@dataclass
class Call:
    """Operands of one call. Rows from `valid` on are NaN and name local experts; some choices are -1."""

    hidden: torch.Tensor
    probs: torch.Tensor
    fc1: torch.Tensor
    fc2: torch.Tensor
    routing: torch.Tensor
    valid: torch.Tensor

    def arguments(self, kind: Any) -> dict[str, Any]:
        """By Megatron's names, all but `out` and what only one of its entries takes."""
        return {
            "hidden_states": self.hidden, "probs": self.probs, "fc1_weight": self.fc1, "fc2_weight": self.fc2,
            "activation_type": kind, "num_local_experts": self.fc1.shape[0], "local_expert_start": FIRST,
            "valid_tokens": self.valid, "routing_map": self.routing,
        }  # fmt: skip


def make_call(
    num_rows: int = 12,
    valid: int = 9,
    hidden_size: int = 24,
    intermediate_size: int = 20,
    *,
    gated: bool = False,
    topk: int = TOPK,
    num_local: int = LOCAL,
    num_experts: int = NUM_EXPERTS,
    device: str = "cpu",
    seed: int = 3,
) -> Call:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    columns = 2 * intermediate_size if gated else intermediate_size
    routing = torch.rand(num_rows, num_experts, generator=generator, device=device).topk(topk, 1).indices
    routing[torch.rand(routing.shape, generator=generator, device=device) < 0.1] = -1
    call = Call(
        hidden=normal(num_rows, hidden_size).bfloat16(),
        probs=torch.rand(num_rows, topk, generator=generator, device=device),
        fc1=(normal(num_local, columns, hidden_size) / hidden_size**0.5).bfloat16(),
        fc2=(normal(num_local, hidden_size, intermediate_size) / intermediate_size**0.5).bfloat16(),
        routing=routing,
        valid=torch.tensor([valid], dtype=torch.int32, device=device),
    )
    return with_valid(call, valid)


def with_valid(call: Call, valid: int) -> Call:
    """The same operands with another V, and garbage beyond it."""
    hidden, routing, probs = call.hidden.clone(), call.routing.clone(), call.probs.clone()
    hidden[valid:], routing[valid:], probs[valid:] = torch.nan, FIRST, torch.nan
    return Call(hidden, probs, call.fc1, call.fc2, routing, torch.tensor([valid], dtype=torch.int32, device=call.hidden.device))


def in_float64(call: Call, kind: str) -> torch.Tensor:
    """[V, H]: no rounding anywhere."""
    valid = int(call.valid)
    x = call.hidden[:valid].double()
    total = torch.zeros_like(x)
    for local in range(call.fc1.shape[0]):
        up = x @ call.fc1[local].double().T
        if kind == "swiglu":
            gate, up = up.chunk(2, 1)
            activated = gate * gate.sigmoid() * up
        else:
            activated = up.relu() ** 2
        share = (call.probs[:valid].double() * (call.routing[:valid] == FIRST + local)).sum(1, keepdim=True)
        total += share * (activated @ call.fc2[local].double().T)
    return total


def error(out: torch.Tensor, call: Call, kind: str) -> float:
    """The largest difference from `in_float64`, as a share of the largest number."""
    valid = int(call.valid)
    if not valid:
        return 0.0
    expected = in_float64(call, kind)
    return ((out[:valid].double() - expected).abs().max() / expected.abs().max()).item()


TOLERANCE = 1e-2
"""Of `error`: both Megatron's kernels and ours round activated rows and outputs of experts to bfloat16, 2^-9 each."""
