"""The layer on real GPUs against the float64 oracle: every transport, overlap and shape, eager; NaN in every row beyond V."""

import dataclasses

import pytest
import torch

import tokenferry as tf
from graph_work import TOLERANCE, Forward, Setup, memory, open_workspace
from rank_pool import RankPools
from tokenferry.testing import same_bits
from tokenferry.testing.ranks import run_virtual

two_gpus = pytest.mark.gpu(count=2)
one_gpu = pytest.mark.gpu(count=1)
BF16 = torch.bfloat16

SHAPES = [
    Setup(dtype=BF16),
    Setup(dtype=BF16, shared=True, overlap="between"),
    Setup(dtype=BF16, shared=True, latent=True, overlap="stream"),
    Setup(dtype=torch.float32, shared=True, layers=2, overlap="stream"),
    Setup(dtype=torch.float16, shared=True),
]
TOLERANCES = TOLERANCE | {torch.float16: 5e-3}
COUNTS = [(5, 8), (0, 7), (300, 1), (0, 0), (64, 64), (1, 0), (320, 320)]


def poison(ws: tf.Workspace, forward: Forward) -> None:
    """NaN in every gathered row and every partial row of the workspace's own buffers, as an earlier step may leave them. A step
    with the peers: under `solo` the partial rows lie elsewhere."""
    count, device = ws.max_tokens_per_rank, ws.device
    nan = torch.full((count, ws.config.hidden_size), torch.nan, dtype=ws.config.dtype, device=device)
    ids = torch.zeros(count, ws.config.topk, dtype=torch.int32, device=device)
    dispatcher = forward.layers[0].dispatcher
    ws.begin_step(count)
    got = dispatcher.dispatch(nan, ids, torch.full(ids.shape, torch.nan, device=device))
    got.hidden.fill_(torch.nan)
    got.topk_weights.fill_(torch.nan)
    output = dispatcher.combine(dispatcher.combine_input().fill_(torch.nan), got)
    assert bool(output.isnan().all())


def all_shapes(group: tf.EPGroup, transport: str) -> None:
    for shape in SHAPES:
        setup = dataclasses.replace(shape, transport=transport)
        with open_workspace(group, setup) as ws:
            forward = Forward(setup, ws)
            poison(ws, forward)
            for number, tokens in enumerate(COUNTS):
                count = tokens[group.rank]
                chosen = forward.rows(group.rank, number, count)
                ws.begin_step(count)
                output = forward(forward.pool[chosen.to(ws.device)])
                torch.cuda.current_stream().synchronize()
                ws.check()
                error = forward.error(output, chosen)
                assert error < TOLERANCES[setup.dtype], f"{setup}, {tokens}: {error}"


@two_gpus
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_two_gpus_together_equal_the_plain_layer(on_ranks: RankPools, transport: str) -> None:
    on_ranks(all_shapes, 2, transport, backend="nccl", timeout_s=240)


def same_every_time(group: tf.EPGroup, transport: str) -> tuple[bool, bool]:
    """The same step 200 times: the same bits, and no memory more."""
    setup = Setup(transport=transport, dtype=BF16, shared=True, latent=True, overlap="stream")
    with open_workspace(group, setup) as ws:
        forward = Forward(setup, ws)
        rows = forward.pool[: 40 + 100 * group.rank]
        same = True
        for number in range(200):
            ws.begin_step(len(rows))
            output = forward(rows)
            torch.cuda.synchronize()
            if number == 0:
                first = output.clone()
            if number == 1:
                before = memory(ws.device)
            same &= same_bits(output, first)
        ws.check()
        return same, memory(ws.device) - before < 1 << 20


@two_gpus
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_the_same_step_gives_the_same_bits_in_constant_memory(on_ranks: RankPools, transport: str) -> None:
    assert on_ranks(same_every_time, 2, transport, backend="nccl", timeout_s=180) == [(True, True)] * 2


def virtual_rank(group: tf.EPGroup, setup: Setup) -> None:
    with open_workspace(group, setup) as ws:
        forward = Forward(setup, ws)
        with ws.solo():  # loads what the layer launches at any of these sizes, before any rank waits
            for count in sorted({count for tokens in COUNTS for count in tokens}):
                ws.begin_step(count)
                forward(forward.pool[:count])
        torch.cuda.current_stream().synchronize()
        group.channel.barrier("loaded", 60.0)
        for number, tokens in enumerate(COUNTS):
            chosen = forward.rows(group.rank, number, tokens[group.rank])
            rows = forward.pool[chosen.to(ws.device)]
            torch.cuda.current_stream().synchronize()
            group.channel.barrier(f"step/{number}", 60.0)
            ws.begin_step(len(rows))
            output = forward(rows)
            torch.cuda.current_stream().synchronize()
            ws.check()
            assert forward.error(output, chosen) < TOLERANCE[setup.dtype]
        group.channel.barrier("done", 60.0)


def virtual(group: tf.EPGroup, world_size: int, setup: Setup) -> None:
    run_virtual(virtual_rank, world_size, setup, device=group.device)


@one_gpu
@pytest.mark.parametrize("overlap", ["off", "stream"])
def test_virtual_ranks_together_equal_the_plain_layer(on_ranks: RankPools, overlap: str) -> None:
    setup = Setup(transport="p2p", dtype=BF16, shared=True, overlap=overlap, timeout_s=10)
    env = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}  # as in test_symmetric.py
    on_ranks(virtual, 1, 2, setup, backend="nccl", timeout_s=120, env=env)
