"""Equal counts through calls of the library, on gloo: an all-gather and a reduce-scatter that do what NCCL's do.

NCCL's own have GPU tests. Here the reduce-scatter adds the ranks' terms backwards and exactly, and rounds once: another sum,
unless there is one order only, and the promised dtypes have digits enough.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

import tokenferry as tf
from cases import Case, StepCase, run_case
from rank_pool import RankPools
from tokenferry.transports.collective import reducing
from tokenferry.transports.collective import transport as collective
from tokenferry.transports.collective.gloo import GlooCommunicator
from tokenferry.transports.collective.messages import Header, Pending

pytestmark = pytest.mark.ranks

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
HEADER = Header(operation=1, step=0, layer=0, generation=0)


class WithLibraryCalls(GlooCommunicator):
    """`gathered` and `reduced` count the calls."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.gathered = self.reduced = 0

    def all_gather(self, gathered: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], *, overlaps: bool) -> Pending:
        self.gathered += 1
        parts = [out.chunk(self.size) for out in gathered]
        for part, own in zip(parts, rows, strict=True):
            if own.data_ptr() != part[self.rank].data_ptr():
                part[self.rank].copy_(own)
        return self.start(HEADER, [tuple(rows)] * self.size, list(zip(*parts, strict=True)))

    def reduce_scatter(self, out: torch.Tensor, rows: torch.Tensor, *, overlaps: bool) -> Pending:
        self.reduced += 1
        parts = rows.chunk(self.size)
        terms = [parts[self.rank].clone() if rank == self.rank else torch.empty_like(out) for rank in range(self.size)]
        exchange = self.start(HEADER, [(part,) for part in parts], [(term,) for term in terms])
        return Reduced(exchange, terms, out)


class Reduced:
    def __init__(self, exchange: Pending, terms: list[torch.Tensor], out: torch.Tensor) -> None:
        self.exchange, self.terms, self.out = exchange, terms, out

    def headers(self) -> None:
        return

    def finish(self) -> None:
        self.exchange.finish()
        total = self.terms[-1].double()
        for term in self.terms[-2::-1]:
            total = total + term.double()
        self.out.copy_(total.to(self.out.dtype))


@contextmanager
def library_calls() -> Iterator[list[WithLibraryCalls]]:
    opened: list[WithLibraryCalls] = []

    def open_communicator(*args: object) -> WithLibraryCalls:
        opened.append(WithLibraryCalls(*args))
        return opened[-1]

    with mock.patch.object(collective, "GlooCommunicator", open_communicator):
        yield opened


def calls_of(group: tf.EPGroup, case: Case) -> tuple[int, int]:
    """Compares a case with the reference; how many all-gathers and reduce-scatters that took."""
    with library_calls() as opened:
        run_case(group, case)
    return opened[0].gathered, opened[0].reduced


