"""How dispatch and combine are cut into programs: tables that were measured, with their hardware and date, and the choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenferry.transports.base import TransportSettings
from tokenferry.transports.symmetric.layout import MAX_PROGRAMS, Layout

THREADS_PER_WARP = 32


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the kernels of one workspace are cut into programs.

    Attributes:
        num_warps: of a dispatch or combine program; each thread handles one packet at a time.
        max_programs: most programs of a launch.
    """

    num_warps: int
    max_programs: int

    @property
    def block(self) -> int:
        """Packets of a program at a time."""
        return self.num_warps * THREADS_PER_WARP


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
        programs_per_sm: most programs of a launch, for each SM.
        waves: for steps in slots, smallest first: the first that has a thread for each packet of the largest step is taken.
        largest_num_warps: for larger steps, and for workspaces whose steps may be bulk.
    """

    hardware: str
    date: str
    results: str
    programs_per_sm: int
    waves: tuple[Wave, ...]
    largest_num_warps: int


H100_X2 = TuningTable(
    hardware="2 x H100 80GB HBM3, NVLink 4",
    date="2026-11-22",
    results="2xH100-2026-11-22-tune.jsonl",
    programs_per_sm=2,
    waves=(Wave(num_warps=4, programs_per_sm=1), Wave(num_warps=8, programs_per_sm=2)),
    largest_num_warps=16,
)
"""Small programs begin sooner, and large ones keep more packets under way. More than two programs on an SM did not help at any
T from 128 to 4096."""

INTERPRETED = Tuning(num_warps=8, max_programs=1)
"""In the interpreter programs run one after another: the first of two would wait for ever."""


def tuning_for(num_packets: int, num_sms: int, table: TuningTable = H100_X2) -> Tuning:
    """The tuning for steps in slots of at most `num_packets` packets a rank.

    Example:
        On 132 SMs the first wave has 16896 threads and the second 67584: 16897 packets get 8 warps and up to 264 programs.
    """
    fitting = (wave.num_warps for wave in table.waves if num_packets <= wave.num_threads(num_sms))
    return Tuning(num_warps=next(fitting, table.largest_num_warps), max_programs=table.programs_per_sm * num_sms)


def choose_tuning(settings: TransportSettings, layout: Layout, table: TuningTable = H100_X2) -> Tuning:
    """The tuning of a workspace, the same on all ranks whose GPUs are alike. Every GPU takes the one table that there is."""
    if settings.group.device.type == "cpu":
        return INTERPRETED
    num_sms = torch.cuda.get_device_properties(settings.group.device).multi_processor_count
    if settings.max_tokens_per_rank > layout.slot_rows:
        return Tuning(num_warps=table.largest_num_warps, max_programs=table.programs_per_sm * num_sms)
    return tuning_for(num_packets(settings, layout), num_sms, table)


def num_packets(settings: TransportSettings, layout: Layout) -> int:
    """Packets that the largest rank of a step in slots sends, or gets back."""
    config = settings.config
    largest = max(config.dtype.itemsize, settings.combine_dtype.itemsize)
    return layout.slot_rows * (config.hidden_size * largest // 16 + config.topk * 2 // 4 + 1)


def choose_grid(settings: TransportSettings, layout: Layout, tuning: Tuning, resident: int, *, is_virtual: bool) -> int:
    """Programs of a dispatch or combine launch, from C and EP alone: a graph is captured at one count and replayed at another.

    Args:
        resident: the most programs that the GPU holds at once. One that waits for room could not send what the others wait for.
        is_virtual: whether all ranks share one GPU. Every rank's programs must then be on it at once, beside those of the next
            kernel, which wait there too.
    """
    if settings.group.device.type == "cpu":
        return INTERPRETED.max_programs
    limit = min(tuning.max_programs, resident, MAX_PROGRAMS)
    if settings.max_ctas is not None:
        limit = min(limit, settings.max_ctas)
    if is_virtual:
        limit = max(1, limit // (2 * settings.group.size))
    if settings.max_tokens_per_rank > layout.slot_rows:
        return limit
    blocks = -(-num_packets(settings, layout) // tuning.block) + 1
    return max(1, min(limit, blocks * max(1, settings.group.size - 1)))
