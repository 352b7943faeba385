"""How long a dispatch and its combine take, beside the collective transport and a plain copy.

A figure is that of a CUDA graph which holds one `begin_step` and a chain of round trips, divided by their number. Results are
compared with the reference after the timing, so that what is compared is what was timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any, Final

import torch

from tokenferry import env as env_table
from tokenferry import reference
from tokenferry.benchmarking.host_times import begin_step_and_host_times
from tokenferry.benchmarking.machine import Device, check_gpus, copy_rate, environment
from tokenferry.benchmarking.records import Record, append_record
from tokenferry.benchmarking.round_trip_data import RoundTripPoint, differences, inputs_of, partial_of, wire_bytes
from tokenferry.benchmarking.timing import GroupTimer, Progress
from tokenferry.dispatched import FLOAT8, FORMAT_NAMES, Dispatched, QuantizedRows
from tokenferry.errors import ConfigError, TokenferryError
from tokenferry.groups import EPGroup
from tokenferry.testing import run_ranks
from tokenferry.workspace import Workspace

CHAIN: Final = 20
"""Round trips in a graph."""
REHEARSED_CHAIN: Final = 2
"""On CPUs, where interpreted kernels take half a second for one."""
SEED: Final = 1
QUANTIZED_SUFFIX: Final = "-quantized"
QUANTIZED_BEFORE: Final = "fp8_block128" + QUANTIZED_SUFFIX
ROUND_TRIP_FORMATS: Final = {
    "dispatch": (*FORMAT_NAMES, QUANTIZED_BEFORE),
    "combine": ("same", "fp8_block128", QUANTIZED_BEFORE),
}


def round_trip_points(
    hidden_sizes: Sequence[int],
    tokens: Sequence[int],
    transports: Sequence[str],
    num_ranks: int,
    *,
    capacity: int | None = None,
    exact_too: bool = False,
    formats: Sequence[str] = ("same",),
    combine_formats: Sequence[str] = ("same",),
) -> list[RoundTripPoint]:
    """The points of the usual table.

    Every hidden size and number of tokens; `collective` in both orders of summing; and, for the other transports, one token on
    rank 0 beside the largest number on all others. Points that can share a workspace stand behind one another.

    Args:
        formats: each a dispatch format, or "fp8_block128-quantized": rows that are quantized before the timed part.
        combine_formats: each "same", "fp8_block128" or "fp8_block128-quantized"; all of them with each of `formats`.
        capacity: C of every workspace. Engines open one for their largest step, and then run small ones in it. None: C = T.
        exact_too: of transports other than `collective` the points of C = T too, where `capacity` is larger.

    Raises:
        ConfigError: a number of tokens is larger than `capacity`, or a format is none of these.
    """
    if capacity is not None and max(tokens) > capacity:
        raise ConfigError(f"capacity is {capacity}, but a rank is to bring {max(tokens)} tokens; raise it, or leave these out")
    points = []
    for operation, names in (("dispatch", formats), ("combine", combine_formats)):
        unknown = [name for name in names if name not in ROUND_TRIP_FORMATS[operation]]
        if unknown:
            raise ConfigError(f"a {operation} format is one of {', '.join(ROUND_TRIP_FORMATS[operation])}; got {unknown[0]!r}")
    for transport, given, combined in product(transports, formats, combine_formats):
        orders = ("rank", "any") if transport == "collective" else ("rank",)
        for hidden_size in hidden_sizes:
            cases = [((count,) * num_ranks, order, capacity) for order in orders for count in tokens]
            if transport != "collective":
                cases.append(((1,) + (max(tokens),) * (num_ranks - 1), "rank", capacity))
                cases += [(counts, order, None) for counts, order, _ in cases if exact_too and max(counts) != capacity]
            points += [
                RoundTripPoint(
                    transport=transport,
                    hidden_size=hidden_size,
                    tokens=counts,
                    capacity=rows or max(counts),
                    combine_order=order,
                    dispatch_format=given.removesuffix(QUANTIZED_SUFFIX),
                    quantized=given.endswith(QUANTIZED_SUFFIX),
                    combine_format=combined.removesuffix(QUANTIZED_SUFFIX),
                    quantized_terms=combined.endswith(QUANTIZED_SUFFIX),
                )
                for counts, order, rows in cases
            ]
    return points


def run_round_trips(
    points: Sequence[RoundTripPoint],
    num_ranks: int,
    *,
    device: Device = "cuda",
    timeout_s: float = 600.0,
    output: Path | None = None,
    commit: str = "unknown",
    progress: Progress | None = None,
) -> list[Record]:
    """Measures the points on `num_ranks` GPUs of this machine, in one process a rank. Call it under `if __name__ == "__main__"`.

    Args:
        points: each with as many `tokens` as there are ranks.
        device: "cpu" makes the same calls and comparisons, a few of each, over gloo, and for p2p by Triton's interpreter; its
            times say nothing.
        timeout_s: deadline of the whole run.
        output: a file that the records replace, each written as soon as it is there.
        commit: of the code that is measured, for the file.
        progress: gets a line before each point; see `Progress`.

    Returns:
        A record for each point with `round_trip_us`, `spread_us`, `gb_per_s` and `correct`, or `error` where the transport could
        not serve it; before them on GPUs, if a point is of p2p, one with the host's times. `at_s`: seconds from the ranks' start.

    Raises:
        DeviceError: there are fewer GPUs than ranks.
        RankFailedError: a rank failed.
    """
    check_gpus(num_ranks, device)
    if output is not None:
        output.write_text("")
    backend: Any = "nccl" if device == "cuda" else "gloo"
    env = {"TRITON_INTERPRET": "1"} if device == "cpu" else None
    arguments = (points, progress, output, commit)
    records: list[Record] = run_ranks(_measure_all, num_ranks, *arguments, backend=backend, timeout_s=timeout_s, env=env)[0]
    return records


def _measure_all(
    group: EPGroup,
    points: Sequence[RoundTripPoint],
    progress: Progress | None,
    output: Path | None = None,
    commit: str = "unknown",
) -> list[Record]:
    started_s, records = time.monotonic(), list[Record]()
    for found in _measured(GroupTimer(group, progress=progress), points):
        records.append({**found, "world_size": group.size, "at_s": round(time.monotonic() - started_s, 1)})
        if group.rank == 0 and output is not None:
            append_record({**records[-1], "commit": commit}, output)
    return records


def _measured(timer: GroupTimer, points: Sequence[RoundTripPoint]) -> Iterator[Record]:
    """The records of `run_round_trips`, each as soon as it is there."""
    group, copy_gb_per_s = timer.group, copy_rate(timer)
    if group.device.type == "cuda" and any(point.transport == "p2p" for point in points):
        point = RoundTripPoint(transport="p2p", hidden_size=7168, tokens=(8,) * group.size, capacity=8)
        times = begin_step_and_host_times(timer, point, CHAIN)
        yield {"transport": "p2p", "what": "parts", **times, **environment(group.device)}
    numbered = enumerate(points, start=1)
    for _, alike in groupby(numbered, key=lambda pair: _workspace_of(pair[1])):
        yield from _measure_in_one(timer, list(alike), len(points), copy_gb_per_s)


def _workspace_of(point: RoundTripPoint) -> RoundTripPoint:
    """Equal for points that the same workspace serves."""
    return replace(point, tokens=(), in_place=True, quantized=False, quantized_terms=False)


def _measure_in_one(
    timer: GroupTimer, numbered: Sequence[tuple[int, RoundTripPoint]], num_points: int, copy_gb_per_s: float
) -> Iterator[Record]:
    """A record for each of the points, whose workspace is opened once, and after an error again."""
    with ExitStack() as stack:
        ws: Workspace | None = None
        for number, point in numbered:
            tokens = "x".join(map(str, point.tokens))
            said = f"{point.transport}, C {point.capacity}, hidden size {point.hidden_size}, tokens {tokens}"
            timer.say(f"point {number} of {num_points}: {said}")
            try:
                ws = ws or stack.enter_context(opened(timer.group, point))
                yield asdict(point) | measure_in(ws, timer, point, copy_gb_per_s) | environment(timer.group.device)
            except TokenferryError as error:
                stack.close()
                ws = None
                yield {**asdict(point), "error": f"{type(error).__name__}: {error}"}


def measure_in(ws: Workspace, timer: GroupTimer, point: RoundTripPoint, copy_gb_per_s: float = 0.0) -> Record:
    """The figures of one point, the same on every rank, in a workspace that `opened` gave for it or for one that differs in its
    tokens alone. Collective over the timer's group."""
    median_us, spread_us, got, out = _time_chain(timer, ws, point)
    ws.check()
    correct = not differences(point, timer.group.rank, SEED, got, out)
    timer.meet()
    num_bytes = wire_bytes(point, timer.group.rank)
    gb_per_s = num_bytes / median_us / 1e3
    return {
        "round_trip_us": round(median_us, 2),
        "spread_us": round(spread_us, 2),
        "wire_bytes": num_bytes,
        "gb_per_s": round(gb_per_s, 1),
        "copy_gb_per_s": round(copy_gb_per_s, 1),
        "of_copy": round(gb_per_s / copy_gb_per_s, 3) if copy_gb_per_s else None,
        "correct": timer.slowest(not correct) == 0,
    }


