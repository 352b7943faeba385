"""The graph runner beside the symmetric transport's own kernels: each rank chooses its bucket alone. No graphs here."""

import pytest
import torch

from graph_work import Setup, run_steps
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter


def test_each_rank_chooses_alone_and_sums_are_right() -> None:
    setup = Setup(transport="p2p", capacity=5, buckets=(2, 4))
    steps = [(1, 4), (0, 5), (3, 0), (5, 2)]  # a bucket beside another, eager, idle
    run_ranks(run_steps, 2, setup, steps, timeout_s=150, env={"TRITON_INTERPRET": "1"})


def test_layers_whose_experts_return_no_more_rows_than_there_are_tokens() -> None:
    setup = Setup(transport="p2p", capacity=5, buckets=(2, 4), partial_rows=7)
    run_ranks(run_steps, 2, setup, [(1, 4), (5, 2), (0, 3)], timeout_s=150, env={"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("float8", [False, True], ids=["plain-weights", "float8-weights"])
def test_layers_of_quantized_rows(float8: bool) -> None:
    setup = Setup(
        transport="p2p", dtype=torch.bfloat16, capacity=5, buckets=(2, 4), dispatch_format="fp8_block128", float8=float8,
        draft="rows",
    )  # fmt: skip
    run_ranks(run_steps, 2, setup, [(1, 4), (0, 5), (5, 2)], timeout_s=150, env={"TRITON_INTERPRET": "1"})


def test_layers_whose_terms_are_float8() -> None:
    setup = Setup(
        transport="p2p", dtype=torch.bfloat16, capacity=5, buckets=(2, 4), dispatch_format="fp8_block128", float8=True,
        float8_terms=True,
    )  # fmt: skip
    run_ranks(run_steps, 2, setup, [(1, 4), (0, 5), (5, 2)], timeout_s=150, env={"TRITON_INTERPRET": "1"})
