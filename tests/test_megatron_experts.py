"""The fused experts under Megatron-Core's names."""

from types import SimpleNamespace

import pytest
import torch

from megatron_classes import fresh_classes, rows
from tokenferry.activations import Activation
from tokenferry.errors import DeviceError, DtypeError, ShapeError
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.integrations import megatron

__all__ = ["fresh_classes"]  # a fixture that every test here gets


@pytest.fixture
def experts() -> Experts:
    torch.manual_seed(0)
    shape = ExpertsConfig(hidden_size=8, intermediate_size=16, num_experts=4, activation=Activation("squared_relu"))
    return Experts(shape, range(1, 3), dtype=torch.float32)


def fused(experts: Experts, hidden, probs, routing, valid: int, **changes):
    arguments = {
        "activation_type": "squared_relu",
        "num_local_experts": 2,
        "local_expert_start": 1,
        "valid_tokens": torch.tensor([valid], dtype=torch.int32),
        "routing_map": routing,
        **changes,
    }
    return megatron.fused_moe(hidden, probs, experts.up_proj, experts.down_proj, **arguments)


def test_fused_experts_against_loops(experts: Experts) -> None:
    hidden, routing, probs = rows(6)
    hidden = hidden[:, 0].float()
    got = fused(experts, hidden, probs, routing, 6)
    assert got.dtype == torch.float32
    for r in range(6):
        expected = torch.zeros(8)
        for k in range(2):
            local = int(routing[r, k]) - 1
            if 0 <= local < 2:
                up = torch.relu(experts.up_proj[local] @ hidden[r]).square()
                expected += probs[r, k] * (experts.down_proj[local] @ up)
        torch.testing.assert_close(got[r], expected)


def test_rows_behind_the_valid_ones_are_not_read(experts: Experts) -> None:
    hidden, routing, probs = rows(6)
    hidden = hidden[:, 0].float()
    poisoned = hidden.clone()
    poisoned[4:], out = float("nan"), torch.full((6, 8), 7.0)
    got = fused(experts, poisoned, probs, torch.full_like(routing, 1), 4, out=out)
    assert got is out
    assert torch.equal(got[:4], fused(experts, hidden, probs, torch.full_like(routing, 1), 6)[:4])
    assert (got[4:] == 0).all()


def test_activation_by_megatrons_enum(experts: Experts) -> None:
    hidden, routing, probs = rows(3)
    hidden = hidden[:, 0].float()
    kind = SimpleNamespace(value="squared_relu")
    assert torch.equal(fused(experts, hidden, probs, routing, 3, activation_type=kind), fused(experts, hidden, probs, routing, 3))
    with pytest.raises(ValueError, match="activation_type"):
        fused(experts, hidden, probs, routing, 3, activation_type="tanh")


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"num_local_experts": 3}, ShapeError, "num_local_experts, 3"),
        ({"routing_map": torch.zeros(2, 2, dtype=torch.int64)}, ShapeError, "a row for each hidden row"),
        ({"out": torch.zeros(2, 8)}, ShapeError, "out is"),
        ({"valid_tokens": torch.tensor([3])}, DtypeError, r"one torch\.int32, got \[1\] of torch\.int64"),
        ({"valid_tokens": torch.zeros(1, dtype=torch.int32, device="meta")}, DeviceError, "valid_tokens is on meta"),
    ],
    ids=["experts", "routing", "out", "count-dtype", "count-device"],
)
def test_fused_experts_check_their_operands(experts: Experts, changes: dict, error: type, text: str) -> None:
    hidden, routing, probs = rows(3)
    with pytest.raises(error, match=text):
        fused(experts, hidden[:, 0].float(), probs, routing, 3, **changes)
