"""`tokenferry bench roundtrip`: how long a dispatch and its combine take, beside the collective transport and a plain copy.

The figure is that of a CUDA graph: one `begin_step` and a chain of round trips, divided by their number; the median of several
replays, of the slowest rank. Results are compared with the reference after the chain, not before.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tokenferry.benchmarking.records import check_output
from tokenferry.config import MoEConfig
from tokenferry.errors import DeviceError, TokenferryError
from tokenferry.groups import EPGroup
from tokenferry.reference import sum_in_rank_order
from tokenferry.testing import run_ranks
from tokenferry.transports.symmetric.buffer import SymmetricBuffer
from tokenferry.workspace import Workspace

COPY_BYTES = 256 << 20
NUM_EXPERTS = 64


@dataclass(frozen=True, kw_only=True)
class Point:
    """One row of the table.

    Attributes:
        tokens: T of every rank.
        capacity: C that the workspace was opened with.
        in_place: whether the partial rows are written into `combine_input()`.
    """

    transport: str
    hidden_size: int
    tokens: tuple[int, ...]
    capacity: int
    topk: int = 8
    combine_order: str = "rank"
    in_place: bool = True


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a rank measured, and what the slowest did."""

    point: Point
    round_trip_us: float
    spread_us: float
    wire_bytes: int
    correct: bool


@dataclass
class Rows:
    """Inputs of one rank."""

    hidden: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


