"""Expert numbers of 64 bits that no int32 holds: nobody's expert, on every transport, where no host looks at the values."""

from dataclasses import dataclass

import pytest
import torch

import tokenferry as tf
from tokenferry import dispatcher, reference
from tokenferry.kernels.expert_table import expert_table_kernel
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

WIDE = (2**32 + 3, -(2**32) + 1, 2**32 - 1, 2**31)
"""Cut to 32 bits these are 3, 1, -1 and the smallest int32."""


@dataclass(frozen=True)
class Ranks:
    transport: str
    size: int

    def __str__(self) -> str:
        return f"{self.transport}-EP{self.size}"


def gathered(group: tf.EPGroup, transport: str, index_dtype: torch.dtype) -> list[list[int]]:
    dispatcher._ids_out_of_range = lambda *_: None  # as on CUDA, where a look at the values would wait for the device
    config, rows = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=torch.float32), len(WIDE)
    with tf.Workspace(config, group, max_tokens_per_rank=rows, transport=transport, index_dtype=index_dtype) as ws:
        ws.begin_step(rows)
        got = ws.dispatcher().dispatch(torch.ones(rows, 8), torch.tensor(WIDE)[:, None], torch.ones(rows, 1))
        return got.topk_idx[: rows * group.size].flatten().tolist()


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


def table(group: tf.EPGroup) -> list[int]:
    del group
    counts, offsets, pairs = (torch.zeros(8, dtype=torch.int32) for _ in range(3))
    ids = torch.tensor([*WIDE, 3])[:, None]
    arguments = (ids, torch.tensor([len(ids)], dtype=torch.int32), counts, offsets, pairs, 0, len(ids), 0)
    expert_table_kernel[(4,)](*arguments, K=1, FEW=32, MANY=64, PDL=0)
    return counts[:4].tolist()


def test_experts_that_get_such_numbers_from_elsewhere_leave_them_out() -> None:
    assert run_ranks(table, 1, env={"TRITON_INTERPRET": "1"}) == [[0, 0, 0, 1]]
