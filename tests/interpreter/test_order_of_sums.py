"""The sum over ranks, with terms for which each other order, and each rounding that is left out, gives another number."""

from dataclasses import dataclass
from itertools import permutations

import pytest
import torch

import switch
import tokenferry as tf
from cases import BULK_ROWS, same
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

RANKS, COLUMNS = 3, 8
ORDER = torch.tensor([*permutations((2.0**24, 1.0, -(2.0**24))), (1.0, 2.0, 4.0), (0.0, 0.0, 0.0)]).T.contiguous()
"""[rank, column]. In float32 (2^24 + 1) - 2^24 is 0, but (2^24 - 2^24) + 1 is 1: some column tells any two orders apart."""
ROUNDING = torch.full((RANKS, COLUMNS), 1 + 2.0**-9)
"""Each is 1 in bfloat16, and their sum 3; with one of them left as it is the float32 sum is not."""


@dataclass(frozen=True)
class Sum:
    """Every rank brings `rows` rows, all alike; BULK_ROWS are more than a slot holds."""

    name: str
    transport: str
    terms: torch.Tensor
    combine_dtype: torch.dtype
    rows: int = 2

    def __str__(self) -> str:
        return f"{self.transport}-{self.name}-T{self.rows}"


CASES = (
    *(Sum("order", transport, ORDER, torch.float32) for transport in ("collective", "p2p", "nvls")),
    Sum("order", "p2p", ORDER, torch.float32, rows=BULK_ROWS),
    *(Sum("rounding", transport, ROUNDING, torch.bfloat16) for transport in ("collective", "p2p", "nvls")),
    Sum("rounding", "p2p", ROUNDING, torch.bfloat16, rows=BULK_ROWS),
)


def combined(group: tf.EPGroup, case: Sum) -> list[list[float]]:
    """The different rows of a rank's result: one."""
    config = tf.MoEConfig(hidden_size=COLUMNS, num_experts=RANKS, topk=1, dtype=torch.float32)
    settings = {"transport": switch.transport(case.transport), "combine_dtype": case.combine_dtype, "timeout_s": 20}
    capacity = 1025 if case.rows >= BULK_ROWS else 8
    with tf.Workspace(config, group, max_tokens_per_rank=capacity, **settings) as ws:
        layer, rows = ws.dispatcher(), case.rows
        ws.begin_step(rows)
        got = layer.dispatch(torch.zeros(rows, COLUMNS), torch.zeros(rows, 1, dtype=torch.int32), torch.ones(rows, 1))
        return layer.combine(case.terms[group.rank].repeat(len(got.hidden), 1), got).unique(dim=0).tolist()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_terms_are_rounded_and_summed_in_rank_order(case: Sum) -> None:
    rounded = case.terms.to(case.combine_dtype).float()
    expected = (rounded[0] + rounded[1]) + rounded[2]
    for rows in run_ranks(combined, RANKS, case, env={"TRITON_INTERPRET": "1"}):
        same("combined", torch.tensor(rows), expected[None])


def test_every_other_order_would_show() -> None:
    sums = [[((ORDER[a] + ORDER[b]) + ORDER[c]).tolist(), {a, b}] for a, b, c in permutations(range(RANKS))]
    assert all((first == second) == (one == other) for first, one in sums for second, other in sums)
