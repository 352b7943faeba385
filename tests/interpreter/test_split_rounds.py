"""Rounds in slots of which some programs only send and the others only receive: the bits of the reference, and no rank that is
late makes another wait for ever. Programs run one after another here, the sending ones first."""

import random
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import tokenferry as tf
from cases import Case, StepCase, run_case, same
from rank_pool import RankPools
from tokenferry.errors import PeerTimeoutError
from tokenferry.testing import run_ranks
from tokenferry.testing.data import make_inputs
from tokenferry.transports.base import StepTensors, Transport, TransportSettings

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}
SPLIT_ROWS = 5
"""A row has 32 packets, and two programs of a warp have 64 threads: from three rows on a round is split."""


@dataclass(frozen=True)
class SplitRounds:
    """For `Workspace(transport=...)`: `p2p` with several programs of one warp, of which one in `split` only sends."""

    split: int = 2
    programs: int = 2
    name: str = "p2p"

    def open(self, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
        from tokenferry.transports.symmetric.transport import SymmetricTransport
        from tokenferry.transports.symmetric.tuning import Tuning

        tuning = Tuning(num_warps=1, max_programs=self.programs, split=self.split)
        return SymmetricTransport(settings, step_tensors, slot_rows=8, tuning=tuning, few=None)


def case_of(transport: SplitRounds, world_size: int, partial_dtype: torch.dtype = torch.bfloat16) -> Case:
    """More rows each way than programs have threads, another number of them on each rank, and padding among them."""

    def step(seed: int, **options: object) -> StepCase:
        tokens = tuple(SPLIT_ROWS + (seed + rank) % 4 for rank in range(world_size))
        return StepCase(tokens, layers=1, seed=seed, partial_dtype=partial_dtype, payload="hostile", **options)

    real = (3,) * world_size
    steps = (step(1, own_buffer=True), step(2, real=real), step(3, routing="skewed", into_out=True))
    return Case(hidden_size=256, transport=transport, steps=steps)


@pytest.mark.parametrize("partial_dtype", [torch.bfloat16, torch.float32], ids=["partial-bf16", "partial-fp32"])
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)], ids=lambda size: f"EP{size}")
def test_the_bits_of_the_reference(on_ranks: RankPools, world_size: int, partial_dtype: torch.dtype) -> None:
    case = case_of(SplitRounds(), world_size, partial_dtype)
    assert on_ranks(run_case, world_size, case, env=INTERPRETER) == [3] * world_size


@pytest.mark.parametrize(("programs", "split"), [(3, 3), (4, 2)], ids=["one-of-three", "two-of-four"])
def test_other_shares(on_ranks: RankPools, programs: int, split: int) -> None:
    case = case_of(SplitRounds(split, programs), 2)
    assert on_ranks(run_case, 2, case, env=INTERPRETER) == [3, 3]


def test_rounds_with_few_rows_on_one_side_are_not_split(on_ranks: RankPools) -> None:
    """A rank with one row beside one with many: neither has programs that only send, and both have the reference's bits."""
    steps = tuple(StepCase(tokens, seed=seed) for seed, tokens in enumerate(((1, 5), (0, 6), (2, 2), (6, 6), (5, 1))))
    case = Case(hidden_size=256, transport=SplitRounds(), steps=steps)
    assert on_ranks(run_case, 2, case, env=INTERPRETER) == [5, 5]


def order_of_events(group: tf.EPGroup) -> list[list[str]]:
    """What a rank did in two dispatches, of a split round and of another, each run of the same kind once; packets are late."""
    from tokenferry.kernels.wire_interpreter import Observer

    class Slow(Observer):
        def __init__(self) -> None:
            self.random, self.kinds = random.Random(group.rank), []

        def pieces(self, kind: str, num_packets: int) -> list[np.ndarray]:
            time.sleep(self.random.choice((0, 0, 0.003)))
            return np.array_split(np.array(self.random.sample(range(num_packets), num_packets), dtype=np.int64), 2)

        def event(self, kind: str, addresses: np.ndarray) -> None:
            if kind in ("send", "poll") and self.kinds[-1:] != [kind]:
                self.kinds.append(kind)

    found = []
    config = tf.MoEConfig(hidden_size=256, num_experts=4, topk=1, dtype=torch.bfloat16)
    with tf.Workspace(config, group, max_tokens_per_rank=8, transport=SplitRounds(), timeout_s=20) as ws:
        for rows in (SPLIT_ROWS, 2):
            ws.active_transport.innermost.observe(observer := Slow())
            inputs = make_inputs(config, (rows, rows), seed=rows)
            own, layer = inputs[group.rank], ws.dispatcher()
            ws.begin_step(rows)
            observer.kinds.clear()
            got = layer.dispatch(own.hidden, own.topk_idx, own.topk_weights)
            same("hidden", got.hidden[: 2 * rows], torch.cat([each.hidden for each in inputs]))
            found.append(list(observer.kinds))
            layer.combine(got.hidden, got)
    return found


def test_a_split_round_receives_in_other_programs_than_it_sends() -> None:
    """Programs run one after another: of a split round the first sends all rows, and the second receives all."""
    for split, whole in run_ranks(order_of_events, 2, env=INTERPRETER):
        assert split == ["send", "poll"]
        assert whole == ["send", "poll"] * 2


def late(group: tf.EPGroup) -> str:
    """Rank 1 comes to the dispatch of a split round too late."""
    config = tf.MoEConfig(hidden_size=256, num_experts=4, topk=1, dtype=torch.bfloat16)
    with tf.Workspace(config, group, max_tokens_per_rank=8, transport=SplitRounds(), timeout_s=2.0) as ws:
        layer = ws.dispatcher()
        ws.begin_step(SPLIT_ROWS)
        if group.rank == 1:
            group.channel.barrier("rank 0 has given up", 60.0)
            return "late"
        try:
            layer.dispatch(
                torch.zeros(SPLIT_ROWS, 256, dtype=torch.bfloat16),
                torch.zeros(SPLIT_ROWS, 1, dtype=torch.int32),
                torch.ones(SPLIT_ROWS, 1),
            )
            ws.check()
        except PeerTimeoutError as error:
            return f"waited for rank {error.rank} in {error.phase}"
        finally:
            group.channel.barrier("rank 0 has given up", 60.0)
        return "did not wait"


def test_a_receiving_program_gives_up_when_its_time_is_up() -> None:
    assert run_ranks(late, 2, env=INTERPRETER)[0].startswith("waited for rank 1")