def _time_chain(timer: GroupTimer, ws: Workspace, point: RoundTripPoint) -> tuple[float, float, Any, torch.Tensor]:
    rank, device = timer.group.rank, timer.group.device
    inputs, dispatcher = inputs_of(point, rank, SEED, device), ws.dispatcher()
    num_tokens, num_valid = point.tokens[rank], sum(point.tokens)
    is_symmetric = ws.transport in ("p2p", "nvls")
    num_rows = point.capacity * timer.group.size if is_symmetric else num_valid
    partial: Any = torch.full((num_rows, point.hidden_size), torch.nan, dtype=torch.bfloat16, device=device)
    partial[:num_valid] = partial_of(point, rank, SEED, device)
    if point.quantized_terms:
        partial = reference.quantize(partial)
    # In debug mode a combine poisons its input in the workspace, and what was gathered.
    is_poisoned = env_table.read(env_table.DebugSettings).enabled
    if is_symmetric and point.in_place and not is_poisoned and point.quantized_terms == (point.combine_dtype == FLOAT8):
        ws.begin_step(num_tokens)
        dispatcher.dispatch(inputs.hidden, inputs.topk_idx, inputs.topk_weights)
        partial = _filled(dispatcher.combine_input(), partial)
        dispatcher.combine(partial)
    results: list[Any] = []
    length = CHAIN if device.type == "cuda" else REHEARSED_CHAIN

    def chain() -> None:
        ws.begin_step(num_tokens)
        for _ in range(length):
            got = dispatcher.dispatch(inputs.hidden, inputs.topk_idx, inputs.topk_weights)
            arrived = _copied(got) if is_poisoned else got
            out = dispatcher.combine(partial, got)
        results[:] = [arrived, out]

    median_us, spread_us = timer.time_graph(chain, length)
    timer.synchronize()
    return median_us, spread_us, *results


def _copied(got: Dispatched) -> Dispatched:
    return replace(got, hidden=got.hidden.clone(), topk_idx=got.topk_idx.clone(), topk_weights=got.topk_weights.clone())


def _filled(place: Any, partial: Any) -> Any:
    """`combine_input()` with these rows in it."""
    if not isinstance(partial, QuantizedRows):
        return place.copy_(partial)
    place.values.view(torch.uint8).copy_(partial.values.view(torch.uint8))
    place.scales.copy_(partial.scales)
    return place


@contextmanager
def opened(group: EPGroup, point: RoundTripPoint) -> Iterator[Workspace]:
    """A workspace for the point."""
    counts: Any = "equal" if point.transport == "collective" else "uneven"
    order: Any = point.combine_order
    with Workspace(
        point.config,
        group,
        max_tokens_per_rank=point.capacity,
        transport=point.transport,
        dispatch_format=point.dispatch_format,
        combine_dtype=point.combine_dtype,
        combine_order=order,
        counts=counts,
    ) as ws:
        yield ws
