"""Symmetric transports on GPUs: bits as the reference, eager and in graphs, on real ranks and on virtual ranks of one GPU."""

import dataclasses
import random
import time
import warnings

import pytest
import torch

import tokenferry as tf
from cases import BULK_ROWS, CASES, ON_GPUS, Case, StepCase, begin, run_case, run_layer, same
from rank_pool import RankPools
from solo_work import Solo, alone
from tokenferry.testing.data import make_inputs
from tokenferry.testing.ranks import run_virtual
from tokenferry.transports.symmetric.layout import SLOT_ROWS
from wide_work import WIDE, gathered

two_gpus = pytest.mark.gpu(count=2)
one_gpu = pytest.mark.gpu(count=1)

NAMED = (
    "EP2-T7+0-K3-odd",
    "EP2-fewer-rows-than-announced",
    "EP2-bf16-partials-fp32-wire",
    "EP2-fewer-partial-rows",
)
"""Few shapes: each is compiled anew on a machine without a cache."""
CAPACITY = 1025
"""So that steps of more than SLOT_ROWS rows go the bulk way."""


def random_steps(seed: int, count: int, world_size: int, layers: int = 2) -> tuple[StepCase, ...]:
    rng = random.Random(seed)
    steps = []
    for _ in range(count):
        near = range(SLOT_ROWS - 40, SLOT_ROWS + 41)
        tokens = tuple(rng.choice((0, 1, rng.randint(0, 40), rng.choice(near), CAPACITY)) for _ in range(world_size))
        steps.append(
            StepCase(
                tokens,
                real=tuple(rng.randint(0, rows) for rows in tokens),
                supplied=tuple(rng.randint(0, rows) for rows in tokens) if rng.random() < 0.3 else None,
                real_as_tensor=rng.random() < 0.5,
                own_buffer=rng.random() < 0.5,
                halves=rng.random() < 0.3,
                spare=rng.choice((None, 0, 1, 5)),
                into_out=rng.random() < 0.5,
                layers=rng.randint(1, layers),
                index_dtype=rng.choice((torch.int32, torch.int64)),
                weight_dtype=rng.choice((torch.float32, torch.bfloat16)),
                partial_dtype=rng.choice((torch.float32, torch.bfloat16)),
                seed=rng.randint(0, 10**6),
            )
        )
    return tuple(steps)


def many(group: tf.EPGroup, cases: list[Case]) -> int:
    return sum(run_case(group, case) for case in cases)


@ON_GPUS
def test_bits_as_reference(on_ranks: RankPools, world_size: int) -> None:
    named = [CASES[name] for name in NAMED]
    cases = [dataclasses.replace(case, transport="p2p", hidden_size=64, topk=2) for size, case in named if size == world_size]
    steps = random_steps(1, 60, world_size)
    cases.append(Case(hidden_size=72, num_experts=11, topk=3, capacity=CAPACITY, transport="p2p", steps=steps))
    compared = on_ranks(many, world_size, cases, backend="nccl", timeout_s=240)
    assert compared == [sum(step.layers for case in cases for step in case.steps)] * world_size


@two_gpus
def test_split_rounds(on_ranks: RankPools) -> None:
    """Rounds in slots of more packets than threads, some of whose programs only send; beside fewer rows none are split."""
    counts = ((512, 512), (512, 300), (200, 512), (512, 1), (512, 512), (0, 512), (160, 160))
    steps = tuple(StepCase(tokens, layers=2, seed=seed, own_buffer=seed % 2 == 0) for seed, tokens in enumerate(counts))
    case = Case(hidden_size=7168, num_experts=256, topk=8, capacity=512, transport="p2p", steps=steps)
    assert on_ranks(run_case, 2, case, backend="nccl", timeout_s=120) == [2 * len(steps)] * 2


def virtual(group: tf.EPGroup, world_size: int, case: Case) -> list[int]:
    return run_virtual(run_case, world_size, case, device=group.device)


