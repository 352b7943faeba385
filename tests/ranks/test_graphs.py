"""The graph runner on ranks over gloo, where the padded forward runs without a graph: which bucket, and what comes out."""

import random

import pytest
import torch

import tokenferry as tf
from graph_work import ALL_PAIRS, Forward, Setup, check_steps, expected_bucket, open_workspace, run_steps
from tokenferry.graphs import GraphRunner
from tokenferry.testing import run_ranks, same_bits

pytestmark = pytest.mark.ranks


def random_steps(seed: int, count: int, world_size: int, largest: int = 320) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    sizes = (0, 1, 64, 65, largest)
    return [tuple(rng.choice((rng.choice(sizes), rng.randint(0, largest))) for _ in range(world_size)) for _ in range(count)]


def test_all_16_combinations_of_eager_two_graphs_and_idle() -> None:
    run_ranks(run_steps, 2, Setup(), ALL_PAIRS, timeout_s=120)


SETUPS = [
    Setup(dtype=torch.bfloat16, shared=True, overlap="between"),
    Setup(shared=True, latent=True, layers=2),
    Setup(counts="equal"),
    Setup(draft="rows"),
    Setup(draft="step"),
    Setup(dispatch_format="fp8_block128", shared=True, draft="rows"),
    Setup(dispatch_format="fp8_block128", dtype=torch.bfloat16, float8=True, shared=True, overlap="between"),
    Setup(float8_terms=True, shared=True, latent=True, draft="rows"),
    Setup(dispatch_format="fp8_block128", dtype=torch.bfloat16, float8=True, float8_terms=True, counts="equal"),
]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_three_ranks_with_any_counts(setup: Setup) -> None:
    run_ranks(run_steps, 3, setup, random_steps(5, 8, 3), timeout_s=120)


def test_one_rank_needs_nobody() -> None:
    run_ranks(run_steps, 1, Setup(transport="local"), [(0,), (3,), (64,), (65,), (320,)])


def test_500_random_steps_in_constant_memory() -> None:
    for used in run_ranks(run_steps, 2, Setup(shared=True), random_steps(7, 500, 2), timeout_s=280):
        assert max(used["memory"][4:]) - max(used["memory"][:4]) < 16 << 20, used["memory"]


def overlap_bits(group: tf.EPGroup, transport: str) -> list[torch.Tensor]:
    outputs = []
    for overlap in ("off", "between", "stream"):
        setup = Setup(transport=transport, dtype=torch.bfloat16, shared=True, latent=True, overlap=overlap, capacity=8)
        with open_workspace(group, setup) as ws:
            forward = Forward(setup, ws)
            ws.begin_step(3 + group.rank)
            outputs.append(forward(forward.pool[: 3 + group.rank]))
    return outputs


@pytest.mark.parametrize("transport", ["collective", pytest.param("p2p", marks=pytest.mark.interpreter)])
def test_every_overlap_gives_the_same_bits(transport: str) -> None:
    env = {"TRITON_INTERPRET": "1"} if transport == "p2p" else {}
    for off, between, stream in run_ranks(overlap_bits, 2, transport, env=env):
        assert same_bits(off, between)
        assert same_bits(off, stream)


# --- idle ranks -----------------------------------------------------------------------------------------------------------


def finish_apart(group: tf.EPGroup) -> int:
    """Rank r has 3 r steps of work. Returns how often it had to idle."""
    setup = Setup()
    with open_workspace(group, setup) as ws:
        forward = Forward(setup, ws)
        runner = GraphRunner(ws, forward, setup.buckets, inputs=[forward.pool])
        for step in range(3 * group.rank):
            chosen = forward.rows(group.rank, step, 5)
            assert forward.error(runner(forward.pool[chosen]), chosen) < 2e-6
        num_idle = 1
        while not runner.idle(done=True):
            num_idle += 1
        return num_idle


def test_ranks_that_finish_apart_all_stop_in_the_same_step() -> None:
    assert run_ranks(finish_apart, 3) == [7, 4, 1]


def idle_is_not_done(group: tf.EPGroup) -> list[bool]:
    setup = Setup()
    with open_workspace(group, setup) as ws:
        forward = Forward(setup, ws)
        runner = GraphRunner(ws, forward, setup.buckets, inputs=[forward.pool])
        return [runner.idle(), runner.idle(done=group.rank == 0), runner.idle(done=True)]


def test_an_idle_rank_that_is_not_done_keeps_the_others() -> None:
    assert run_ranks(idle_is_not_done, 2) == [[False, False, True]] * 2


# --- reset and failure ----------------------------------------------------------------------------------------------------


def replay_after_reset(group: tf.EPGroup) -> str:
    setup = Setup()
    steps = [(5, 70), (0, 3)]
    with open_workspace(group, setup) as ws:
        forward = Forward(setup, ws)
        runner = GraphRunner(ws, forward, setup.buckets, inputs=[forward.pool])
        runner(forward.pool[:3])
        ws.reset()
        with pytest.raises(tf.StateError) as refused:
            runner(forward.pool[:3])
        runner.capture()
        check_steps(ws, runner, forward, steps)
        return str(refused.value)


def test_a_runner_from_before_a_reset_is_refused_and_captures_again() -> None:
    for said in run_ranks(replay_after_reset, 2):
        assert "captured in generation 0" in said
        assert "now is generation 1; call capture()" in said


def fn_fails_on_rank_1(group: tf.EPGroup) -> str:
    setup = Setup()
    with open_workspace(group, setup) as ws:
        forward = Forward(setup, ws)
        fails = True

        def fn(hidden: torch.Tensor) -> torch.Tensor:
            if fails and group.rank == 1:
                raise ArithmeticError("no such row")
            return forward(hidden)

        runner = GraphRunner(ws, fn, setup.buckets, inputs=[forward.pool])
        with pytest.raises((tf.PeerFailedError, ArithmeticError)) as failed:
            runner(forward.pool[:3])
        with pytest.raises(tf.PeerFailedError):
            runner(forward.pool[:3])
        fails = False
        ws.reset()
        runner.capture()
        check_steps(ws, runner, forward, [(4, 9), (0, 300)])
        return f"{type(failed.value).__name__}: {failed.value}"


def test_a_forward_that_fails_on_one_rank_is_told_to_the_others() -> None:
    said = run_ranks(fn_fails_on_rank_1, 2)
    assert said[0].startswith("PeerFailedError: rank 1 failed in step 1: ArithmeticError: no such row")
    assert said[1] == "ArithmeticError: no such row"


def past_the_runner(group: tf.EPGroup) -> str:
    setup = Setup(timeout_s=5)
    with open_workspace(group, setup) as ws:
        forward = Forward(setup, ws)
        runner = GraphRunner(ws, forward, setup.buckets, inputs=[forward.pool])
        runner(forward.pool[:1])
        with pytest.raises(tf.PeerError) as failed:
            runner(forward.pool[:1]) if group.rank else ws.begin_step(1)
        return failed.value.phase


def test_a_rank_that_begins_its_step_without_the_runner_is_found() -> None:
    assert run_ranks(past_the_runner, 2) == ["counts-disagree"] * 2


def test_the_expected_buckets_of_these_tests_are_as_the_design_says() -> None:
    assert expected_bucket(Setup(), (5, 70), 0) == expected_bucket(Setup(), (5, 70), 1) == 256
    assert expected_bucket(Setup(transport="p2p"), (5, 70), 0) == 64
    assert expected_bucket(Setup(), (5, 300), 0) is None
