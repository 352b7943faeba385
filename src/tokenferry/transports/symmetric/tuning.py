"""How dispatch and combine are cut into programs: tables that were measured, with their hardware and date, and the choice."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tokenferry.dispatched import FLOAT8
from tokenferry.transports.base import TransportSettings
from tokenferry.transports.symmetric.layout import MAX_PROGRAMS, Layout

THREADS_PER_WARP = 32
MAX_REGISTERS = 64
"""Of a thread of dispatch and combine: with so many, two programs of 16 warps fit on an SM. Left to itself, the assembler aims at
48, and moves words of some forms to local memory and back: of the dispatch with Triton 3.6, of the combine with 3.9."""


MOST_REGISTERS = 128
"""What a thread of a combine of float8 terms takes if it may."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the kernels of one workspace are cut into programs.

    Attributes:
        num_warps: of a dispatch or combine program; each thread handles one packet at a time.
        max_programs: most programs of a launch.
        split: where a round in slots has more packets than a launch has threads, one program of so many only sends; 0: never.
    """

    num_warps: int
    max_programs: int
    split: int = 0

    @property
    def block(self) -> int:
        """Packets of a program at a time."""
        return self.num_warps * THREADS_PER_WARP

    @property
    def num_threads(self) -> int:
        """Packets of a whole launch at a time."""
        return self.block * self.max_programs


@dataclass(frozen=True, kw_only=True)
class Wave:
    """Programs of `num_warps` warps, `programs_per_sm` of them on each SM of the GPU."""

    num_warps: int
    programs_per_sm: int

    def num_threads(self, num_sms: int) -> int:
        """Packets that the whole wave handles at a time."""
        return self.num_warps * THREADS_PER_WARP * self.programs_per_sm * num_sms


@dataclass(frozen=True, kw_only=True)
class TuningTable:
    """What was best on one kind of machine.

    Attributes:
        hardware, date: where and when it was measured; `results` is the file in benchmarks/results/.
        waves: for workspaces whose steps all go in slots, smallest first: the first that has a thread for each packet of the
            largest step is taken.
        largest: for larger steps, and for workspaces whose steps may be bulk.
        few_tokens: for a rank that brings no more packets than this wave has threads, in a workspace that takes a larger one.
        few_shares: (p, q), for the fewest packets first: up to one for p threads of that wave, one program in q is better.
        split: see `Tuning`.
    """

    hardware: str
    date: str
    results: str
    waves: tuple[Wave, ...]
    largest: Wave
    few_tokens: Wave
    few_shares: tuple[tuple[int, int], ...]
    split: int


H100_X2 = TuningTable(
    hardware="2 x H100 80GB HBM3 and 2 x H200, NVLink 4",
    date="2026-11-26",
    results="2xH200-2026-11-26-few-tokens.jsonl",
    waves=(
        Wave(num_warps=4, programs_per_sm=1),
        Wave(num_warps=8, programs_per_sm=1),
        Wave(num_warps=8, programs_per_sm=2),
    ),
    largest=Wave(num_warps=16, programs_per_sm=2),
    few_tokens=Wave(num_warps=8, programs_per_sm=2),
    few_shares=((8, 4), (2, 2), (1, 1)),
    split=2,
)
"""Small programs begin sooner, and large ones keep more packets under way. More than two programs on an SM did not help at any
T from 128 to 4096. At T = 1 the largest wave takes 1.9 microseconds a round trip more than the one for few tokens; at T = 128 and
H = 7168 that one takes 1.7 more than the largest (2xH200-2026-11-26-tune-few-tokens.jsonl). Half of its programs take 0.2 less
at H = 2048 up to T = 32, and 1.1 more at H = 7168 and T = 32 (2xH200-2026-11-26-no-tickets.jsonl). Up to a thread
for each packet small programs are better: rows of fp8_block128 at H = 7168 and T = 64 took 9.0 instead of 10.1, shorter quotients
among the reasons. 100 rows beside 4096 of the other rank, with float8 terms that the combine quantizes, took 5.2 more
(2xH200-2026-11-27-fp8-cuts.jsonl). A split round takes 48.9 instead of 51.8 microseconds at H = 7168 and T = 512, 49.2 if one
program in three sends, and 50.0 if the combine alone is split; at T = 256 all take the same (2 x H100,
2xH100-2026-11-26-split-rounds.jsonl)."""

INTERPRETED = Tuning(num_warps=8, max_programs=1)
"""In the interpreter programs run one after another: the first of two would wait for ever."""


def tuning_for(num_packets: int, num_sms: int, table: TuningTable = H100_X2) -> Tuning:
    """The tuning for steps in slots of at most `num_packets` packets a rank.

    Example:
        On 132 SMs the three waves have 16896, 33792 and 67584 threads: 16897 packets get 8 warps and up to 132 programs.
    """
    fitting = (wave for wave in table.waves if num_packets <= wave.num_threads(num_sms))
    return _as_tuning(next(fitting, table.largest), num_sms)


def choose_tuning(settings: TransportSettings, layout: Layout, table: TuningTable = H100_X2) -> Tuning:
    """The tuning of a workspace, the same on all ranks whose GPUs are alike. Every GPU takes the one table that there is."""
    if settings.group.device.type == "cpu":
        return INTERPRETED
    num_sms = _num_sms(settings)
    packets = layout.slot_rows * packets_per_row(settings)
    if settings.max_tokens_per_rank > layout.slot_rows:
        tuning = _as_tuning(table.largest, num_sms)
    else:
        tuning = tuning_for(packets, num_sms, table)
    is_plain = not settings.dispatch_format.is_quantized and settings.combine_dtype != FLOAT8
    return replace(tuning, split=table.split if is_plain and packets > tuning.num_threads else 0)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Most programs of a launch for steps to which this rank brings at most `max_tokens` rows."""

    max_tokens: int
    max_programs: int


