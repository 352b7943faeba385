"""Rows of other formats between GPUs, and between virtual ranks on one: the bits of the reference, eager and in graphs."""

import dataclasses

import pytest
import torch

import tokenferry as tf
from cases import BULK_ROWS, ON_GPUS, Case, run_case
from formats import POWERS, difficult_rows_on_their_way, plain
from rank_pool import RankPools
from tokenferry.dispatched import RowFormat
from tokenferry.testing import run_ranks
from tokenferry.testing.numeric import first_difference
from tokenferry.testing.ranks import run_virtual

pytestmark = pytest.mark.gpu

VIRTUAL = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""Loading a kernel waits for the device, so nothing may be loaded while a rank waits; and each rank needs a queue of its own."""


def many(group: tf.EPGroup, cases: list[Case]) -> list[int]:
    return [run_case(group, case) for case in cases]


def steps_of(world_size: int) -> tuple[object, ...]:
    """In slots, in bulk, and between the two. Few shapes: each is compiled anew on a machine without a cache."""
    empty = (0,) * (world_size - 1)
    few = tuple(range(1, world_size + 1))
    return (
        plain(few, layers=3),
        plain((BULK_ROWS, *empty), layers=2),
        plain((*empty, BULK_ROWS), quantized=True, halves=True),
        plain((0,) * world_size, layers=2),
        plain((128,) * world_size, quantized=True, layers=2, own_buffer=True),
        plain((2, *empty), layers=3),
        plain((BULK_ROWS,) * world_size, supplied=(300,) * world_size),
        plain((40,) * world_size, supplied=(3,) * world_size, quantized=True, real=(2,) * world_size, real_as_tensor=True),
    )


def cases_of(world_size: int) -> list[Case]:
    common = {"transport": "p2p", "capacity": BULK_ROWS, "steps": steps_of(world_size), "topk": 8}
    return [
        Case(hidden_size=7168, dispatch_format="fp8_block128", **common),
        Case(hidden_size=272, dispatch_format=POWERS, dtype=torch.float32, **common),
        Case(hidden_size=2048, dispatch_format="bytes", **common),
    ]


@ON_GPUS
def test_each_format_gives_the_bits_of_the_reference(world_size: int) -> None:
    cases = cases_of(world_size)
    expected = [sum(step.layers for step in case.steps) for case in cases]
    assert run_ranks(many, world_size, cases, backend="nccl", timeout_s=300) == [expected] * world_size


def virtual(group: tf.EPGroup, world_size: int, case: Case) -> list[int]:
    """One rank compiles the kernels first: the ranks' threads would all compile each of them at the same time."""
    run_case(group, dataclasses.replace(case, steps=(plain((1,)),)))
    return run_virtual(run_case, world_size, case, device=group.device)


@pytest.mark.gpu(count=1)
@pytest.mark.parametrize("dispatch_format", ["fp8_block128", "bytes"])
def test_eight_virtual_ranks_give_the_bits_of_the_reference(on_ranks: RankPools, dispatch_format: str) -> None:
    steps = (plain(tuple(range(8))), plain((0, 0, 3, BULK_ROWS, 0, 1, 2, 0)), plain((5,) * 8, quantized=True))
    case = Case(hidden_size=272, dispatch_format=dispatch_format, transport="p2p", capacity=BULK_ROWS, steps=steps)
    assert on_ranks(virtual, 1, 8, case, backend="nccl", timeout_s=150, env=VIRTUAL) == [[len(steps)] * 8]


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize(
    ("dtype", "dispatch_format"),
    [(torch.bfloat16, "fp8_block128"), (torch.float16, "fp8_block128"), (torch.float32, POWERS)],
    ids=["bfloat16", "float16", "float32-powers-of-two"],
)
def test_the_sending_kernel_quantizes_difficult_rows(dtype: torch.dtype, dispatch_format: str | RowFormat) -> None:
    """Ties, zeros, tiny and huge blocks, NaNs and infinities: PTX converts them by other instructions than the interpreter."""
    assert run_ranks(difficult_rows_on_their_way, 2, dtype, dispatch_format, backend="nccl", timeout_s=120) == [[], []]


@pytest.mark.gpu(count=1)
@pytest.mark.parametrize("transport", ["local", "collective"])
def test_one_rank_gives_the_bits_of_the_reference(transport: str) -> None:
    cases = [
        dataclasses.replace(case, transport=transport, capacity=256, steps=(plain((128,)), plain((5,), quantized=True)))
        for case in cases_of(1)
    ]
    assert run_ranks(many, 1, cases, backend="nccl", timeout_s=300) == [[2] * len(cases)]


def in_graphs(group: tf.EPGroup, dispatch_format: str) -> list[str]:
    """One graph of a dispatch and its combine, replayed at other counts of the other rank and with other rows."""
    config = tf.MoEConfig(hidden_size=2048, num_experts=8, topk=4)
    found, device = [], group.device
    with tf.Workspace(
        config, group, max_tokens_per_rank=BULK_ROWS, transport="p2p", dispatch_format=dispatch_format, timeout_s=20
    ) as ws:
        layer, rows = ws.dispatcher(), 6
        is_bytes = dispatch_format == "bytes"
        hidden = torch.zeros(rows, ws.dispatch_format.columns(config), dtype=ws.dispatch_format.dtype(config), device=device)
        ids, weights = torch.zeros(rows, 4, dtype=torch.int32, device=device), torch.ones(rows, 4, device=device)

        def forward(count: int) -> tf.Dispatched:
            ws.begin_step(count)
            got = layer.dispatch(hidden[:count], ids[:count], weights[:count])
            layer.combine(layer.combine_input(), got)
            return got

        with ws.solo():
            forward(rows)
        graph = torch.cuda.CUDAGraph()
        with ws.capturing(), torch.cuda.graph(graph):
            got = forward(rows)
        for replay in range(6):
            torch.manual_seed(replay)
            every = [torch.randn(rows, config.hidden_size, device=device).to(config.dtype) for _ in range(group.size)]
            every = [each.view(torch.uint8) if is_bytes else each for each in every]
            hidden.copy_(every[group.rank])
            if group.rank == 0 or replay % 2 == 0:
                graph.replay()
                own = rows
            else:
                got = forward(replay)
                own = replay
            torch.cuda.synchronize()
            counts = [rows, own if group.rank == 1 else (rows if replay % 2 == 0 else replay)]
            wanted = tf.reference.dispatch(
                [each[:count] for each, count in zip(every, counts, strict=True)],
                [ids[:count] for count in counts],
                [weights[:count] for count in counts],
                dispatch_format=dispatch_format,
            ).hidden
            valid = sum(counts)
            pairs = (
                [(got.hidden, wanted)] if is_bytes else [(got.hidden.values, wanted.values), (got.hidden.scales, wanted.scales)]
            )
            found += [first_difference(left[:valid], right) for left, right in pairs]
        ws.check()
    return [difference for difference in found if difference]


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("dispatch_format", ["fp8_block128", "bytes"])
def test_a_graph_serves_every_count_of_the_other_rank(dispatch_format: str) -> None:
    assert run_ranks(in_graphs, 2, dispatch_format, backend="nccl", timeout_s=120) == [[], []]
