"""How a call is timed: as a CUDA graph, replayed several times, the median of the slowest rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch

from tokenferry.graph_capture import captured
from tokenferry.groups import EPGroup

Progress = Callable[[str], None]
"""Gets a line of text as a run goes on. Rank 0 calls it in its own process, so that it must be picklable: no lambda."""

MEETING_TIMEOUT_S: Final = 120.0
WARM_UP_US: Final = 100_000.0
MAX_WARM_UP: Final = 200
"""How long, and at most how often, a graph is replayed before it is timed. The first graphs of a process took up to 15 % longer
than the same ones a second later: 57 instead of 49 microseconds a layer at T = 1, 2 x H200, 2026-11-26."""


class GroupTimer:
    """Times calls that all ranks of a group make together.

    Without CUDA it makes the same calls and gives times of the host's clock: enough for a rehearsal, and no measurement.

    Args:
        group: its ranks all make a `GroupTimer`, and then call the same methods in the same order.
        repeats: replays of a graph, of which the median counts. At least 2.
        progress: called on rank 0 with what `say` is given.
    """

    def __init__(self, group: EPGroup, *, repeats: int = 15, progress: Progress | None = None) -> None:
        self.group, self.repeats = group, repeats
        self._progress = progress

    def say(self, text: str) -> None:
        """A line of progress, once for all ranks: a run takes minutes, and its table comes at the end."""
        if self._progress is not None and self.group.rank == 0:
            self._progress(text)

    def slowest(self, value: float) -> float:
        """The largest of all ranks' values, on every rank."""
        name = self.group.unique_name("bench/value")
        values: list[float] = self.group.channel.exchange(name, value, MEETING_TIMEOUT_S)
        return max(values)

    def synchronize(self) -> None:
        """Returns once this rank's device has nothing left to do."""
        if self.group.device.type == "cuda":
            torch.cuda.synchronize(self.group.device)

    def meet(self) -> None:
        """Returns once all ranks are here with idle devices."""
        self.synchronize()
        self.group.channel.barrier(self.group.unique_name("bench/meet"), MEETING_TIMEOUT_S)

    def time_graph(self, work: Callable[[], Any], calls: int) -> tuple[float, float]:
        """Captures `work` once and replays it.

        Returns:
            Microseconds for each of the `calls` that `work` makes: the median, and the distance of the quartiles; of both the
            slowest rank's. What `work` returned or kept last is as the last replay left it.
        """
        if self.group.device.type != "cuda":
            return self._time_once(work, calls), 0.0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # a workspace in use on two streams at once waits for ever
        with torch.cuda.stream(stream):
            work()
        self.meet()
        graph = torch.cuda.CUDAGraph()
        with captured(graph, stream=stream):
            work()
        self.meet()
        once_us = self.slowest(elapsed_us(graph.replay))
        for _ in range(min(MAX_WARM_UP, int(WARM_UP_US / once_us))):  # as often on all ranks
            graph.replay()
        times = []
        for _ in range(self.repeats):
            self.meet()
            graph.replay()  # the ranks come to this one apart; the next follows it without a gap
            times.append(elapsed_us(graph.replay) / calls)
        quartiles = statistics.quantiles(times, n=4)
        return self.slowest(statistics.median(times)), self.slowest(quartiles[2] - quartiles[0])

    def _time_once(self, work: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        work()
        return self.slowest((time.perf_counter() - start) * 1e6 / calls)


class Laps:
    """Where a benchmark's own time goes: seconds between one mark and the next, by name."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()
        self.seconds: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Adds the seconds since the last mark to those under `name`."""
        now_s = time.monotonic()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now_s - self._last_s, 2)
        self._last_s = now_s


def elapsed_us(work: Callable[[], Any]) -> float:
    """Microseconds that the current CUDA stream spends on what `work` issues. Returns when the device is idle."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3