@dataclass(frozen=True, kw_only=True)
class FewTokens:
    """How launches are cut of a rank that brings few rows to a step, in a workspace for larger steps.

    Attributes:
        tuning: of the kernels, and of their largest launch.
        dispatch, combine: their launches, those for the fewest rows first. What brings more than the last one takes is launched
            as in a step of the workspace's largest size. The two differ, since a row has other packets on each way.
    """

    tuning: Tuning
    dispatch: tuple[Cut, ...]
    combine: tuple[Cut, ...]


def choose_few_tokens(
    settings: TransportSettings, layout: Layout, tuning: Tuning, table: TuningTable = H100_X2
) -> FewTokens | None:
    """The second tuning of a workspace, next to `tuning`. None where that is as small, and in the interpreter.

    A rank chooses by its own T. It gets the rows of all its peers too, so that with more ranks it has to have fewer. More rows
    than a slot has make the round a bulk one, which is better cut as `tuning` says.

    Example:
        On 132 SMs the wave has 67584 threads in 264 programs. 2 ranks with H 7168: rows of fp8_block128 have 462 packets each, so
        that up to 18, 73 and 146 of them are dispatched by 66, 132 and 264 programs; bfloat16 terms have 896, and up to 9, 37 and
        75 of them are combined so.
    """
    if settings.group.device.type == "cpu":
        return None
    few = _as_tuning(table.few_tokens, _num_sms(settings))
    if 2 * tuning.num_threads <= few.num_threads:
        return None
    num_peers = max(1, settings.group.size - 1)
    cuts = [(p, few.max_programs // q) for p, q in table.few_shares if few.num_threads // q < tuning.num_threads]

    def cut(packets: int) -> tuple[Cut, ...]:
        return tuple(
            Cut(max_tokens=min(few.num_threads // p // (packets * num_peers), layout.slot_rows), max_programs=programs)
            for p, programs in cuts
        )

    return FewTokens(tuning=few, dispatch=cut(dispatched_packets(settings)), combine=cut(combined_packets(settings)))


def packets_per_row(settings: TransportSettings) -> int:
    """The most threads that a row takes in either operation, with those for its routing."""
    routing = settings.config.topk * 2 // 4 + 1
    return max(dispatched_packets(settings), combined_packets(settings)) + routing


def dispatched_packets(settings: TransportSettings) -> int:
    """Packets that a row has in a slot, each taken by a thread; those that send it are no more. Without its routing."""
    return -(-settings.dispatch_format.wire_bytes(settings.config) // 16)


def combined_packets(settings: TransportSettings) -> int:
    """Threads that send a row of terms, or take its sums."""
    hidden_size = settings.config.hidden_size
    if settings.combine_dtype == FLOAT8:
        return -(-hidden_size // 512) * THREADS_PER_WARP
    return -(-hidden_size * settings.combine_dtype.itemsize // 16)


def max_registers_of(settings: TransportSettings, tuning: Tuning) -> int:
    """Of a thread of the combine. One of float8 terms has 16 sums under way, and gets more where its programs are small."""
    if settings.combine_dtype != FLOAT8:
        return MAX_REGISTERS
    return max(MAX_REGISTERS, min(MOST_REGISTERS, MAX_REGISTERS * 512 // tuning.block))


def _num_sms(settings: TransportSettings) -> int:
    return int(torch.cuda.get_device_properties(settings.group.device).multi_processor_count)


def _as_tuning(wave: Wave, num_sms: int) -> Tuning:
    return Tuning(num_warps=wave.num_warps, max_programs=wave.programs_per_sm * num_sms)


def choose_grid(settings: TransportSettings, layout: Layout, tuning: Tuning, resident: int, *, is_virtual: bool) -> int:
    """Programs of a dispatch or combine launch, from C and EP alone: a graph is captured at one count and replayed at another.

    Args:
        resident: the most programs that the GPU holds at once. One that waits for room could not send what the others wait for.
        is_virtual: whether all ranks share one GPU. Every rank's programs must then be on it at once, beside those of the next
            kernel, which wait there too.
    """
    if settings.group.device.type == "cpu":
        return tuning.max_programs
    limit = min(tuning.max_programs, resident, MAX_PROGRAMS)
    if settings.max_ctas is not None:
        limit = min(limit, settings.max_ctas)
    if is_virtual:
        limit = max(1, limit // (2 * settings.group.size))
    if settings.max_tokens_per_rank > layout.slot_rows:
        return limit
    blocks = -(-layout.slot_rows * packets_per_row(settings) // tuning.block) + 1
    return max(1, min(limit, blocks * max(1, settings.group.size - 1)))
