"""Combine of float8 terms between GPUs, and between virtual ranks on one: the bits of the reference, eager and in graphs."""

import dataclasses

import pytest
import torch

import tokenferry as tf
from cases import BULK_ROWS, ON_GPUS, Case, run_case
from formats import FLOAT8, plain
from rank_pool import RankPools
from tokenferry.dispatched import QuantizedRows
from tokenferry.testing import run_ranks
from tokenferry.testing.numeric import first_difference
from tokenferry.testing.ranks import run_virtual

from .test_formats import VIRTUAL, many

pytestmark = pytest.mark.gpu


def steps_of(world_size: int) -> tuple[object, ...]:
    """In slots, in bulk, and between the two; terms that are handed over, and terms that lie in `combine_input()`."""
    empty = (0,) * (world_size - 1)
    few = tuple(range(1, world_size + 1))
    return (
        plain(few, layers=3),
        plain((BULK_ROWS, *empty), layers=2),
        plain((*empty, BULK_ROWS), quantized_terms=True, halves=True),
        plain((0,) * world_size, layers=2),
        plain((128,) * world_size, quantized_terms=True, layers=2, own_buffer=True),
        plain((2, *empty), layers=3, partial_dtype=torch.float32),
        plain((BULK_ROWS,) * world_size, supplied=(300,) * world_size, quantized_terms=True, own_buffer=True, layers=2),
        plain((BULK_ROWS,) * world_size, partial_dtype=torch.float32, halves=True),
        plain((40,) * world_size, supplied=(3,) * world_size, quantized_terms=True, spare=0, into_out=True),
    )


def cases_of(world_size: int) -> list[Case]:
    common = {"transport": "p2p", "capacity": BULK_ROWS, "steps": steps_of(world_size), "topk": 8, "combine_dtype": FLOAT8}
    return [
        Case(hidden_size=7168, dispatch_format="fp8_block128", **common),
        Case(hidden_size=272, dtype=torch.float32, **common),
    ]


@ON_GPUS
def test_float8_terms_give_the_bits_of_the_reference(world_size: int) -> None:
    cases = cases_of(world_size)
    expected = [sum(step.layers for step in case.steps) for case in cases]
    assert run_ranks(many, world_size, cases, backend="nccl", timeout_s=300) == [expected] * world_size


def over(group: tf.EPGroup, transport: str) -> int:
    steps = (plain((3,) * group.size), plain((0, *(5,) * (group.size - 1)), quantized_terms=True, halves=True, into_out=True))
    return run_case(group, Case(hidden_size=272, combine_dtype=FLOAT8, transport=transport, steps=steps))


@pytest.mark.gpu(count=2)
def test_nccl_carries_values_and_scales_in_one_message() -> None:
    assert run_ranks(over, 2, "collective", backend="nccl", timeout_s=120) == [2, 2]


def virtual(group: tf.EPGroup, world_size: int, case: Case) -> list[int]:
    """One rank compiles the kernels first: the ranks' threads would all compile each of them at the same time."""
    run_case(group, dataclasses.replace(case, steps=(plain((1,)),)))
    return run_virtual(run_case, world_size, case, device=group.device)


@pytest.mark.gpu(count=1)
def test_eight_virtual_ranks_give_the_bits_of_the_reference(on_ranks: RankPools) -> None:
    steps = (
        plain(tuple(range(8))),
        plain((0, 0, 3, BULK_ROWS, 0, 1, 2, 0), own_buffer=True, quantized_terms=True),
        plain((5,) * 8, quantized_terms=True),
    )
    case = Case(hidden_size=272, combine_dtype=FLOAT8, transport="p2p", capacity=BULK_ROWS, steps=steps)
    assert on_ranks(virtual, 1, 8, case, backend="nccl", timeout_s=150, env=VIRTUAL) == [[len(steps)] * 8]


def in_graphs(group: tf.EPGroup) -> list[str]:
    """One graph, replayed at other counts of the other rank and with other terms in `combine_input()`."""
    config = tf.MoEConfig(hidden_size=2048, num_experts=8, topk=4)
    found, device, rows = [], group.device, 6
    with tf.Workspace(config, group, max_tokens_per_rank=BULK_ROWS, transport="p2p", combine_dtype=FLOAT8, timeout_s=20) as ws:
        layer = ws.dispatcher()
        hidden = torch.zeros(rows, 2048, dtype=torch.bfloat16, device=device)
        ids, weights = torch.zeros(rows, 4, dtype=torch.int32, device=device), torch.ones(rows, 4, device=device)
        given = torch.zeros(2 * rows, 2048, dtype=torch.uint8, device=device), torch.ones(2 * rows, 16, device=device)

        def forward(count: int) -> torch.Tensor:
            ws.begin_step(count)
            got = layer.dispatch(hidden[:count], ids[:count], weights[:count])
            terms = layer.combine_input()
            terms.values[: 2 * rows].view(torch.uint8).copy_(given[0])
            terms.scales[: 2 * rows].copy_(given[1])
            return layer.combine(terms, got)

        with ws.solo():
            forward(rows)
        graph = torch.cuda.CUDAGraph()
        with ws.capturing(), torch.cuda.graph(graph):
            captured = forward(rows)
        for replay in range(6):
            torch.manual_seed(replay)
            every = [tf.reference.quantize(torch.randn(2 * rows, 2048, device=device)) for _ in range(group.size)]
            given[0].copy_(every[group.rank].values.view(torch.uint8))
            given[1].copy_(every[group.rank].scales)
            if group.rank == 0 or replay % 2 == 0:
                graph.replay()
                out = captured
            else:
                out = forward(replay)
            torch.cuda.synchronize()
            counts = [rows, rows if replay % 2 == 0 else replay]
            terms = [QuantizedRows(each.values[: sum(counts)], each.scales[: sum(counts)]) for each in every]
            wanted = tf.reference.combine(terms, counts, FLOAT8, torch.bfloat16)[group.rank]
            found.append(first_difference(out, wanted))
        ws.check()
    return [difference for difference in found if difference]


@pytest.mark.gpu(count=2)
def test_a_graph_serves_every_count_of_the_other_rank() -> None:
    assert run_ranks(in_graphs, 2, backend="nccl", timeout_s=120) == [[], []]
