"""The symmetric kernels in Triton's interpreter, rank processes over shared memory: the bits of the reference, however late
and in whatever order packets arrive."""

import dataclasses
import gc
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenferry as tf
from cases import CASES, DTYPES, Case, StepCase, begin, run_case, run_layer, same
from patience import PATIENT_S, SLACK_S
from tokenferry.step import StepRequest
from tokenferry.testing import run_ranks
from tokenferry.testing.data import make_inputs
from tokenferry.transports.symmetric.layout import SLOT_ROWS

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}
SHARED = Path("/dev/shm")
CARRIED = [name for name, (world_size, case) in CASES.items() if case.combine_order == "rank" and world_size <= 4]
CAPACITY = 1025
"""So that steps of more than SLOT_ROWS rows go the bulk way."""


def on_p2p(case: Case) -> Case:
    return dataclasses.replace(case, transport="p2p", counts="uneven")


def many(group: tf.EPGroup, cases: list[Case]) -> list[int]:
    return [run_case(group, case) for case in cases]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_named_cases_give_the_bits_of_the_reference(world_size: int) -> None:
    cases = [on_p2p(case) for size, case in (CASES[name] for name in CARRIED) if size == world_size]
    expected = [sum(step.layers for step in case.steps) for case in cases]
    assert run_ranks(many, world_size, cases, env=INTERPRETER) == [expected] * world_size


EVERY_DTYPE = [
    Case(
        hidden_size=hidden_size,
        dtype=dtype,
        combine_dtype=combine_dtype,
        topk=3,
        transport="p2p",
        steps=(
            StepCase(
                (3, 2),
                partial_dtype=partial_dtype,
                index_dtype=torch.int32 if partial_dtype is dtype else torch.int64,
                weight_dtype=partial_dtype,
                payload="hostile",
            ),
        ),
    )
    for dtype in DTYPES
    for combine_dtype in DTYPES
    for partial_dtype in DTYPES
    for hidden_size in ((4, 8) if torch.float32 not in (dtype, combine_dtype) else (6, 8) if dtype == combine_dtype else (4, 8))
]


@pytest.mark.parametrize("which", [slice(0, None, 3), pytest.param(slice(None), marks=pytest.mark.long)], ids=["a-third", "all"])
def test_every_mix_of_dtypes_in_whole_and_half_packets(which: slice) -> None:
    mixes = EVERY_DTYPE[which]
    assert run_ranks(many, 2, mixes, env=INTERPRETER, timeout_s=120) == [[1] * len(mixes)] * 2


def wide_ids(group: tf.EPGroup) -> list[list[list[int]]]:
    config, seen = Case().config, []
    with tf.Workspace(config, group, max_tokens_per_rank=CAPACITY, transport="p2p", index_dtype=torch.int64) as ws:
        layer = ws.dispatcher()
        for rows in (SLOT_ROWS + 1, 2, 3):  # bulk, then slots; fewer rows leave old ids behind, then more come
            ws.begin_step(rows)
            ids = torch.tensor([[group.rank, -1]], dtype=torch.int32).repeat(rows, 1)
            got = layer.dispatch(torch.zeros(rows, config.hidden_size, dtype=torch.bfloat16), ids, torch.ones(rows, 2))
            assert got.topk_idx.dtype == torch.int64
            seen.append(got.topk_idx.unique_consecutive(dim=0).tolist())
            layer.combine(got.hidden, got)
    return seen


def test_ids_come_as_int64_if_asked_for() -> None:
    assert run_ranks(wide_ids, 2, env=INTERPRETER) == [[[[0, -1], [1, -1], [-1, -1]]] * 3] * 2


# --- random steps ---------------------------------------------------------------------------------------------------


def random_steps(seed: int, count: int, world_size: int, most: int) -> list[StepCase]:
    """Any counts, mostly small, some empty, some on both sides of the threshold between slots and bulk."""
    rng = random.Random(seed)
    steps = []
    for number in range(count):
        few = rng.random() < 0.9
        tokens = tuple(rng.choice((0, rng.randint(0, 5 if few else most), 1 if few else most)) for _ in range(world_size))
        if rng.random() < 0.1:
            tokens = tuple(most if rank == number % world_size else 0 for rank in range(world_size))
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
                layers=rng.randint(1, 2),
                payload="hostile",
                routing=rng.choice(("uniform", "skewed", "none", "repeated")),
                seed=seed * 7919 + number,
            )
        )
    return steps


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_random_steps_across_the_threshold(world_size: int) -> None:
    steps = tuple(random_steps(world_size, 30, world_size, SLOT_ROWS + 8))
    case = Case(hidden_size=8, topk=3, capacity=CAPACITY, transport="p2p", steps=steps)
    assert run_ranks(run_case, world_size, case, env=INTERPRETER, timeout_s=150) == [sum(s.layers for s in steps)] * world_size


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(12, 18))
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_thousands_of_random_steps(world_size: int, seed: int) -> None:
    steps = tuple(random_steps(seed, 120, world_size, SLOT_ROWS + 8))
    case = Case(hidden_size=8, topk=3, capacity=CAPACITY, transport="p2p", steps=steps)
    assert run_ranks(run_case, world_size, case, env=INTERPRETER, timeout_s=1400) == [sum(s.layers for s in steps)] * world_size


