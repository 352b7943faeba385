"""`solo()` reaches nobody: neither the next rank's memory, nor over multicast everybody's, on whichever rank it runs."""

import dataclasses

import pytest

import switch
import tokenferry as tf
from cases import BULK_ROWS
from graph_work import Forward, Setup, check_steps, open_workspace
from solo_work import Solo, alone
from tokenferry.graphs import GraphRunner
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}


CASES = (
    Solo("p2p", 2, 1, 3),
    Solo("p2p", 3, 2, BULK_ROWS),
    Solo("nvls", 2, 0, 3),
    Solo("nvls", 2, 1, BULK_ROWS),
    Solo("nvls", 3, 1, 3),
    Solo("nvls", 2, 1, BULK_ROWS, switch_sum=True),
)


def alone_with_switch(group: tf.EPGroup, case: Solo) -> bool:
    return alone(group, case, switch.transport(case.transport))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_solo_gives_its_own_rows_and_writes_to_no_peer(case: Solo) -> None:
    assert run_ranks(alone_with_switch, case.ranks, case, env=INTERPRETER, timeout_s=60) == [True] * case.ranks


def runner_with_switch(group: tf.EPGroup, setup: Setup, steps: list[tuple[int, int]]) -> None:
    with open_workspace(group, dataclasses.replace(setup, transport=switch.transport(setup.transport))) as ws:
        forward = Forward(setup, ws)
        runner = GraphRunner(ws, forward, setup.buckets, inputs=[forward.pool])
        if group.rank == 1:  # as before a capture on CUDA; on CPUs the constructor captures nothing
            for bucket in setup.buckets:
                runner._warm_up(bucket, False)
        group.channel.barrier("warm", 60)
        check_steps(ws, runner, forward, steps)


@pytest.mark.parametrize("transport", ["p2p", "nvls"])
def test_the_graph_runner_warms_up_alone_and_the_steps_after_it_are_right(transport: str) -> None:
    setup = Setup(transport=transport, capacity=5, buckets=(2, 4))
    run_ranks(runner_with_switch, 2, setup, [(1, 4), (0, 5), (3, 0)], timeout_s=150, env=INTERPRETER)
