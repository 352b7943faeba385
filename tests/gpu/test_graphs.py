"""The graph runner with real graphs: two GPUs over peer memory and over NCCL, and virtual ranks of one GPU."""

import contextlib
import random
import warnings

import pytest
import torch

import tokenferry as tf
from graph_work import ALL_PAIRS, TOLERANCE, Forward, Setup, check_steps, memory, open_workspace, run_steps
from rank_pool import RankPools
from tokenferry.graphs import GraphRunner
from tokenferry.testing import same_bits
from tokenferry.testing.ranks import run_virtual

two_gpus = pytest.mark.gpu(count=2)
one_gpu = pytest.mark.gpu(count=1)

BF16 = torch.bfloat16
TRANSPORTS = ("p2p", "collective")


def random_steps(seed: int, count: int, world_size: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    sizes = (0, 1, 64, 65, 300)
    return [tuple(rng.choice((rng.choice(sizes), rng.randint(0, 320))) for _ in range(world_size)) for _ in range(count)]


SETUPS = [
    Setup(transport="p2p", dtype=BF16),
    Setup(transport="p2p", dtype=BF16, shared=True, latent=True, overlap="stream"),
    Setup(transport="p2p", dtype=BF16, shared=True, overlap="between"),
    Setup(transport="p2p", dtype=torch.float32, layers=2),
    Setup(transport="p2p", dtype=BF16, partial_rows=600),
    Setup(transport="p2p", dtype=BF16, draft="rows"),
    Setup(transport="p2p", dtype=BF16, draft="step"),
    Setup(transport="p2p", dtype=BF16, dispatch_format="fp8_block128", float8=True, shared=True, overlap="between"),
    Setup(transport="p2p", dtype=BF16, dispatch_format="fp8_block128", draft="rows"),
    Setup(transport="p2p", dtype=BF16, float8_terms=True, shared=True, latent=True, overlap="stream"),
    Setup(transport="p2p", dtype=BF16, dispatch_format="fp8_block128", float8=True, float8_terms=True, draft="rows"),
    Setup(transport="collective", dtype=BF16, float8_terms=True, draft="rows"),
    Setup(transport="collective", dtype=BF16, shared=True, overlap="stream"),
    Setup(transport="collective", dtype=BF16, dispatch_format="fp8_block128", float8=True, counts="equal"),
    Setup(transport="collective", dtype=BF16, counts="equal"),
    Setup(transport="collective", dtype=BF16, draft="step"),
]


def many_setups(group: tf.EPGroup, setups: list[Setup], steps: list[tuple[int, ...]]) -> None:
    """All in one process a rank: starting one takes longer than the steps."""
    for setup in setups:
        try:
            run_steps(group, setup, steps)
        except Exception as error:
            error.add_note(str(setup))
            raise


@two_gpus
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_all_16_combinations_of_eager_two_graphs_and_idle(on_ranks: RankPools, transport: str) -> None:
    setups = [setup for setup in SETUPS if setup.transport == transport]
    on_ranks(many_setups, 2, setups, ALL_PAIRS, backend="nccl", timeout_s=240)


@two_gpus
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_500_random_steps_in_constant_memory(on_ranks: RankPools, transport: str) -> None:
    setup = Setup(transport=transport, dtype=BF16, shared=True, overlap="stream")
    for used in on_ranks(run_steps, 2, setup, random_steps(7, 500, 2), backend="nccl", timeout_s=240):
        assert max(used["memory"][5:]) <= max(used["memory"][1:5]) + (1 << 20), used["memory"]
        assert used["calls"] < 500, "most steps are replays, which do not call fn"


# --- bits -----------------------------------------------------------------------------------------------------------------


def graph_and_eager(group: tf.EPGroup, transport: str, dispatch_format: str = "same") -> list[str]:
    """Names what differs: eager against graph, and the three ways of overlap, same inputs and same counts."""
    found = []
    for latent in (False, True):
        outputs = {}
        for overlap in ("off", "between", "stream"):
            settings = {"latent": latent, "dispatch_format": dispatch_format, "float8": dispatch_format != "same"}
            setup = Setup(transport=transport, dtype=BF16, shared=True, overlap=overlap, layers=2, **settings)
            with open_workspace(group, setup) as ws:
                forward = Forward(setup, ws)
                rows = forward.pool[:64]
                runner = GraphRunner(ws, forward, [64], inputs=[forward.pool])
                for repeat in range(3):
                    outputs[f"{overlap} graph {repeat}"] = runner(rows).clone()
                runner.close()
                ws.begin_step(64)
                outputs[f"{overlap} eager"] = forward(rows).clone()
                torch.cuda.synchronize()
                ws.check()
        first = outputs["off eager"]
        found += [f"latent {latent}: {name}" for name, output in outputs.items() if not same_bits(output, first)]
    return found


@two_gpus
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_graphs_and_overlaps_give_the_bits_of_the_eager_forward(on_ranks: RankPools, transport: str) -> None:
    assert on_ranks(graph_and_eager, 2, transport, backend="nccl", timeout_s=180) == [[], []]


@two_gpus
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_so_do_graphs_of_quantized_rows(on_ranks: RankPools, transport: str) -> None:
    assert on_ranks(graph_and_eager, 2, transport, "fp8_block128", backend="nccl", timeout_s=180) == [[], []]


# --- no synchronisation ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sync_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def begin_without_waiting(group: tf.EPGroup) -> int:
    setup = Setup(transport="p2p", dtype=BF16, shared=True, overlap="stream")
    with open_workspace(group, setup) as ws:
        forward = Forward(setup, ws)
        runner = GraphRunner(ws, forward, setup.buckets, inputs=[forward.pool])
        rows = forward.pool[:100]
        runner(rows)
        before = memory(ws.device)
        with sync_is_an_error():
            for _ in range(20):
                runner.begin(rows)  # only `end` waits
        output = runner.end()
        assert forward.error(output, torch.arange(100)) < TOLERANCE[BF16]
        return memory(ws.device) - before


@two_gpus
def test_begin_never_waits_for_the_device(on_ranks: RankPools) -> None:
    assert on_ranks(begin_without_waiting, 2, backend="nccl", timeout_s=120) == [0, 0]


# --- reset and failure ----------------------------------------------------------------------------------------------------


def reset_and_failures(group: tf.EPGroup, transport: str) -> None:
    setup = Setup(transport=transport, dtype=BF16)
    with open_workspace(group, setup) as ws:
        forward = Forward(setup, ws)
        for where in ("before dispatch", "after dispatch"):
            with pytest.raises(ArithmeticError, match=where):
                GraphRunner(ws, lambda rows, where=where: fails_while_captured(forward, where), [8], inputs=[forward.pool])
        runner = GraphRunner(ws, forward, setup.buckets, inputs=[forward.pool])
        check_steps(ws, runner, forward, [(5, 70), (0, 3)])
        runner.capture()
        runner(forward.pool[:3])
        ws.reset(timeout_s=60)
        with pytest.raises(tf.StateError, match="captured in generation 0"):
            runner(forward.pool[:3])
        runner.capture()
        check_steps(ws, runner, forward, [(5, 70), (0, 3), (300, 1)])


def fails_while_captured(forward: Forward, where: str) -> torch.Tensor:
    ws = forward.ws
    if not torch.cuda.is_current_stream_capturing():  # the warm-up passes
        return forward(forward.pool[: ws.step.num_tokens])
    if where == "after dispatch":
        rows = forward.pool[:8]
        forward.layers[0].dispatcher.dispatch(rows, *reversed(forward.layers[0].router(rows)))
    raise ArithmeticError(where)


@two_gpus
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_failed_capture_and_a_reset_leave_the_workspace_usable(on_ranks: RankPools, transport: str) -> None:
    on_ranks(reset_and_failures, 2, transport, backend="nccl", timeout_s=90)


# --- virtual ranks --------------------------------------------------------------------------------------------------------


def virtual_rank(group: tf.EPGroup, setup: Setup, steps: list[tuple[int, ...]]) -> None:
    with open_workspace(group, setup) as ws:
        # One at a time: parameters are drawn from the process's one generator, and capturing waits for the device.
        for turn in range(group.size):
            if turn == group.rank:
                forward = Forward(setup, ws)
                runner = GraphRunner(ws, forward, setup.buckets, inputs=[forward.pool])
                torch.cuda.current_stream().synchronize()
            group.channel.barrier(f"captured/{turn}", 60.0)
        for number, tokens in enumerate(steps):
            chosen = forward.rows(group.rank, number, tokens[group.rank]).to(ws.device)
            rows = forward.pool[chosen]
            torch.cuda.current_stream().synchronize()
            output = runner(rows)
            assert forward.error(output, chosen.cpu()) < TOLERANCE[setup.dtype]
        torch.cuda.current_stream().synchronize()
        group.channel.barrier("done", 60.0)


def virtual(group: tf.EPGroup, world_size: int, setup: Setup, steps: list[tuple[int, ...]]) -> None:
    run_virtual(virtual_rank, world_size, setup, steps, device=group.device)


VIRTUAL = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""As in test_symmetric.py."""


@one_gpu
def test_virtual_ranks_replay_their_own_graphs(on_ranks: RankPools) -> None:
    setup = Setup(transport="p2p", dtype=BF16, timeout_s=10)
    graphs_only = [tokens for tokens in ALL_PAIRS if max(tokens) <= 256]
    on_ranks(virtual, 1, 2, setup, graphs_only * 2, backend="nccl", timeout_s=120, env=VIRTUAL)


@one_gpu
@pytest.mark.parametrize("transport", ["local", "collective"])
def test_one_rank(on_ranks: RankPools, transport: str) -> None:
    steps = [(count,) for count in (0, 1, 64, 65, 256, 300, 320, 0, 7)]
    on_ranks(run_steps, 1, Setup(transport=transport, dtype=BF16, shared=True, overlap="stream"), steps, backend="nccl")