# --- delays between packets -----------------------------------------------------------------------------------------


def delayed(group: tf.EPGroup, steps: list[StepCase]) -> list[str]:
    """All ranks send each block's packets in random pieces, in random order, with pauses; returns the kinds of event seen."""
    from tokenferry.kernels.wire_interpreter import Observer

    class Slow(Observer):
        def __init__(self) -> None:
            self.random, self.kinds = random.Random(group.rank), set()

        def pieces(self, kind: str, num_packets: int) -> list[np.ndarray]:
            order = np.array(self.random.sample(range(num_packets), num_packets), dtype=np.int64)
            parts = np.array_split(order, self.random.randint(1, 3)) if num_packets > 1 else [order]
            time.sleep(self.random.choice((0, 0, 0.003)))
            return parts

        def event(self, kind: str, addresses: np.ndarray) -> None:
            self.kinds.add(kind)
            if self.random.random() < 0.2:
                time.sleep(0.001)

    observer = Slow()
    config = tf.MoEConfig(hidden_size=16, num_experts=8, topk=2)
    with tf.Workspace(config, group, max_tokens_per_rank=CAPACITY, transport="p2p", timeout_s=20) as ws:
        ws.active_transport.innermost.observe(observer)
        layers = [ws.dispatcher(), ws.dispatcher()]
        for step in steps:
            begin(ws, step)
            for number, layer in enumerate(layers[: step.layers]):
                run_layer(ws, layer, step, number)
                time.sleep(observer.random.choice((0, 0, 0.004)))
    return sorted(observer.kinds)


def test_packets_in_any_order_with_pauses_between_them() -> None:
    steps = [*random_steps(5, 12, 3, 4), StepCase((SLOT_ROWS + 1, 0, 3)), StepCase((2, 2, 2))]
    kinds = run_ranks(delayed, 3, steps, env=INTERPRETER, timeout_s=120)
    assert kinds == [["count", "poll", "restore", "send", "signal"]] * 3


# --- slots are used again -------------------------------------------------------------------------------------------------


def dispatches_without_combines(group: tf.EPGroup) -> int:
    """What no workspace allows and a benchmark does: the next dispatch follows an exchange of counts, not a combine."""
    config, delays, counts = Case().config, random.Random(group.rank), (3, 0, 8)
    with tf.Workspace(config, group, max_tokens_per_rank=8, transport="p2p", timeout_s=20) as ws:
        transport = ws.active_transport.innermost
        for number in range(20):
            inputs = make_inputs(config, counts, seed=number)
            own, num_tokens = inputs[group.rank], counts[group.rank]
            transport.begin_step(StepRequest(number, num_tokens, num_tokens), -1)
            time.sleep(delays.choice((0, 0, 0.004)))
            got = transport.dispatch(0, own.hidden, own.topk_idx, own.topk_weights)
            same("hidden", got.hidden_RH[: sum(counts)], torch.cat([each.hidden for each in inputs]))
    return number + 1


def test_an_exchange_of_counts_lets_slots_be_used_again_as_a_combine_does() -> None:
    assert run_ranks(dispatches_without_combines, 3, env=INTERPRETER, timeout_s=60) == [20] * 3


# --- halves ---------------------------------------------------------------------------------------------------------


def halves_before_the_peer(group: tf.EPGroup, rows: int) -> tuple[float, float]:
    """Rank 1 sends nothing for a second, twice; returns the seconds that each sending half took here. Bits are compared."""
    step, waited_s = StepCase((rows, rows)), []
    with tf.Workspace(Case().config, group, max_tokens_per_rank=CAPACITY, transport="p2p", timeout_s=PATIENT_S) as ws:
        layer, config = ws.dispatcher(), ws.config
        begin(ws, step)
        inputs = make_inputs(config, step.tokens, seed=3)
        own = inputs[group.rank]

        def send(half: Callable[..., None], *given: torch.Tensor) -> None:
            group.channel.barrier(f"before sending {len(waited_s)}", PATIENT_S)
            if group.rank == 1:
                group.channel.barrier(f"rank 0 has sent {len(waited_s)}", PATIENT_S)
            start = time.monotonic()
            half(*given)
            waited_s.append(time.monotonic() - start)
            if group.rank == 0:
                group.channel.barrier(f"rank 0 has sent {len(waited_s) - 1}", PATIENT_S)

        send(layer.dispatch_begin, own.hidden, own.topk_idx, own.topk_weights)
        got = layer.dispatch_end()
        expected = tf.reference.dispatch(*([getattr(i, name) for i in inputs] for name in ("hidden", "topk_idx", "topk_weights")))
        same("hidden", got.hidden[: 2 * rows], expected.hidden)
        partial = torch.full((got.hidden.shape[0], config.hidden_size), torch.nan, dtype=own.partial.dtype)
        partial[: 2 * rows] = own.partial
        send(layer.combine_begin, partial)
        wanted = tf.reference.combine([i.partial for i in inputs], step.tokens, config.dtype, config.dtype)[group.rank]
        same("combined", layer.combine_end(), wanted)
    return waited_s[0], waited_s[1]


