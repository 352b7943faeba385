"""Launches for few tokens in the interpreter: one CTA sees to the flags of several. The bits are those of the reference."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl

import tokenferry as tf
from cases import Case, StepCase, run_case
from rank_pool import RankPools
from thinned import crossed
from tokenferry.kernels import wire
from tokenferry.transports.base import StepTensors, Transport, TransportSettings

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}
NUM_FLAGS = 3
ROWS = (1, 7, 0, 5)
"""A row has 32 packets, and a flag stands for blocks of 64: seven rows reach all three flags and begin anew."""


@dataclass(frozen=True)
class FewTokensOnly:
    """For `Workspace(transport=...)`: `p2p` of which every rank launches the kernels for few tokens, whatever it brings. The
    interpreter runs one program a launch, so that ranks which launch the other kernels could not set three flags."""

    name: str = "p2p"

    def open(self, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
        from tokenferry.transports.symmetric.transport import SymmetricTransport
        from tokenferry.transports.symmetric.tuning import Cut, FewTokens, Tuning

        cuts = (Cut(max_tokens=settings.max_tokens_per_rank, max_programs=1),)
        few = FewTokens(tuning=Tuning(num_warps=1, max_programs=1), dispatch=cuts, combine=cuts)
        return SymmetricTransport(
            settings, step_tensors, slot_rows=2, tuning=Tuning(num_warps=2, max_programs=NUM_FLAGS), few=few
        )


def case_of(world_size: int, partial_dtype: torch.dtype) -> Case:
    def step(seed: int, **options: object) -> StepCase:
        tokens = tuple(ROWS[(seed + rank) % len(ROWS)] for rank in range(world_size))
        return StepCase(tokens, layers=2, seed=seed, partial_dtype=partial_dtype, **options)

    in_slots = StepCase((2,) * world_size, layers=2, partial_dtype=partial_dtype)
    steps = (step(0), step(1, own_buffer=True), in_slots, step(2, halves=True), step(3, own_buffer=True, halves=True), in_slots)
    return Case(hidden_size=256, transport=FewTokensOnly(), steps=steps)


@pytest.mark.parametrize(("world_size", "partial_dtype"), crossed((1, 2, 3), (torch.bfloat16, torch.float32)), ids=str)
def test_bulk_and_slots_give_the_bits_of_the_reference(on_ranks: RankPools, world_size: int, partial_dtype: torch.dtype) -> None:
    case = case_of(world_size, partial_dtype)
    assert on_ranks(run_case, world_size, case, env=INTERPRETER) == [sum(step.layers for step in case.steps)] * world_size


@triton.jit
def share_out(out, pid, programs, size, num_flags, PAIRS: tl.constexpr):
    pairs = tl.arange(0, PAIRS)
    ranks, flags, exist = wire.rank_and_flag(pairs, pid, programs, size, num_flags)
    tl.store(out + 2 * pairs, ranks, mask=exist)
    tl.store(out + 2 * pairs + 1, flags, mask=exist)


def shared_out(pid: int) -> list[tuple[int, int]]:
    out = torch.full((4, 2), -1, dtype=torch.int32)
    share_out[(1,)](out, pid, 3, 2, 5, PAIRS=4)
    return [(rank, flag) for rank, flag in out.tolist() if rank >= 0]


def flags_of_all(group: tf.EPGroup) -> list[list[tuple[int, int]]]:
    return [shared_out(pid) for pid in range(3)]


def test_the_flags_of_all_ranks_are_shared_out_among_the_ctas(on_ranks: RankPools) -> None:
    """The worked example of `wire.rank_and_flag`: 2 ranks with 5 flags each, 3 CTAs."""
    shares = on_ranks(flags_of_all, 1, env=INTERPRETER)[0]
    assert shares[1] == [(0, 1), (1, 1), (0, 4), (1, 4)]
    assert sorted(itertools.chain(*shares)) == [(rank, flag) for rank in range(2) for flag in range(5)]
