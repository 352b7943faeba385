"""Telemetry of interpreted symmetric transports: the kernels' own counters, in slots and in bulk rounds."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import switch
import telemetry_work as work
import tokenferry as tf
from rank_pool import RankPools
from telemetry_loads import check_loads_of_random_numbers, loads_of_random_numbers
from tokenferry.kernels import load_counts, round_loads
from tokenferry.testing import run_ranks
from tokenferry.transports.base import StepTensors, Transport, TransportSettings

from .test_few_tokens import FewTokensOnly
from .test_split_rounds import SplitRounds
from .test_symmetric import INTERPRETER

pytestmark = pytest.mark.interpreter


@pytest.mark.alone
@pytest.mark.parametrize("transport", ["p2p", "nvls"])
@pytest.mark.parametrize("within", [False, True], ids=["entering", "within"])
def test_a_delayed_rank_is_found_by_its_waits(transport: str, within: bool) -> None:
    delay_s = 0.5 if within else 0.2  # what an interpreted rank does before its combine may take 50 ms itself
    seen = run_ranks(work.delayed, 2, transport, 1, within, delay_s, env=INTERPRETER)
    work.check_delayed(seen, 1, within, delay_s)


@pytest.mark.alone
def test_of_three_ranks_the_late_one_is_found() -> None:
    work.check_delayed(run_ranks(work.delayed, 3, "p2p", 0, False, 0.2, env=INTERPRETER), 0, within=False, delay_s=0.2)


@pytest.mark.parametrize(("transport", "world_size"), [("p2p", 1), ("p2p", 2), ("nvls", 2)])
def test_loads_and_rows_are_those_counted_by_hand(transport: str, world_size: int) -> None:
    for told in run_ranks(work.counts_by_hand, world_size, transport, env=INTERPRETER):
        work.check_counts_by_hand(told)


@dataclass(frozen=True)
class Rounds:
    """What ranks bring to their steps over a transport: `slot_rows` of 2 and more than two rows make a step's rounds bulk."""

    transport: Any
    steps: tuple[tuple[int, ...], ...]
    hidden_size: int = 256
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FewSlotRows:
    """For `Workspace(transport=...)`: `p2p`, or `nvls` over a stand-in for the switch, with two rows a slot."""

    name: str = "p2p"

    def open(self, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
        return switch.opened(settings, step_tensors, multicast=self.name == "nvls", slot_rows=2)


IN_SLOTS = ((2, 1), (0, 2))
IN_BULK = ((3, 5), (5, 0), (1, 7), (0, 3))
FLOAT8_TERMS = {"combine_dtype": torch.float8_e4m3fn}
LOADS_OF_ROUNDS = {
    "p2p-int64-ids": Rounds("p2p", ((2, 5), (0, 3), (4, 0)), settings={"index_dtype": torch.int64}),
    "p2p-alone-in-bulk": Rounds(FewSlotRows(), ((1,), (7,), (2,), (3,))),
    "p2p-bulk": Rounds(FewSlotRows(), (*IN_SLOTS, *IN_BULK)),
    "p2p-float8-terms": Rounds(FewSlotRows(), (*IN_SLOTS, *IN_BULK), settings=FLOAT8_TERMS),
    "p2p-several-flags": Rounds(FewTokensOnly(), (*IN_BULK, *IN_SLOTS)),
    "p2p-split": Rounds(SplitRounds(), ((5, 6), (1, 5), (8, 8))),
    "p2p-bytes": Rounds(FewSlotRows(), (*IN_SLOTS, *IN_BULK[:2]), settings={"dispatch_format": "bytes"}),
    "nvls-bulk": Rounds(FewSlotRows("nvls"), (*IN_SLOTS, *IN_BULK)),
    "collective": Rounds("collective", ((2, 5), (0, 3), (4, 0), (3, 3))),
    "local": Rounds("local", ((2,), (5,), (0,), (3,))),
}
MORE_LOADS = {
    "p2p-three-ranks-bulk": Rounds(FewSlotRows(), ((2, 1, 0), (3, 0, 5), (0, 4, 1))),
    "p2p-float8-terms-several-flags": Rounds(FewTokensOnly(), (*IN_BULK, *IN_SLOTS), settings=FLOAT8_TERMS),
    "p2p-split-four-programs": Rounds(SplitRounds(programs=4), ((5, 6), (1, 5), (8, 8))),
    "nvls-sum-in-the-switch": Rounds(
        FewSlotRows("nvls"), (*IN_SLOTS, *IN_BULK), settings={"combine_order": "any", "combine_dtype": torch.float32}
    ),
}
"""Numbers of somebody else's experts: the combine counts them on symmetric transports, in slots and in bulk rounds."""


@pytest.mark.parametrize("rounds", LOADS_OF_ROUNDS.values(), ids=LOADS_OF_ROUNDS)
def test_numbers_of_somebody_elses_experts_are_counted(on_ranks: RankPools, rounds: Rounds) -> None:
    config = tf.MoEConfig(hidden_size=rounds.hidden_size, num_experts=8, topk=3)
    arguments = rounds.transport, rounds.steps, config, rounds.settings
    seen = on_ranks(loads_of_random_numbers, len(rounds.steps[0]), *arguments, env=INTERPRETER)
    check_loads_of_random_numbers(seen)


@pytest.mark.long
@pytest.mark.parametrize("rounds", MORE_LOADS.values(), ids=MORE_LOADS)
def test_numbers_in_more_kinds_of_rounds_are_counted(on_ranks: RankPools, rounds: Rounds) -> None:
    test_numbers_of_somebody_elses_experts_are_counted(on_ranks, rounds)


@pytest.mark.parametrize("formats", work.BYTES_OF_ROUNDS.values(), ids=work.BYTES_OF_ROUNDS)
@pytest.mark.parametrize("transport", ["p2p", "nvls"])
def test_bytes_of_rows_and_terms(on_ranks: RankPools, transport: str, formats: tuple[dict[str, Any], int, int]) -> None:
    settings, *sizes = formats
    told = on_ranks(work.bytes_of_rounds, 2, transport, work.TOKENS_OF_ROUNDS, settings, env=INTERPRETER)
    work.check_bytes_of_rounds(told, work.TOKENS_OF_ROUNDS, *sizes)


@triton.jit
def places_of(out, program, programs, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out + lanes, round_loads.places(lanes, program, programs))


@triton.jit
def add_all(ids, loads, num_ids, programs, BLOCK: tl.constexpr):
    for program in range(programs):
        round_loads.add_share(ids, loads, 3, 0, program, programs, num_ids, tl.int32, BLOCK)


@triton.jit
def add_of_program(ids, loads, num_experts, step_counts, rank, size, pid, programs, BLOCK: tl.constexpr):
    round_loads.add_before_flags(ids, loads, num_experts, step_counts, rank, size, pid, programs, 2, tl.int32, 1, BLOCK, 64)


def shares_of_programs(group: tf.EPGroup) -> dict[str, Any]:
    """What the device functions count of given numbers, for one program after another."""
    places = torch.zeros(64, dtype=torch.int32)
    places_of[(1,)](places, 2, 3, BLOCK=64)
    words = torch.zeros(3, dtype=torch.int64)
    ids = torch.tensor([0, 2, 2, -1], dtype=torch.int32)
    add_all[(1,)](ids.data_ptr(), words.data_ptr(), 4, 1, BLOCK=32)
    ids = torch.full((300,), 1, dtype=torch.int32)
    again = torch.zeros(3, dtype=torch.int64)
    add_all[(1,)](ids.data_ptr(), again.data_ptr(), 300, 3, BLOCK=64)
    rows = ROWS_BEFORE_FLAGS
    step_counts = torch.tensor([sum(rows), max(rows), *rows, 0, rows[0], rows[0] + rows[1]], dtype=torch.int32)
    owners = torch.repeat_interleave(torch.arange(3), torch.tensor(rows) * 2).to(torch.int32)
    shares = torch.zeros(4, 3, dtype=torch.int64)
    for pid, words_of_program in enumerate(shares):
        add_of_program[(1,)](owners.data_ptr(), words_of_program.data_ptr(), 3, step_counts, 1, 3, pid, 4, BLOCK=32)
    return {"places": places.tolist(), "words": words.tolist(), "again": again.tolist(), "shares": shares.tolist()}


ROWS_BEFORE_FLAGS = (70, 70, 300)


def test_programs_share_out_the_numbers() -> None:
    """The worked examples of `round_loads`. In bulk a program counts numbers of the peers alone that wait for its first flag."""
    [told] = run_ranks(shares_of_programs, 1, env=INTERPRETER)
    assert told["places"] == [*range(64, 96), *range(160, 192)]
    assert told["words"] == [1, 0, 2]
    assert told["again"] == [0, 300, 0]
    by_source = list(zip(*told["shares"], strict=True))
    assert [sum(shares) for shares in by_source] == [2 * rows for rows in ROWS_BEFORE_FLAGS]
    assert by_source[0][2:] == (0, 0), "70 rows of a thread have two blocks: rank 0 waits for the flags of programs 0 and 1"
    assert min(*by_source[1], *by_source[2]) > 0, "this rank's own anybody counts, and those of a rank with rows for all"


def test_compiled_code_is_counted() -> None:
    work.check_counts_of_compiled_code(run_ranks(work.counts_of_compiled_code, 2, "p2p", env=INTERPRETER))


def test_nothing_is_counted_while_it_is_stopped() -> None:
    assert run_ranks(work.stops_and_starts, 2, "p2p", env=INTERPRETER) == [[1, 1, 2]] * 2


def test_telemetry_that_differs_is_an_error_on_every_rank() -> None:
    """One rank alone would note its waits, with kernels that the others do not have."""
    work.check_differing(run_ranks(work.differing, 2, "p2p", env=INTERPRETER))


@pytest.mark.parametrize("fails", [False, True], ids=["times-out", "fails"])
def test_the_error_of_a_late_rank_says_who_was_late_before(fails: bool) -> None:
    _, reading, num_steps = run_ranks(work.error_of_a_late_rank, 2, "p2p", fails, env=INTERPRETER)[0]
    assert reading.startswith("rank 1 was last to enter in")
    assert num_steps >= 3


@pytest.mark.alone
def test_float8_terms_are_waited_for_by_source() -> None:
    delay_s = 0.5  # what an interpreted rank does before its combine may take 50 ms itself
    seen = run_ranks(work.float8_terms_delayed, 3, 2, "p2p", delay_s, env=INTERPRETER)
    work.check_float8_terms_delayed(seen, 2, delay_s)


@pytest.mark.parametrize(("transport", "world_size"), [("local", 1), ("p2p", 2), ("collective", 2)])
def test_our_own_experts_count_their_rows(transport: str, world_size: int) -> None:
    work.check_loads_of_own_experts(run_ranks(work.loads_of_own_experts, world_size, transport, env=INTERPRETER))


def test_a_trace_has_the_steps_of_both_ranks_on_one_time_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    error_ns = run_ranks(work.traced, 2, "p2p", str(path), env=INTERPRETER)[0]
    work.check_traced(json.loads(path.read_text()), error_ns, "p2p")


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("is_on", [True, False], ids=["on", "off"])
def test_gathered_numbers_are_counted(programs: int, is_on: bool) -> None:
    """Not those of rows behind V, nor -1 or beyond the experts, and nothing while it is off. There are several blocks."""
    assert run_ranks(counted_numbers, 1, programs, is_on, env=INTERPRETER) == [True]


def counted_numbers(group: tf.EPGroup, programs: int, is_on: bool) -> bool:
    num_rows, valid, num_experts, layer = 300, 277, 5, 1
    ids = torch.randint(-1, num_experts + 2, (num_rows, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    loads = torch.zeros(1 + 2 * num_experts, dtype=torch.int64)
    loads[0] = is_on
    arguments = ids, torch.tensor([valid], dtype=torch.int32), loads, num_experts, num_rows, layer
    load_counts.load_counts_kernel[(programs,)](*arguments, K=2, BLOCK=load_counts.BLOCK, PDL=0)
    wanted = [int((ids[:valid] == expert).sum()) * is_on for expert in range(num_experts)]
    return loads.tolist() == [is_on, *[0] * num_experts, *wanted]
