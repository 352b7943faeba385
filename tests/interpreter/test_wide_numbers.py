"""Expert numbers of 64 bits that no int32 holds: nobody's expert, on every transport, where no host looks at the values."""

from dataclasses import dataclass

import pytest
import torch

import tokenferry as tf
from tokenferry import reference
from tokenferry.kernels.expert_sum import expert_sum_kernel
from tokenferry.kernels.expert_table import NO_LOADS, expert_table_kernel
from tokenferry.testing import run_ranks
from wide_work import WIDE, gathered

pytestmark = pytest.mark.interpreter


@dataclass(frozen=True)
class Ranks:
    transport: str
    size: int

    def __str__(self) -> str:
        return f"{self.transport}-EP{self.size}"


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32-out", "int64-out"])
@pytest.mark.parametrize(
    "ranks", [Ranks("local", 1), Ranks("collective", 1), Ranks("collective", 2), Ranks("p2p", 1), Ranks("p2p", 2)], ids=str
)
def test_a_number_that_no_int32_holds_arrives_as_none(ranks: Ranks, index_dtype: torch.dtype) -> None:
    wanted = [-1] * len(WIDE) * ranks.size
    found = run_ranks(gathered, ranks.size, ranks.transport, index_dtype, env={"TRITON_INTERPRET": "1"})
    assert found == [wanted] * ranks.size


def test_the_reference_says_the_same() -> None:
    rows = len(WIDE)
    got = reference.dispatch([torch.ones(rows, 8)], [torch.tensor(WIDE)[:, None]], [torch.ones(rows, 1)])
    assert got.topk_idx.flatten().tolist() == [-1] * rows


def table_and_sums(group: tf.EPGroup) -> tuple[list[int], list[float]]:
    """Rows that each expert of four gets, and each row's sum of outputs that are all 1."""
    del group
    counts, offsets, pairs = (torch.zeros(8, dtype=torch.int32) for _ in range(3))
    ids = torch.tensor([*WIDE, 3])[:, None]
    rows = len(ids)
    valid, ones, sums = torch.tensor([rows], dtype=torch.int32), torch.ones(rows, 1), torch.zeros(rows, 1)
    expert_table_kernel[(4,)](ids, valid, counts, offsets, pairs, 0, rows, 0, K=1, FEW=32, MIDDLE=64, MANY=64, PDL=0, **NO_LOADS)
    expert_sum_kernel[(2,)](
        ones, ids, ones, valid, sums, ones, 0, 0, rows, 0, ones, 0.0, L=4, K=1, H=1, BLOCK=2, NORM=False, QUANTIZES=False, PDL=0
    )
    return counts[:4].tolist(), sums.flatten().tolist()


def test_experts_that_get_such_numbers_from_elsewhere_leave_them_out() -> None:
    assert run_ranks(table_and_sums, 1, env={"TRITON_INTERPRET": "1"}) == [([0, 0, 0, 1], [0.0, 0.0, 0.0, 0.0, 1.0])]