VIRTUAL = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""Loading a kernel waits for the device, so nothing may be loaded while a rank waits; and each rank needs a queue of its own."""


@one_gpu
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_bits_as_reference_on_virtual_ranks(on_ranks: RankPools, world_size: int) -> None:
    steps = random_steps(world_size, 12, world_size, layers=1)
    case = Case(hidden_size=72, num_experts=11, topk=3, capacity=CAPACITY, transport="p2p", steps=steps)
    assert on_ranks(virtual, 1, world_size, case, backend="nccl", timeout_s=150, env=VIRTUAL) == [[len(steps)] * world_size]


def numbers_of_virtual_ranks(group: tf.EPGroup, world_size: int) -> list[list[int]]:
    return run_virtual(gathered, world_size, "p2p", torch.int32, device=group.device)


@one_gpu
def test_a_number_that_no_int32_holds_arrives_as_none(on_ranks: RankPools) -> None:
    found = on_ranks(numbers_of_virtual_ranks, 1, 2, backend="nccl", timeout_s=100, env=VIRTUAL)
    assert found == [[[-1] * len(WIDE) * 2] * 2]


# --- solo -----------------------------------------------------------------------------------------------------------


def alone_in_turn(group: tf.EPGroup, world_size: int) -> list[bool]:
    """The last rank alone, in slots and beyond them. It is the one whose rows would lie elsewhere among its peers."""
    return [alone(group, Solo("p2p", world_size, world_size - 1, tokens)) for tokens in (3, BULK_ROWS)]


def virtual_alone_in_turn(group: tf.EPGroup, world_size: int) -> list[list[bool]]:
    return run_virtual(alone_in_turn, world_size, world_size, device=group.device)


@ON_GPUS
def test_solo_gives_its_own_rows_and_writes_to_no_peer(on_ranks: RankPools, world_size: int) -> None:
    assert on_ranks(alone_in_turn, world_size, world_size, backend="nccl", timeout_s=120) == [[True, True]] * world_size


@one_gpu
def test_solo_writes_to_no_virtual_rank(on_ranks: RankPools) -> None:
    found = on_ranks(virtual_alone_in_turn, 1, 3, backend="nccl", timeout_s=120, env=VIRTUAL)
    assert found == [[[True, True]] * 3]


# --- graphs ---------------------------------------------------------------------------------------------------------


def graphs(group: tf.EPGroup) -> None:
    """One graph per local count, replayed at any counts of the peer, mixed with eager steps, across the slot threshold."""
    config = tf.MoEConfig(hidden_size=64, num_experts=8, topk=2)
    rng = random.Random(3)
    sizes = (0, 1, 5, BULK_ROWS)
    with tf.Workspace(config, group, max_tokens_per_rank=CAPACITY, transport="p2p", timeout_s=20) as ws:
        layers = [ws.dispatcher() for _ in range(2)]
        static, captured = {}, {}
        real = torch.zeros(1, dtype=torch.int32, device=ws.device)

        def forward(count: int) -> list[tuple[torch.Tensor, ...]]:
            hidden, idx, weights, partial = static[count]
            ws.begin_step(count, real)
            done = []
            for layer in layers:
                got = layer.dispatch(hidden, idx, weights)
                kept = got.hidden.clone(), got.topk_idx.clone(), got.topk_weights.clone()  # views, gone with combine
                done.append((*kept, layer.combine(partial, got)))
            return done

        stream = torch.cuda.Stream()
        for count in sizes:
            static[count] = (
                torch.zeros(count, 64, dtype=torch.bfloat16, device=ws.device),
                torch.zeros(count, 2, dtype=torch.int32, device=ws.device),
                torch.zeros(count, 2, device=ws.device),
                torch.zeros(CAPACITY * group.size, 64, dtype=torch.bfloat16, device=ws.device),
            )
            with torch.cuda.stream(stream), ws.solo():
                forward(count)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                results = forward(count)
            captured[count] = (graph, results)
        for seed in range(60):
            counts = [rng.choice(sizes) for _ in range(group.size)]
            reals = [rng.randint(0, count) for count in counts]
            eager = [rng.random() < 0.3 for _ in range(group.size)]
            inputs = make_inputs(config, counts, seed=seed, index_dtype=torch.int32, payload="hostile")
            own, count = inputs[group.rank], counts[group.rank]
            hidden, idx, weights, partial = static[count]
            with torch.cuda.stream(stream):
                for tensor, value in ((hidden, own.hidden), (idx, own.topk_idx), (weights, own.topk_weights)):
                    tensor.copy_(value)
                partial[: sum(counts)] = own.partial.to(ws.device)
                real.fill_(reals[group.rank])
                if eager[group.rank]:
                    results = forward(count)
                else:
                    captured[count][0].replay()
                    results = captured[count][1]
            stream.synchronize()
            ws.check()
            expected = tf.reference.dispatch(
                [i.hidden for i in inputs], [i.topk_idx for i in inputs], [i.topk_weights for i in inputs], reals
            )
            total = tf.reference.combine([i.partial for i in inputs], counts, config.dtype, config.dtype)[group.rank]
            valid = sum(counts)
            for got_hidden, got_idx, got_weights, out in results:
                same("hidden", got_hidden[:valid], expected.hidden)
                same("topk_idx", got_idx[:valid], expected.topk_idx)
                same("topk_weights", got_weights[:valid], expected.topk_weights)
                assert bool((got_idx[valid:] == -1).all())
                same("combined", out, total)


@ON_GPUS
def test_each_rank_replays_its_own_graph_at_any_counts_of_the_others(on_ranks: RankPools, world_size: int) -> None:
    on_ranks(graphs, world_size, backend="nccl", timeout_s=150)


# --- no synchronisation ---------------------------------------------------------------------------------------------


def without_synchronisation(group: tf.EPGroup) -> int:
    config = tf.MoEConfig(hidden_size=64, num_experts=8, topk=2)
    with tf.Workspace(config, group, max_tokens_per_rank=200, transport="p2p", timeout_s=20) as ws:
        layer = ws.dispatcher()
        hidden = torch.zeros(7, 64, dtype=torch.bfloat16, device=ws.device)
        idx = torch.zeros(7, 2, dtype=torch.int64, device=ws.device)
        weights = torch.zeros(7, 2, device=ws.device)
        ws.begin_step(7)
        layer.combine(layer.dispatch(hidden, idx, weights).hidden)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocated_bytes.all.current"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode says that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                ws.begin_step(7)
                layer.combine(layer.dispatch(hidden, idx, weights).hidden)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        ws.check()
        return torch.cuda.memory_stats()["allocated_bytes.all.current"] - before


@ON_GPUS
def test_nothing_waits_for_the_device_and_nothing_grows(on_ranks: RankPools, world_size: int) -> None:
    assert on_ranks(without_synchronisation, world_size, backend="nccl", timeout_s=120) == [0] * world_size


# --- faults ---------------------------------------------------------------------------------------------------------


def late(group: tf.EPGroup) -> list[str]:
    config = tf.MoEConfig(hidden_size=64, num_experts=8, topk=2)
    said = []
    with tf.Workspace(config, group, max_tokens_per_rank=CAPACITY, transport="p2p", timeout_s=3) as ws:
        for rows in (1, BULK_ROWS):
            dispatcher = ws.dispatcher()
            ws.begin_step(rows)
            if group.rank == 1:
                time.sleep(6)
            start = time.monotonic()
            try:
                run_layer(ws, dispatcher, StepCase((rows, rows)), 0)
                torch.cuda.synchronize()
                ws.check()
                ws.begin_step(1)
                said.append("nothing")
            except (tf.PeerError, AssertionError):
                torch.cuda.synchronize()
                with pytest.raises(tf.PeerError) as caught:
                    ws.check()
                said.append(
                    f"{type(caught.value).__name__} {caught.value.rank} {caught.value.phase} {time.monotonic() - start < 5}"
                )
            ws.reset(timeout_s=60)
            for seed in range(10):
                step = StepCase((seed % 4, (seed + 1) % 4), seed=seed)
                begin(ws, step)
                run_layer(ws, dispatcher, step, 0)
    return said


@two_gpus
def test_a_late_rank_is_named_and_after_a_reset_all_is_right(on_ranks: RankPools) -> None:
    said = on_ranks(late, 2, backend="nccl", timeout_s=150)
    assert said[0] == ["PeerTimeoutError 1 data-missing True"] * 2
    assert said[1] == ["PeerFailedError 1 data-missing True"] * 2


NUM_GRAPH_LAYERS = 60


def late_for_a_graph(group: tf.EPGroup) -> tuple[str, int, float]:
    """One graph of a step and 60 layers, which rank 1 launches long after the others have given it up. What each rank is told,
    of whom, and how long its device was busy."""
    config = tf.MoEConfig(hidden_size=64, num_experts=8, topk=2)
    rows = (
        torch.ones(5, 64, dtype=torch.bfloat16, device=group.device),
        torch.zeros(5, 2, dtype=torch.int32, device=group.device),
        torch.ones(5, 2, device=group.device),
    )
    with tf.Workspace(config, group, max_tokens_per_rank=CAPACITY, transport="p2p", timeout_s=1.5) as ws:
        layers = [ws.dispatcher() for _ in range(NUM_GRAPH_LAYERS)]
        partial = torch.zeros(CAPACITY * group.size, 64, dtype=torch.bfloat16, device=ws.device)

        def forward() -> None:
            ws.begin_step(5)
            for layer in layers:
                layer.combine(partial, layer.dispatch(*rows))

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), ws.solo():
            forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with ws.capturing(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            forward()
        group.channel.barrier("captured", 60.0)
        if group.rank == 1:
            time.sleep(4)
        start = time.monotonic()
        with ws.replaying():
            graph.replay()
        torch.cuda.synchronize()
        busy_s = time.monotonic() - start
        with pytest.raises(tf.PeerError) as caught:
            ws.check()
        del graph
        ws.reset(timeout_s=60)
        for seed in range(100):
            step = StepCase(tuple((seed + rank) % 4 for rank in range(group.size)), seed=seed)
            begin(ws, step)
            run_layer(ws, layers[0], step, 0)
        return type(caught.value).__name__, caught.value.rank, busy_s


@ON_GPUS
def test_a_graph_of_60_layers_waits_once_for_a_late_rank_and_after_a_reset_all_is_right(
    on_ranks: RankPools, world_size: int
) -> None:
    told = on_ranks(late_for_a_graph, world_size, backend="nccl", timeout_s=120)
    late, others = told[1], [told[rank] for rank in range(world_size) if rank != 1]
    assert late[:2] == ("PeerFailedError", 1)
    assert late[2] < 2
    assert {each[:2] for each in others} == {("PeerTimeoutError", 1)}
    assert max(each[2] for each in others) < 1.5 + 2, "not 120 times the time-out"