STEPS = (StepCase((4, 4), layers=2), StepCase((0, 0)), StepCase((8, 8), halves=True, own_buffer=True))
EQUAL = {
    "bf16": (Case(counts="equal", steps=STEPS), (3, 3)),
    "normal-bf16": (Case(hidden_size=64, steps=(StepCase((8, 8), payload="normal", layers=3),)), (3, 3)),
    "normal-fp16": (Case(hidden_size=64, dtype=FLOAT16, steps=(StepCase((8, 8), payload="normal", layers=3),)), (3, 3)),
    "fp16-K3-odd": (Case(topk=3, hidden_size=10, dtype=FLOAT16, counts="equal", steps=STEPS), (3, 3)),
    "fp32": (Case(dtype=FLOAT32, steps=(StepCase((3, 3)),)), (1, 1)),
    "fp32-wire": (Case(combine_dtype=FLOAT32, steps=(StepCase((3, 3), partial_dtype=FLOAT32),)), (1, 1)),
    "fp32-partials-rounded-for-the-wire": (Case(steps=(StepCase((3, 3), partial_dtype=FLOAT32),)), (1, 1)),
    "a-sum-that-the-wire-would-round": (Case(dtype=FLOAT32, combine_dtype=BFLOAT16, steps=(StepCase((3, 3)),)), (1, 0)),
    "another-16-bits-on-the-wire": (Case(dtype=BFLOAT16, combine_dtype=FLOAT16, steps=(StepCase((3, 3)),)), (1, 0)),
    "int32-ids-of-padding": (Case(steps=(StepCase((4, 4), real=(2, 0), index_dtype=torch.int32),)), (1, 1)),
    "int32-ids-as-they-are": (Case(steps=(StepCase((4, 4), index_dtype=torch.int32),)), (1, 1)),
    "padding-known-to-the-device": (Case(steps=(StepCase((4, 4), real=(2, 3), real_as_tensor=True),)), (1, 1)),
    "bf16-weights": (Case(steps=(StepCase((4, 4), weight_dtype=BFLOAT16),)), (1, 1)),
    "fewer-rows-than-announced": (Case(steps=(StepCase((6, 6), supplied=(2, 0), layers=2),)), (2, 2)),
    "uneven-between-equal": (Case(steps=(StepCase((2, 2)), StepCase((2, 3)), StepCase((5, 5)))), (2, 2)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_keep_the_bits_of_the_reference(on_ranks: RankPools, name: str) -> None:
    case, calls = EQUAL[name]
    assert on_ranks(calls_of, 2, case) == [calls] * 2


@pytest.mark.parametrize(("world_size", "reduced"), [(1, 0), (3, 0)], ids=["EP1", "EP3"])
def test_other_groups_sum_in_rank_order(on_ranks: RankPools, world_size: int, reduced: int) -> None:
    case = Case(counts="equal", steps=(StepCase((4,) * world_size), StepCase((1,) * world_size)))
    assert on_ranks(calls_of, world_size, case) == [(2, reduced)] * world_size


def few_bytes_reduced(group: tf.EPGroup) -> tuple[int, int]:
    case = Case(hidden_size=16, dtype=FLOAT32, steps=(StepCase((4, 4)), StepCase((5, 5)), StepCase((1, 1))))
    with mock.patch.object(reducing, "REDUCED_BYTES_OF_TWO", 4 * 16 * 4):
        return calls_of(group, case)


def test_many_bytes_are_exchanged_and_summed_here(on_ranks: RankPools) -> None:
    assert on_ranks(few_bytes_reduced, 2) == [(3, 2)] * 2


def any_order(group: tf.EPGroup, counts: tuple[int, ...]) -> tuple[int, list[float]]:
    """Column 0: in rank order 2^24 + 1 - 2^24 is 0 in float32, backwards 1."""
    config = tf.MoEConfig(hidden_size=2, num_experts=group.size, topk=1, dtype=torch.float32)
    settings = {"max_tokens_per_rank": 4, "transport": "collective", "combine_order": "any"}
    with library_calls() as opened, tf.Workspace(config, group, **settings) as ws:
        ws.begin_step(rows := counts[group.rank])
        layer = ws.dispatcher()
        layer.dispatch(torch.zeros(rows, 2), torch.zeros(rows, 1, dtype=torch.int32), torch.ones(rows, 1))
        partial = torch.tensor([(2.0**24, 1.0, -(2.0**24))[group.rank], 1.0]).repeat(sum(counts), 1)
        sums = layer.combine(partial).unique(dim=0).flatten().tolist()
        return opened[0].reduced, sums


@pytest.mark.parametrize(
    ("counts", "expected"), [((2, 2, 2), (1, [1.0, 3.0])), ((1, 2, 1), (0, [0.0, 3.0]))], ids=["equal", "uneven"]
)
def test_any_order_is_the_librarys_where_counts_are_equal(
    on_ranks: RankPools, counts: tuple[int, ...], expected: tuple[int, list[float]]
) -> None:
    assert on_ranks(any_order, 3, counts) == [expected] * 3