@pytest.mark.parametrize("rows", [3, SLOT_ROWS + 8], ids=["slots", "bulk"])
def test_a_sending_half_returns_although_the_peer_has_sent_nothing(rows: int) -> None:
    """Rank 1 sends only when rank 0's half is over: a half that waited for its peer would never end."""
    for waited_s in run_ranks(halves_before_the_peer, 2, rows, env=INTERPRETER, timeout_s=3 * PATIENT_S):
        assert max(waited_s) < SLACK_S


# --- two workspaces, solo, memory -----------------------------------------------------------------------------------


def two_workspaces(group: tf.EPGroup) -> None:
    small, large = Case(hidden_size=8, topk=1).config, Case(hidden_size=40, topk=4, dtype=torch.float32).config
    with (
        tf.Workspace(small, group, max_tokens_per_rank=4, transport="p2p") as first,
        tf.Workspace(large, group, max_tokens_per_rank=9, transport="p2p") as second,
    ):
        layers = first.dispatcher(), second.dispatcher()
        for seed in range(5):
            for ws, tokens in ((first, (3, 1)), (second, (0, 9))):
                ws.begin_step(tokens[group.rank])
            inputs = make_inputs(small, (3, 1), seed=seed)
            own = inputs[group.rank]
            got = layers[0].dispatch(own.hidden, own.topk_idx, own.topk_weights)
            run_layer(second, layers[1], StepCase((0, 9), seed=seed), 0)
            partial = torch.full((8, 8), torch.nan, dtype=torch.bfloat16)
            partial[:4] = own.partial
            wanted = tf.reference.combine([i.partial for i in inputs], (3, 1), small.dtype, small.dtype)[group.rank]
            same("combined", layers[0].combine(partial, got), wanted)


def test_two_workspaces_of_different_shape_interleave() -> None:
    run_ranks(two_workspaces, 2, env=INTERPRETER)


def solo_between_steps(group: tf.EPGroup) -> None:
    config = Case().config
    with tf.Workspace(config, group, max_tokens_per_rank=8, transport="p2p") as ws:
        layer = ws.dispatcher()
        for seed in range(4):
            step = StepCase((8, 8) if seed % 2 else (2, 3), seed=seed)
            begin(ws, step)
            run_layer(ws, layer, step, 0)
            if group.rank == 0:  # alone: the other rank takes no part
                with ws.solo():
                    own = make_inputs(config, (5,), seed=seed)[0]
                    published = ws.begin_step(5)
                    assert published.tokens_per_rank.tolist() == [5, 0]
                    got = layer.dispatch(own.hidden, own.topk_idx, own.topk_weights)
                    same("hidden", got.hidden[:5], own.hidden)
                    assert bool((got.topk_idx[5:] == -1).all())
                    partial = torch.full((16, 16), torch.nan, dtype=torch.bfloat16)
                    partial[:5] = own.partial
                    same("combined", layer.combine(partial, got), own.partial)


def test_solo_disturbs_neither_counts_nor_peers() -> None:
    run_ranks(solo_between_steps, 2, env=INTERPRETER)


def held(group: tf.EPGroup) -> tuple[int, int, list[int]]:
    config = tf.MoEConfig(hidden_size=24, num_experts=8, topk=3)
    with tf.Workspace(config, group, max_tokens_per_rank=300, transport="p2p", combine_dtype=torch.float32) as ws:
        num_mapped = [shared_mappings()]
        required = tf.Workspace.required_bytes(config, 2, 300, transport="p2p", combine_dtype=torch.float32)
        nbytes = ws.nbytes
        ws.reset()
        gc.collect()
        num_mapped.append(shared_mappings())
    del ws
    gc.collect()
    return nbytes, required, [*num_mapped, shared_mappings()]


def shared_mappings() -> int:
    """How many files of /dev/shm, with or without a name, this process has mapped."""
    return len({line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if f" {SHARED}/" in line})


def test_required_bytes_is_what_is_held_and_no_shared_memory_is_kept_by_a_reset_or_after_closing() -> None:
    for nbytes, required, num_mapped in run_ranks(held, 2, env=INTERPRETER):
        assert nbytes == required
        assert num_mapped == [2, 2, 0]
