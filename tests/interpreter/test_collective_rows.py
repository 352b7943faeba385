"""The collective transport's two kernels, interpreted: their worked examples, and the same bits as PyTorch's operators give."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.kernels import own_routing, term_sum
from tokenferry.testing.numeric import first_difference
from tokenferry.transports.collective.rows import KernelRowWork, RowWork

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
HOSTILE = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 3.0])
"""Without subnormals: the interpreter makes a bfloat16 one zero. GPU tests have them."""


def routing_example(group: tf.EPGroup) -> list[Any]:
    idx, weights = torch.tensor([[3, 2**32 + 3], [1, -1], [0, 2]]), torch.full((3, 2), 0.5)
    out, out_weights = torch.full((3, 2), 7), torch.zeros(3, 2)
    own_routing.own_routing_kernel[(2,)](idx, weights, idx, out, out_weights, 3, 2, 0, K=2, BLOCK=4, PDL=0)
    return [out.tolist(), out_weights.unique().tolist()]


def test_own_routing_kernel(on_ranks: RankPools) -> None:
    assert on_ranks(routing_example, 1, env=INTERPRETER) == [[[[3, -1], [1, -1], [-1, -1]], [0.5]]]


def sum_example(group: tf.EPGroup) -> list[float]:
    found = []
    for rank in range(3):
        terms = torch.tensor([2.0**24, 1.0, -(2.0**24)]).view(3, 1, 1)
        own, out = terms[rank].clone(), torch.full((1, 1), 7.0)
        terms[rank] = torch.nan
        term_sum.term_sum_kernel[(1,)](terms, own, out, rank, 1, 1, SIZE=3, H=1, BLOCK=2, PDL=0)
        found.append(out.item())
    return found


def test_term_sum_kernel(on_ranks: RankPools) -> None:
    assert on_ranks(sum_example, 1, env=INTERPRETER) == [[0.0, 0.0, 0.0]]


@dataclass(frozen=True)
class Routing:
    idx: torch.dtype = torch.int64
    out: torch.dtype = torch.int64
    weights: torch.dtype = FLOAT32
    rows: int = 5
    topk: int = 3
    real: int = 5
    real_on_device: bool = False


ROUTINGS = {
    "int64": Routing(),
    "int64-to-int32": Routing(out=torch.int32),
    "int32-to-int64-padding": Routing(idx=torch.int32, real=2),
    "fp16-weights": Routing(weights=FLOAT16),
    "bf16-weights-count-on-device": Routing(weights=BFLOAT16, real=3, real_on_device=True),
    "count-on-device-beyond-the-rows": Routing(real=9, real_on_device=True),
    "none-real": Routing(real=-4, real_on_device=True),
    "no-rows": Routing(rows=0, real=0),
    "several-blocks": Routing(rows=300, topk=8, real=257),
}


def settings_of(group: tf.EPGroup, **changes: Any) -> Any:
    """What the row work reads of `TransportSettings`; ranks are played by one process."""
    config = tf.MoEConfig(hidden_size=changes.pop("hidden_size", 8), num_experts=8, topk=changes.pop("topk", 2))
    plays = SimpleNamespace(rank=changes.pop("rank", 0), size=changes.pop("size", 1), device=group.device)
    return SimpleNamespace(
        config=config, group=plays, name="a test", **{"index_dtype": torch.int64, "combine_dtype": FLOAT32, **changes}
    )


def routed(group: tf.EPGroup, case: Routing) -> str:
    generator = torch.Generator().manual_seed(1)
    idx = torch.randint(-2, 8, (case.rows, case.topk), generator=generator).to(case.idx)
    if case.idx == torch.int64 and case.rows:
        idx[0, 0], idx[-1, -1] = 2**31, -(2**33)
    weights = torch.rand(case.rows, case.topk, generator=generator).to(case.weights)
    weights.view(-1)[: min(7, weights.numel())] = HOSTILE[: min(7, weights.numel())].to(case.weights)
    real = torch.tensor([case.real], dtype=torch.int32) if case.real_on_device else case.real
    settings, written = settings_of(group, index_dtype=case.out, topk=case.topk), []
    for work in (RowWork(settings, BFLOAT16), KernelRowWork(settings, BFLOAT16)):
        out = torch.full(idx.shape, 77, dtype=case.out), torch.full(idx.shape, 77.0)
        work.write_routing(*out, idx, weights, real)
        written.append(out)
    return " ".join(first_difference(kernels, operators) for operators, kernels in zip(*written, strict=True)).strip()


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_is_written_as_by_operators(on_ranks: RankPools, name: str) -> None:
    assert on_ranks(routed, 1, ROUTINGS[name], env=INTERPRETER) == [""]


@dataclass(frozen=True)
class Sum:
    """The interpreter cuts float32 off on its way to bfloat16, so that bfloat16 is a dtype of terms only."""

    size: int = 2
    terms: torch.dtype = FLOAT32
    result: torch.dtype = FLOAT32
    hidden_size: int = 8
    rows: int = 5
    wanted: int = 5
    aligned: bool = True


SUMS = {
    "alone": Sum(size=1),
    "EP2": Sum(),
    "EP3-bf16-terms": Sum(size=3, terms=BFLOAT16),
    "EP4-fp16-terms-and-result": Sum(size=4, terms=FLOAT16, result=FLOAT16),
    "EP3-odd-rows-begin-anywhere": Sum(size=3, hidden_size=7, aligned=False),
    "EP2-fewer-wanted": Sum(wanted=2),
    "EP2-none-wanted": Sum(wanted=0),
    "EP2-several-blocks": Sum(hidden_size=700, rows=4, wanted=4),
}


def summed(group: tf.EPGroup, case: Sum) -> list[str]:
    generator = torch.Generator().manual_seed(2)
    shape, found = (case.size, case.rows, case.hidden_size), []
    for rank in range(case.size):
        settings = settings_of(group, rank=rank, size=case.size, combine_dtype=case.terms, hidden_size=case.hidden_size)
        terms = torch.randn(shape, generator=generator).to(case.terms)
        terms.view(case.size, -1)[:, :7] = HOSTILE.to(case.terms)
        shift = 0 if case.aligned else 1
        memory = torch.empty(terms[rank].numel() + shift, dtype=case.terms)
        own = memory[shift:].view(shape[1:]).copy_(terms[rank])
        terms[rank] = 99.0  # is not read
        by = [work(settings, case.result).sum_terms(terms, own, case.wanted) for work in (RowWork, KernelRowWork)]
        found.append(first_difference(by[1], by[0]))
    return found


@pytest.mark.parametrize("name", SUMS)
def test_terms_are_summed_as_by_operators(on_ranks: RankPools, name: str) -> None:
    assert on_ranks(summed, 1, SUMS[name], env=INTERPRETER) == [[""] * SUMS[name].size]
