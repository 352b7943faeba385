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
        fewest_share: one part in so many of that wave's threads, for whose packets half of its programs are better.
        split: see `Tuning`.
    """

    hardware: str
    date: str
    results: str
    waves: tuple[Wave, ...]
    largest: Wave
    few_tokens: Wave
    fewest_share: int
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
    few_tokens=Wave(num_warps=8, programs_per_sm=1),
    fewest_share=4,
    split=2,
)
"""Small programs begin sooner, and large ones keep more packets under way. More than two programs on an SM did not help at any
T from 128 to 4096. At T = 1 the largest wave takes 1.9 microseconds a round trip more than the one for few tokens; at T = 128 and
H = 7168 that one takes 1.7 more than the largest (2xH200-2026-11-26-tune-few-tokens.jsonl). Half of its programs take 0.2 less
at H = 2048 up to T = 32, and 1.1 more at H = 7168 and T = 32 (2xH200-2026-11-26-no-tickets.jsonl). A split
round takes 48.9 instead of 51.8 microseconds at H = 7168 and T = 512, 49.2 if one program in three sends, and 50.0 if the combine
alone is split; at T = 256 all take the same (2 x H100, 2xH100-2026-11-26-split-rounds.jsonl)."""

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
class FewTokens:
    """How launches are cut of a rank that brings at most `max_tokens` rows to a step, in a workspace for larger steps. Up to
    `fewest_tokens` rows half of the programs do."""

    tuning: Tuning
    max_tokens: int
    fewest_tokens: int = -1


def choose_few_tokens(
    settings: TransportSettings, layout: Layout, tuning: Tuning, table: TuningTable = H100_X2
) -> FewTokens | None:
    """The second tuning of a workspace, next to `tuning`. None where that is as small, and in the interpreter.

    A rank chooses between the two by its own T. It gets the rows of all its peers too, so that with more ranks it has to have
    fewer. More rows than a slot has make the round a bulk one, which is better cut as `tuning` says.
    """
    if settings.group.device.type == "cpu":
        return None
    few = _as_tuning(table.few_tokens, _num_sms(settings))
    if few.num_threads >= tuning.num_threads:
        return None
    num_peers = max(1, settings.group.size - 1)
    packets = packets_per_row(settings) * num_peers
    most, fewest = few.num_threads // packets, few.num_threads // table.fewest_share // packets
    return FewTokens(tuning=few, max_tokens=min(most, layout.slot_rows), fewest_tokens=min(fewest, layout.slot_rows))


def packets_per_row(settings: TransportSettings) -> int:
    """Threads that send a row, or take its sums, each a packet; and packets of its routing."""
    config, row_format = settings.config, settings.dispatch_format
    quantized = -(-config.hidden_size // 512) * THREADS_PER_WARP
    plain_bytes = row_format.columns(config) * row_format.dtype(config).itemsize
    dispatched = quantized if row_format.is_quantized else -(-plain_bytes // 16)
    combined = quantized if settings.combine_dtype == FLOAT8 else -(-config.hidden_size * settings.combine_dtype.itemsize // 16)
    return max(dispatched, combined) + config.topk * 2 // 4 + 1


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
