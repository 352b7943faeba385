"""Rows of other formats over symmetric memory, interpreted: in slots and in bulk, the bits of the reference."""

import dataclasses

import pytest
import torch

import switch
import tokenferry as tf
from cases import Case, run_case
from formats import FORMATS, POWERS, difficult_rows_on_their_way, plain
from rank_pool import RankPools
from tokenferry.dispatched import RowFormat
from tokenferry.testing import run_ranks
from tokenferry.transports.base import StepTensors, Transport, TransportSettings

from .test_few_tokens import FewTokensOnly

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}


def many(group: tf.EPGroup, cases: list[Case]) -> list[int]:
    return [run_case(group, case) for case in cases]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_named_formats_give_the_bits_of_the_reference(world_size: int) -> None:
    cases = [dataclasses.replace(case, transport="p2p", counts="uneven") for size, case in FORMATS.values() if size == world_size]
    expected = [sum(step.layers for step in case.steps) for case in cases]
    assert run_ranks(many, world_size, cases, env=INTERPRETER, timeout_s=120) == [expected] * world_size


@pytest.mark.parametrize(
    ("dtype", "dispatch_format"),
    [
        (torch.bfloat16, "fp8_block128"),
        pytest.param(torch.float16, "fp8_block128", marks=pytest.mark.long),
        (torch.float32, POWERS),
    ],
    ids=["bfloat16", "float16", "float32-powers-of-two"],
)
def test_the_sending_kernel_quantizes_difficult_rows(
    on_ranks: RankPools, dtype: torch.dtype, dispatch_format: str | RowFormat
) -> None:
    assert on_ranks(difficult_rows_on_their_way, 2, dtype, dispatch_format, env=INTERPRETER) == [[], []]


@dataclasses.dataclass(frozen=True)
class SmallSlots:
    """For `Workspace(transport=...)`: `p2p` with slots for a few rows, so that few rows are bulk already."""

    multicast: bool = False
    name: str = "p2p"

    def open(self, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
        from tokenferry.transports.symmetric.transport import SymmetricTransport

        return SymmetricTransport(settings, step_tensors, slot_rows=3, multicast=self.multicast)


def slots_and_bulk(world_size: int, dispatch_format: str | RowFormat, **changed: object) -> Case:
    """Steps in slots before, between and after bulk ones, of several layers each, so that every round stands beside one of the
    other kind."""
    empty = (0,) * (world_size - 1)
    bulk, few = (7, *empty), (3,) * world_size
    steps = (
        plain(few, layers=2),
        plain(bulk, layers=2),
        plain((*empty, 7), halves=True, quantized=True),
        plain(few, layers=2, own_buffer=True, quantized=True),
        plain((0,) * world_size, layers=2),
        plain((2, *empty), layers=3),
        plain(bulk, supplied=(4, *empty), own_buffer=True),
    )
    return Case(dispatch_format=dispatch_format, capacity=7, transport=SmallSlots(), steps=steps, **changed)


def nbytes(group: tf.EPGroup, dispatch_format: str) -> tuple[int, int]:
    config = tf.MoEConfig(hidden_size=272, num_experts=4, topk=2)
    settings = {"transport": "p2p", "dispatch_format": dispatch_format, "index_dtype": torch.int64}
    with tf.Workspace(config, group, max_tokens_per_rank=9, **settings) as ws:
        return tf.Workspace.required_bytes(config, group.size, 9, **settings), ws.nbytes


@pytest.mark.parametrize("dispatch_format", ["fp8_block128", "bytes"])
def test_required_bytes_are_those_of_the_open_workspace(on_ranks: RankPools, dispatch_format: str) -> None:
    for required, held in on_ranks(nbytes, 2, dispatch_format, env=INTERPRETER):
        assert required == held


def over_multicast(group: tf.EPGroup, case: Case) -> int:
    return run_case(group, dataclasses.replace(case, transport=switch.Nvls()))


@pytest.mark.parametrize("dispatch_format", ["fp8_block128", "bytes"])
def test_multicast_carries_each_format(on_ranks: RankPools, dispatch_format: str) -> None:
    steps = (plain((3, 0, 5)), plain((1, 2, 2), quantized=True, halves=True), plain((0, 0, 0)), plain((8, 1, 0)))
    case = Case(hidden_size=272, dispatch_format=dispatch_format, steps=steps)
    assert on_ranks(over_multicast, 3, case, env=INTERPRETER) == [len(steps)] * 3


def debugged(group: tf.EPGroup, case: Case) -> int:
    return run_case(group, case)


@pytest.mark.parametrize("dispatch_format", ["fp8_block128", "bytes"])
def test_debug_mode_poisons_each_format(on_ranks: RankPools, dispatch_format: str) -> None:
    case = slots_and_bulk(2, dispatch_format, hidden_size=272)
    compared = on_ranks(debugged, 2, case, env={**INTERPRETER, "TOKENFERRY_DEBUG": "1"})
    assert compared == [sum(step.layers for step in case.steps)] * 2


MIXED = {
    "fp8-H272": ("fp8_block128", {"hidden_size": 272}),
    "fp8-H512-float32-rows": ("fp8_block128", {"hidden_size": 512, "dtype": torch.float32}),
    "fp8-powers-of-two": (RowFormat("fp8_block128", power_of_two_scales=True), {"hidden_size": 128}),
    "bytes": ("bytes", {}),
    "bytes-in-half-packets": (RowFormat("bytes", row_bytes=40), {}),
}


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)], ids=["EP2", "EP3"])
@pytest.mark.parametrize("name", MIXED)
def test_slots_and_bulk_in_turn(on_ranks: RankPools, name: str, world_size: int) -> None:
    dispatch_format, changed = MIXED[name]
    case = slots_and_bulk(world_size, dispatch_format, **changed)
    assert on_ranks(run_case, world_size, case, env=INTERPRETER) == [sum(step.layers for step in case.steps)] * world_size


@pytest.mark.parametrize("dispatch_format", ["fp8_block128", "bytes"])
def test_launches_for_few_tokens_carry_each_format(on_ranks: RankPools, dispatch_format: str) -> None:
    """One program sees to three flags. In slots are at most two rows, and of bytes none."""
    steps = (
        plain((1, 7), layers=2),
        plain((2, 2), layers=2),
        plain((0, 5), quantized=True, halves=True),
        plain((2, 1)),
    )
    case = Case(hidden_size=256, dispatch_format=dispatch_format, transport=FewTokensOnly(), steps=steps)
    assert on_ranks(run_case, 2, case, env=INTERPRETER) == [sum(step.layers for step in steps)] * 2