class Bench:
    """The measurements of one rank."""

    def __init__(self, group: EPGroup, *, chain: int = 20, repeats: int = 15) -> None:
        self.group, self.chain, self.repeats = group, chain, repeats

    def say(self, text: str) -> None:
        """A line of progress, once for all ranks: a run takes minutes, and its table comes at the end."""
        if self.group.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def slowest(self, value: float) -> float:
        """The largest of all ranks' values."""
        name = self.group.unique_name("bench/value")
        values: list[float] = self.group.channel.exchange(name, value, 120.0)
        return max(values)

    def meet(self) -> None:
        """All ranks are here, and their devices idle."""
        torch.cuda.synchronize()
        self.group.channel.barrier(self.group.unique_name("bench/meet"), 120.0)

    def time_graph(self, work: Callable[[], Any], calls: int) -> tuple[float, float]:
        """Microseconds for each of the `calls` that `work` makes, replayed as a CUDA graph: median and spread, slowest rank."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # two streams at once in a workspace: its ranks would wait for ever
        with torch.cuda.stream(stream):
            work()
        self.meet()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
        times = []
        for _ in range(self.repeats):
            self.meet()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / calls)
        median = self.slowest(statistics.median(times))
        quartiles = statistics.quantiles(times, n=4)
        return median, self.slowest(quartiles[2] - quartiles[0])

    def copy_ceiling(self) -> float:
        """GB/s of a plain copy into the next rank's memory, all ranks at once."""
        if self.group.size == 1:
            return 0.0
        buffer = SymmetricBuffer(self.group, 2 * COPY_BYTES, self.group.unique_name("bench/copy"), 120.0)
        target = buffer.of_peer((self.group.rank + 1) % self.group.size)[:COPY_BYTES]
        source = buffer.tensor[COPY_BYTES:]
        times = []
        for _ in range(8):
            self.meet()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        self.meet()
        return COPY_BYTES / self.slowest(statistics.median(times)) / 1e6

    def inputs(self, point: Point, rank: int, seed: int) -> Rows:
        """Rank `rank`'s inputs; every rank can make everyone's."""
        generator = torch.Generator(self.group.device).manual_seed(seed * 1000 + rank)
        count, device = point.tokens[rank], self.group.device
        shape = (count, point.topk)
        return Rows(
            torch.randn((count, point.hidden_size), generator=generator, device=device, dtype=torch.bfloat16),
            torch.randint(NUM_EXPERTS, shape, generator=generator, device=device, dtype=torch.int32),
            torch.rand(shape, generator=generator, device=device),
        )

    def partial(self, point: Point, rank: int, seed: int) -> torch.Tensor:
        """Rank `rank`'s partial rows for all tokens."""
        generator = torch.Generator(self.group.device).manual_seed(seed * 1000 + 500 + rank)
        shape = (sum(point.tokens), point.hidden_size)
        return torch.randn(shape, generator=generator, device=self.group.device, dtype=torch.bfloat16)

    def roundtrip(self, point: Point, seed: int = 1) -> Measured:
        """Measures one point and checks what came out of the last round trip."""
        with self.opened(point) as ws:
            rank = self.group.rank
            own = self.inputs(point, rank, seed)
            dispatcher = ws.dispatcher()
            num_tokens, num_valid = point.tokens[rank], sum(point.tokens)
            symmetric = ws.transport in ("p2p", "nvls")
            num_rows = point.capacity * self.group.size if symmetric else num_valid
            partial = torch.full((num_rows, point.hidden_size), torch.nan, dtype=torch.bfloat16, device=self.group.device)
            partial[:num_valid] = self.partial(point, rank, seed)
            if symmetric and point.in_place:
                ws.begin_step(num_tokens)
                dispatcher.dispatch(own.hidden, own.topk_idx, own.topk_weights)
                partial = dispatcher.combine_input().copy_(partial)
                dispatcher.combine(partial)
            results: list[Any] = []

            def chain() -> None:
                ws.begin_step(num_tokens)
                for _ in range(self.chain):
                    got = dispatcher.dispatch(own.hidden, own.topk_idx, own.topk_weights)
                    out = dispatcher.combine(partial, got)
                results[:] = [got, out]

            median, spread = self.time_graph(chain, self.chain)
            torch.cuda.synchronize()
            ws.check()
            correct = not self.differences(point, seed, *results)
            self.meet()
        others = num_valid - num_tokens
        wire_bytes = (
            num_tokens * (self.group.size - 1) * (point.hidden_size * 2 + point.topk * 8) + others * point.hidden_size * 2
        )
        return Measured(
            point=point, round_trip_us=median, spread_us=spread, wire_bytes=wire_bytes, correct=self.slowest(not correct) == 0
        )

    def parts(self, hidden_size: int, count: int) -> dict[str, float]:
        """Microseconds of `begin_step` alone and of the host in an eager call; seconds that opening took."""
        point = Point(transport="p2p", hidden_size=hidden_size, tokens=(count,) * self.group.size, capacity=count)
        start = time.monotonic()
        with self.opened(point) as ws:
            opened_s = time.monotonic() - start
            own, dispatcher = self.inputs(point, self.group.rank, 1), ws.dispatcher()
            shape = (count * self.group.size, hidden_size)
            partial = torch.zeros(shape, dtype=torch.bfloat16, device=self.group.device)  # gathered rows would be copied first
            ws.begin_step(count)
            spans: dict[str, list[float]] = {"begin_step": [], "dispatch": [], "combine": [], "torch_add": []}
            other = torch.zeros(64, device=self.group.device)  # what any call costs on this host
            for _ in range(200):
                marks = [time.perf_counter()]
                ws.begin_step(count)
                marks.append(time.perf_counter())
                got = dispatcher.dispatch(own.hidden, own.topk_idx, own.topk_weights)
                marks.append(time.perf_counter())
                dispatcher.combine(partial, got)
                marks.append(time.perf_counter())
                other.add_(1)
                marks.append(time.perf_counter())
                for name, begin, end in zip(spans, marks, marks[1:], strict=False):
                    spans[name].append(end - begin)
            torch.cuda.synchronize()

            def steps() -> None:
                for _ in range(self.chain):
                    ws.begin_step(count)

            begin_step_us, _ = self.time_graph(steps, self.chain)
            dispatch_us = self.dispatch_alone(ws, own, count)
            torch.cuda.synchronize()
            ws.check()
            self.meet()
        host = {f"host_{name}_us": round(self.slowest(statistics.median(span) * 1e6), 1) for name, span in spans.items()}
        return {"opened_s": round(opened_s, 2), "begin_step_us": round(begin_step_us, 2), "dispatch_us": dispatch_us, **host}

    def dispatch_alone(self, ws: Workspace, own: Rows, count: int) -> float:
        """Microseconds of a dispatch without its combine. Only a combine moves on to the other parity's slots, so every second
        dispatch reads its round from a copy of the counters that is one ahead. Safe where every rank brings rows."""
        from tokenferry.kernels.control_block import COUNTERS_OFFSET, ROUND_OFFSET

        ws.begin_step(count)
        transport: Any = ws.active_transport
        counters = transport.memory.buffer[COUNTERS_OFFSET : COUNTERS_OFFSET + 64].clone().view(torch.int64)
        counters[ROUND_OFFSET // 8] += 1 << 32
        second = transport.viewed_as(dataclasses.replace(transport.view, counters_ptr=counters.data_ptr()))

        def chain() -> None:
            for number in range(self.chain):
                sender = second if number % 2 else transport
                sender.dispatch(0, own.hidden, own.topk_idx, own.topk_weights)

        return round(self.time_graph(chain, self.chain)[0], 2)

    def differences(self, point: Point, seed: int, got: Any, out: torch.Tensor) -> list[str]:
        """What is not as the reference says."""
        everyone = [self.inputs(point, rank, seed) for rank in range(self.group.size)]
        num_valid = sum(point.tokens)
        terms = [self.partial(point, rank, seed) for rank in range(self.group.size)]
        start = sum(point.tokens[: self.group.rank])
        wanted = sum_in_rank_order(terms).to(torch.bfloat16)[start : start + point.tokens[self.group.rank]]
        pairs = {
            "hidden": (got.hidden[:num_valid], torch.cat([rows.hidden for rows in everyone])),
            "topk_idx": (got.topk_idx[:num_valid], torch.cat([rows.topk_idx for rows in everyone])),
            "topk_weights": (got.topk_weights[:num_valid], torch.cat([rows.topk_weights for rows in everyone])),
            "combined": (out, wanted),
        }
        if point.combine_order == "any":
            del pairs["combined"]
        return [f"{name}: {int((a != b).sum())} elements" for name, (a, b) in pairs.items() if not torch.equal(a, b)]

    @contextmanager
    def opened(self, point: Point) -> Iterator[Workspace]:
        """A workspace for the point."""
        config = MoEConfig(hidden_size=point.hidden_size, num_experts=NUM_EXPERTS, topk=point.topk)
        counts = "equal" if point.transport == "collective" else "uneven"
        with Workspace(
            config,
            self.group,
            max_tokens_per_rank=point.capacity,
            transport=point.transport,
            combine_order=point.combine_order,  # type: ignore[arg-type]
            counts=counts,  # type: ignore[arg-type]
        ) as ws:
            yield ws


def points(hidden_sizes: Sequence[int], tokens: Sequence[int], transports: Sequence[str], world_size: int) -> list[Point]:
    """The table: every size with C = T, then one token beside a full peer."""
    table = []
    for transport in transports:
        for hidden_size in hidden_sizes:
            for count in tokens:
                for order in ("rank", "any") if transport == "collective" else ("rank",):
                    table.append(
                        Point(
                            transport=transport,
                            hidden_size=hidden_size,
                            tokens=(count,) * world_size,
                            capacity=count,
                            combine_order=order,
                        )
                    )
            if transport != "collective":
                lonely = (1,) + (max(tokens),) * (world_size - 1)
                table.append(Point(transport=transport, hidden_size=hidden_size, tokens=lonely, capacity=max(tokens)))
    return table


def worker(group: EPGroup, table: Sequence[Point]) -> list[dict[str, Any]]:
    """Measures all points in one process a rank; one record each, the same on every rank."""
    bench = Bench(group)
    ceiling = bench.copy_ceiling()
    records: list[dict[str, Any]] = []
    if any(point.transport == "p2p" for point in table):
        records.append({"transport": "p2p", "what": "parts", **bench.parts(7168, 8), **environment()})
    for number, point in enumerate(table, start=1):
        tokens = "x".join(map(str, point.tokens))
        bench.say(f"point {number} of {len(table)}: {point.transport}, hidden size {point.hidden_size}, tokens {tokens}")
        try:
            measured = bench.roundtrip(point)
        except TokenferryError as error:
            records.append({**asdict(point), "error": f"{type(error).__name__}: {error}"})
            continue
        gbps = measured.wire_bytes / measured.round_trip_us / 1e3
        records.append(
            {
                **asdict(point),
                "round_trip_us": round(measured.round_trip_us, 2),
                "spread_us": round(measured.spread_us, 2),
                "wire_bytes": measured.wire_bytes,
                "gb_per_s": round(gbps, 1),
                "copy_gb_per_s": round(ceiling, 1),
                "of_copy": round(gbps / ceiling, 3) if ceiling else None,
                "correct": measured.correct,
                **environment(),
            }
        )
    return records


def environment() -> dict[str, Any]:
    """Hardware and versions, for every record."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def run(
    world_size: int, hidden_sizes: Sequence[int], tokens: Sequence[int], transports: Sequence[str], timeout_s: float = 600.0
) -> list[dict[str, Any]]:
    """The whole table on `world_size` GPUs of this machine."""
    table = points(hidden_sizes, tokens, transports, world_size)
    start = time.monotonic()
    records: list[dict[str, Any]] = run_ranks(worker, world_size, table, backend="nccl", timeout_s=timeout_s)[0]
    for record in records:
        record["world_size"] = world_size
        record["run_s"] = round(time.monotonic() - start, 1)
    return records


def write(records: Sequence[dict[str, Any]], path: Path, commit: str) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**record, "commit": commit}) + "\n" for record in records))


def show(records: Sequence[dict[str, Any]]) -> str:
    """The table as text."""
    lines = [f"{'transport':<12}{'order':<6}{'H':>6} {'T per rank':<14}{'us':>9}{'±':>7}{'GB/s':>8}{'of copy':>9}  correct"]
    for r in records:
        if "what" in r:
            lines.append(", ".join(f"{name} {value}" for name, value in r.items() if name.endswith(("_us", "_s"))))
            continue
        tokens = "x".join(map(str, r["tokens"]))
        head = f"{r['transport']:<12}{r['combine_order']:<6}{r['hidden_size']:>6} {tokens:<14}"
        if "error" in r:
            lines.append(f"{head} {r['error']}")
            continue
        of_copy = "-" if r["of_copy"] is None else f"{r['of_copy']:.0%}"
        figures = f"{r['round_trip_us']:>9.2f}{r['spread_us']:>7.2f}{r['gb_per_s']:>8.0f}{of_copy:>9}"
        lines.append(f"{head}{figures}  {'yes' if r['correct'] else 'NO'}")
    return "\n".join(lines)


def roundtrip_command(ranks: int, output: Path | None) -> int:
    """`tokenferry bench roundtrip`: the exit code, 1 if a result was wrong."""
    found = torch.cuda.device_count()
    if found < ranks:
        remedy = f"give --ranks {found} at most" if found else "run it on a machine with GPUs"
        raise DeviceError(f"bench roundtrip needs {ranks} CUDA GPU{'s'[: ranks > 1]}, found {found}; {remedy}")
    check_output(output)
    records = run(ranks, (7168, 2048), (1, 8, 32, 128, 512, 4096), ("p2p", "collective"))
    if output is not None:
        write(records, output, "unknown")
    print(show(records))
    return int(not all(record.get("correct", True) for record in records))
