"""The experts' table of few and of many ids, at numbers of rows around the ends of blocks."""

import pytest
import torch

import tokenferry as tf
from tokenferry.kernels.expert_table import NO_LOADS, expert_table_kernel
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

FEW, MIDDLE, MANY = 32, 64, 128
K, FIRST, L = 2, 3, 4
NUM_ROWS = (0, 1, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129)
"""Of 16 rows the block for few ids is full, of 32 the one for not so few, of 64 and 128 one and two blocks for many."""


def expected_table(idx: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
    by_expert = [(idx.flatten() == FIRST + expert).nonzero().flatten().tolist() for expert in range(L)]
    counts = [len(pairs) for pairs in by_expert]
    return counts, [sum(counts[:expert]) for expert in range(L)], [pair for pairs in by_expert for pair in pairs]


def tables(group: tf.EPGroup) -> dict[tuple[int, torch.dtype], bool]:
    held = {}
    for dtype in (torch.int32, torch.int64):
        for num_rows in NUM_ROWS:
            generator = torch.Generator().manual_seed(num_rows)
            idx = torch.randint(-1, 10, (140, K), generator=generator).to(dtype)  # rows beyond V name experts too
            counts, offsets = torch.full((L,), -7, dtype=torch.int32), torch.full((L,), -7, dtype=torch.int32)
            pairs = torch.full((280,), -7, dtype=torch.int32)
            valid = torch.tensor([num_rows], dtype=torch.int32)
            expert_table_kernel[(L,)](
                idx, valid, counts, offsets, pairs, 0, 140, FIRST, **NO_LOADS, K=K, FEW=FEW, MIDDLE=MIDDLE, MANY=MANY, PDL=0
            )
            wanted = expected_table(idx[:num_rows])
            written = sum(wanted[0])
            found = (counts.tolist(), offsets.tolist(), pairs[:written].tolist())
            held[num_rows, dtype] = found == wanted and pairs[written:].eq(-7).all().item()
    return held


@pytest.fixture(scope="module")
def held() -> dict[tuple[int, torch.dtype], bool]:
    return run_ranks(tables, 1, env={"TRITON_INTERPRET": "1"})[0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_pairs_are_sorted_by_expert_and_row(held, num_rows, dtype) -> None:
    assert held[num_rows, dtype]
