"""`solo()` reaches nobody: neither the next rank's memory, nor over multicast everybody's, on whichever rank it runs."""

from dataclasses import dataclass

import pytest
import torch

import switch
import tokenferry as tf
from cases import Case, same
from graph_work import Forward, Setup, check_steps, open_workspace
from tokenferry.graphs import GraphRunner
from tokenferry.testing import run_ranks
from tokenferry.testing.data import make_inputs

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Solo:
    """Rank `who` of `ranks` makes a step of `tokens` rows alone; 200 rows are more than a slot holds."""

    transport: str
    ranks: int
    who: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.transport}-rank{self.who}of{self.ranks}-T{self.tokens}"


CASES = (
    Solo("p2p", 2, 1, 3),
    Solo("p2p", 3, 2, 200),
    Solo("nvls", 2, 0, 3),
    Solo("nvls", 2, 1, 200),
    Solo("nvls", 3, 1, 3),
)


def alone(group: tf.EPGroup, case: Solo) -> bool:
    """On the other ranks: whether every byte of the buffer is as it was."""
    switch.install()
    config = Case().config
    capacity = 1025 if case.tokens > 192 else 8
    with tf.Workspace(config, group, max_tokens_per_rank=capacity, transport=case.transport, timeout_s=10) as ws:
        before = ws._transport._buffer.tensor.clone()
        group.channel.barrier("copied", 30)
        if group.rank == case.who:
            layer, own = ws.dispatcher(), make_inputs(config, (case.tokens,), seed=1)[0]
            with ws.solo():
                ws.begin_step(case.tokens)
                got = layer.dispatch(own.hidden, own.topk_idx, own.topk_weights)
                same("hidden", got.hidden[: case.tokens], own.hidden)
                same("topk_idx", got.topk_idx[: case.tokens], own.topk_idx.int())
                same("topk_weights", got.topk_weights[: case.tokens], own.topk_weights)
                partial = torch.full((len(got.hidden), config.hidden_size), torch.nan, dtype=config.dtype)
                partial[: case.tokens] = own.partial
                same("combined", layer.combine(partial, got), own.partial)
        group.channel.barrier("ran alone", 30)
        return group.rank == case.who or torch.equal(before, ws._transport._buffer.tensor)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_solo_gives_its_own_rows_and_writes_to_no_peer(case: Solo) -> None:
    assert run_ranks(alone, case.ranks, case, env=INTERPRETER, timeout_s=60) == [True] * case.ranks


def runner_with_switch(group: tf.EPGroup, setup: Setup, steps: list[tuple[int, int]]) -> None:
    switch.install()
    with open_workspace(group, setup) as ws:
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
