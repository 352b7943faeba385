"""`tokenferry bench layer`: what a whole MoE layer takes beside its floor, the collective transport, and transformers' experts.

Each figure is of a CUDA graph that holds one `begin_step` and a chain of layers on different rows (the same rows again would
find their experts' weights in the cache), divided by their number: the median of several replays, of the slowest rank. The
stages come from a second graph with time stamps between them, which cost about a microsecond each and forbid kernels to begin
early: their sum is more than the total. Results are compared after the timing with plain float32 products of a few rows.

    floor = max(bytes of the touched experts / read bandwidth, their FLOP / GEMM rate) + round trip,   all measured in the run
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenferry.benchmarking.presets import PRESETS, REHEARSAL, Preset
from tokenferry.benchmarking.records import check_output
from tokenferry.benchmarking.roundtrip import Bench, environment
from tokenferry.config import MoEConfig
from tokenferry.dispatched import Dispatched
from tokenferry.errors import ConfigError, DeviceError, TokenferryError
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.groups import EPGroup
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.shared_experts import SharedExperts, SharedExpertsConfig
from tokenferry.testing import run_ranks
from tokenferry.workspace import Workspace

POSITIONS, ROUNDS = 4, 2
"""Different rows in a chain, and how often each comes."""
SAMPLES = 2
"""Rows of each rank that are computed again."""
MAX_WEIGHT_COPY_BYTES = 8 << 30
"""batched_mm copies an expert's weights for each choice of each row; beyond this it is left out."""
TOLERANCE = 4e-2
STAGES = ("shared", "router", "dispatch", "experts", "combine")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure."""

    presets: tuple[Preset, ...]
    tokens: tuple[int, ...]
    transport: str
    budget_s: float
    output: Path | None
    commit: str
    started_s: float
    repeats: int = 9


class TheirExperts(nn.Module):
    """transformers' own function on our weights. It gets the valid rows alone: all ranks bring the same number here."""

    def __init__(self, experts: Experts, function: Callable[..., torch.Tensor], num_valid: int) -> None:
        super().__init__()
        self._owned, self._activation, self._function, self._num_valid = (
            experts.expert_range,
            experts.config.activation,
            function,
            num_valid,
        )
        self.num_experts = len(experts.expert_range)
        self.has_gate, self.has_bias, self.is_transposed = True, experts.config.bias, False
        self.has_post_expert_norm, self.is_concatenated, self._is_expert_parallel = False, True, True
        self.gate_up_proj, self.down_proj = experts.up_proj, experts.down_proj
        self.gate_up_proj_bias, self.down_proj_bias = experts.up_bias, experts.down_bias
        self.config = None

    def _apply_gate(self, up: torch.Tensor) -> torch.Tensor:
        activation = self._activation
        gate, up = (up[..., 0::2], up[..., 1::2]) if activation.interleaved else up.chunk(2, dim=-1)
        if activation.name == "swiglu":
            return F.silu(gate) * up
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return (up + 1) * gate * torch.sigmoid(gate * activation.alpha)

    def forward(self, dispatched: Dispatched, out: torch.Tensor) -> torch.Tensor:
        """See `Experts.forward`."""
        valid = self._num_valid
        local = dispatched.topk_idx[:valid].long() - self._owned.start
        is_own = (local >= 0) & (local < self.num_experts)
        local = torch.where(is_own, local, self.num_experts)
        weights = torch.where(is_own, dispatched.topk_weights[:valid], 0.0)
        out[:valid].copy_(self._function(self, dispatched.hidden[:valid], local, weights))
        return out


def their_functions() -> dict[str, Callable[..., torch.Tensor]]:
    """transformers' experts functions by name; empty without transformers, or if it has them under other names."""
    try:
        from transformers.integrations import moe
    except ImportError:
        return {}
    names = ("grouped_mm", "batched_mm")
    return {name: getattr(moe, f"{name}_experts_forward") for name in names if hasattr(moe, f"{name}_experts_forward")}


class LayerBench:
    """One rank's measurements of one preset."""

    def __init__(self, bench: Bench, preset: Preset, request: Request, rates: dict[str, float]) -> None:
        self.bench, self.group, self.preset, self.request, self.rates = bench, bench.group, preset, request, rates
        self.device = self.group.device
        dtype = torch.bfloat16
        torch.manual_seed(1)
        routing = RouterConfig(hidden_size=preset.hidden_size, num_experts=preset.num_experts, topk=preset.topk, **preset.router)
        self.router = Router(routing, dtype=dtype, device=self.device)
        torch.manual_seed(2 + self.group.rank)
        shape = ExpertsConfig(
            hidden_size=preset.hidden_size,
            intermediate_size=preset.intermediate_size,
            num_experts=preset.num_experts,
            activation=preset.activation,
            bias=preset.bias,
        )
        self.experts = Experts(shape, self.group.expert_range(preset.num_experts), dtype=dtype, device=self.device)
        self.shared: SharedExperts | None = None
        if preset.shared_size:
            shared = SharedExpertsConfig(hidden_size=preset.hidden_size, intermediate_size=preset.shared_size)
            torch.manual_seed(1)
            self.shared = SharedExperts(shared, dtype=dtype, device=self.device)

    def open(self, transport: str) -> Workspace:
        """A workspace for all numbers of tokens of the run."""
        config = MoEConfig(
            hidden_size=self.preset.hidden_size, num_experts=self.preset.num_experts, topk=self.preset.topk, dtype=torch.bfloat16
        )
        counts: Any = "equal" if transport == "collective" else "uneven"
        return Workspace(config, self.group, max_tokens_per_rank=max(self.request.tokens), transport=transport, counts=counts)

    def layer(self, ws: Workspace, experts: nn.Module | None = None) -> MoELayer:
        """The layer on a workspace, with other experts if given."""
        layer = MoELayer(ws, self.router, self.experts, shared_experts=self.shared, shared_overlap="stream")
        if experts is not None:
            layer.experts = experts  # type: ignore[assignment]
        return layer

    def rows(self, rank: int, count: int) -> list[torch.Tensor]:
        """[T, H] for each position of the chain."""
        generator = torch.Generator(self.device).manual_seed(100 + rank)
        shape = (POSITIONS, count, self.preset.hidden_size)
        return list(torch.randn(shape, generator=generator, device=self.device, dtype=torch.bfloat16).unbind())

    # --- measuring --------------------------------------------------------------------------------------------------

    def total(self, ws: Workspace, layer: MoELayer, rows: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        """Microseconds of a layer, and what the layers gave."""
        outputs: list[torch.Tensor] = []

        def chain() -> None:
            ws.begin_step(len(rows[0]))
            outputs[:] = [layer(hidden) for _ in range(ROUNDS) for hidden in rows]

        time_us = self.time(chain, POSITIONS * ROUNDS)
        ws.check()
        return time_us, outputs[-POSITIONS:]

    def round_trip(self, ws: Workspace, layer: MoELayer, rows: list[torch.Tensor]) -> float:
        """Microseconds of dispatch and combine alone, the partial rows standing ready."""
        routing = [layer.router(hidden) for hidden in rows]
        dispatcher = layer.dispatcher

        def chain() -> None:
            ws.begin_step(len(rows[0]))
            for _ in range(ROUNDS):
                for hidden, (weights, idx) in zip(rows, routing, strict=True):
                    got = dispatcher.dispatch(hidden, idx, weights)
                    dispatcher.combine(dispatcher.combine_input(), got)

        return self.time(chain, POSITIONS * ROUNDS)

    def time(self, chain: Callable[[], None], calls: int) -> float:
        """As `Bench.time_graph`; without CUDA one call by the host's clock, for rehearsals."""
        if self.device.type == "cuda":
            median_us, _ = self.bench.time_graph(chain, calls)
            return float(median_us)
        start = time.perf_counter()
        chain()
        return self.bench.slowest((time.perf_counter() - start) * 1e6 / calls)

    def stages(self, ws: Workspace, layer: MoELayer, rows: list[torch.Tensor]) -> dict[str, float]:
        """Microseconds of each stage, by time stamps within a graph."""
        if self.device.type != "cuda":
            return {}
        marks = [[torch.cuda.Event(enable_timing=True, external=True) for _ in range(6)] for _ in rows]
        shared, dispatcher = layer.shared_experts, layer.dispatcher

        def chain() -> None:
            ws.begin_step(len(rows[0]))
            for hidden, mark in zip(rows, marks, strict=True):
                mark[0].record()
                if shared is not None:
                    shared(hidden)
                mark[1].record()
                weights, idx = layer.router(hidden)
                mark[2].record()
                got = dispatcher.dispatch(hidden, idx, weights)
                mark[3].record()
                partial = layer.experts(got, out=dispatcher.combine_input())
                mark[4].record()
                dispatcher.combine(partial, got)
                mark[5].record()

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            chain()
        self.bench.meet()
        graph = torch.cuda.CUDAGraph()
        with ws.capturing(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            chain()
        spans: dict[str, list[float]] = {name: [] for name in STAGES}
        for _ in range(self.request.repeats):
            self.bench.meet()
            graph.replay()
            torch.cuda.synchronize()
            for mark in marks[1:]:  # the ranks come to the first layer apart
                for number, name in enumerate(STAGES):
                    spans[name].append(mark[number].elapsed_time(mark[number + 1]) * 1e3)
        ws.check()
        found = {name: self.bench.slowest(statistics.median(span)) for name, span in spans.items()}
        return {f"{name}_us": round(value, 2) for name, value in found.items()}

    # --- floor and truth --------------------------------------------------------------------------------------------

    def experts_floor(self, count: int) -> dict[str, float]:
        """Bytes and FLOP of this rank's experts (and of its shared expert), the mean over the positions; the slowest rank."""
        preset, owned = self.preset, self.experts.expert_range
        everyone = [self.rows(rank, count) for rank in range(self.group.size)]
        num_touched = num_pairs = 0
        for position in range(POSITIONS):
            idx = self.router(torch.cat([rows[position] for rows in everyone]))[1]
            own = idx[(idx >= owned.start) & (idx < owned.stop)]
            num_touched += own.unique().numel()
            num_pairs += own.numel()
        matrix = 3 * preset.hidden_size * preset.intermediate_size
        shared = 3 * preset.hidden_size * preset.shared_size
        num_bytes = 2 * (matrix * num_touched / POSITIONS + shared)
        flop = 2 * (matrix * num_pairs / POSITIONS + shared * count)
        floor_us = max(num_bytes / self.rates["read_gb_per_s"] / 1e3, flop / self.rates["gemm_tflops"] / 1e6)
        return {
            "touched_mb": round(self.bench.slowest(num_bytes / 1e6), 1),
            "gflop": round(self.bench.slowest(flop / 1e9), 3),
            "experts_floor_us": self.bench.slowest(floor_us),
        }

    @torch.no_grad()
    def expected(self, count: int) -> torch.Tensor:
        """[samples, H] float32: the first rows of this rank's last position, by plain products; each rank adds its experts'."""
        samples = min(SAMPLES, count)
        parts = []
        for rank in range(self.group.size):
            hidden = self.rows(rank, count)[-1][:samples]
            weights, idx = self.router(hidden)
            parts.append(torch.stack([self._plain_row(*row) for row in zip(hidden, weights, idx, strict=True)]).tolist())
        name = self.group.unique_name("bench/expected")
        terms = self.group.channel.exchange(name, parts, 120.0)
        total = torch.tensor([term[self.group.rank] for term in terms], device=self.device).sum(0)
        if self.shared is not None:
            total = total + self.shared(self.rows(self.group.rank, count)[-1][:samples]).float()
        return total

    def _plain_row(self, row: torch.Tensor, weights: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
        experts, owned = self.experts, self.experts.expert_range
        total = torch.zeros(len(row), device=self.device)
        for weight, expert in zip(weights.tolist(), idx.tolist(), strict=True):
            if expert not in owned:
                continue
            local = expert - owned.start
            up = experts.up_proj[local].float() @ row.float()
            up = up if experts.up_bias is None else up + experts.up_bias[local].float()
            down = experts.down_proj[local].float() @ experts.config.activation(up)
            total += weight * (down if experts.down_bias is None else down + experts.down_bias[local].float())
        return total

    def is_right(self, outputs: list[torch.Tensor], expected: torch.Tensor) -> bool:
        """Whether every rank's rows are within the tolerance; a NaN is not."""
        got = outputs[-1][: len(expected)].float()
        worst = float((got - expected).abs().max() / expected.abs().max()) if len(expected) else 0.0
        return self.bench.slowest(0.0 if worst < TOLERANCE else 1.0) == 0.0

    # --- one point --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def point(self, ours: Workspace, theirs: Workspace, count: int) -> dict[str, Any]:
        """One row of the table."""
        rows = self.rows(self.group.rank, count)
        expected = self.expected(count)
        layer = self.layer(ours)
        total_us, outputs = self.total(ours, layer, rows)
        right = {"layer": self.is_right(outputs, expected)}
        round_trip_us = self.round_trip(ours, layer, rows)
        record: dict[str, Any] = self.experts_floor(count)
        record |= {"total_us": round(total_us, 2), "round_trip_us": round(round_trip_us, 2)}
        record["floor_us"] = round(record["experts_floor_us"] + round_trip_us, 2)
        record["experts_floor_us"] = round(record["experts_floor_us"], 2)
        try:
            record |= self.stages(ours, layer, rows)
        except RuntimeError as error:  # no time stamps within graphs here: the rest of the row stands without them
            record["stages_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        collective = self.layer(theirs)
        total_us, outputs = self.total(theirs, collective, rows)
        right["collective"] = self.is_right(outputs, expected)
        record["collective_us"] = round(total_us, 2)
        record["collective_round_trip_us"] = round(self.round_trip(theirs, collective, rows), 2)
        num_valid = count * self.group.size
        pair_bytes = 6 * self.preset.hidden_size * self.preset.intermediate_size
        for name, function in their_functions().items():
            if name == "batched_mm" and num_valid * self.preset.topk * pair_bytes > MAX_WEIGHT_COPY_BYTES:
                record[f"{name}_us"] = None
                continue
            try:
                total_us, outputs = self.total(ours, self.layer(ours, TheirExperts(self.experts, function, num_valid)), rows)
            except (RuntimeError, TypeError) as error:  # another version's function, or one that cannot be captured
                ours.lifecycle.leave_step()
                record |= {f"{name}_us": None, f"{name}_error": f"{type(error).__name__}: {error}".splitlines()[0]}
                continue
            right[name] = self.is_right(outputs, expected)
            record[f"{name}_us"] = round(total_us, 2)
        return record | {"correct": right}


def measured_rates(device: torch.device) -> dict[str, float]:
    """Read bandwidth of a large sum, and the rate of a large bfloat16 product, on this device; of 8 the median."""
    if device.type != "cuda":
        return {"read_gb_per_s": 10.0, "gemm_tflops": 0.01}
    source = torch.zeros(1 << 28, dtype=torch.float32, device=device)
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))

    def timed(work: Callable[[], Any]) -> float:
        times: list[float] = []
        for _ in range(9):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times[1:])

    return {
        "read_gb_per_s": round(source.nbytes / timed(source.sum) / 1e6, 1),
        "gemm_tflops": round(2 * 8192**3 / timed(lambda: left @ right) / 1e9, 1),
    }


def worker(group: EPGroup, request: Request) -> list[dict[str, Any]]:
    """All presets in one process a rank; one record each point, written as it comes by rank 0."""
    bench = Bench(group, repeats=request.repeats) if group.device.type == "cuda" else _Rehearsal(group)
    rates = measured_rates(group.device)
    records: list[dict[str, Any]] = []

    def add(record: dict[str, Any]) -> None:
        common = rates | _environment(group) | {"world_size": group.size, "commit": request.commit}
        records.append({"what": "layer", **record, **common})
        if group.rank == 0 and request.output is not None:
            with request.output.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")

    for preset in request.presets:
        remaining = list(request.tokens)
        named = {"preset": preset.name, "capacity": max(request.tokens)}
        try:
            if bench.slowest(time.time() - request.started_s) < request.budget_s:
                measured = LayerBench(bench, preset, request, rates)
                with measured.open(request.transport) as ours, measured.open("collective") as theirs:
                    for count in request.tokens:
                        if bench.slowest(time.time() - request.started_s) > request.budget_s:
                            break
                        bench.say(f"{preset.name}: {count} tokens a rank")
                        point = measured.point(ours, theirs, count)
                        remaining.remove(count)
                        add({**named, "tokens": count, "transport": ours.transport, **point})
                    bench.meet()
                del measured
        except (TokenferryError, torch.OutOfMemoryError) as error:
            add({**named, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
        if remaining:
            add({**named, "left_out": remaining, "reason": f"budget of {request.budget_s:.0f} s, or the error above"})
        gc.collect()
        torch.cuda.empty_cache()
    return records


class _Rehearsal(Bench):
    """The same without a GPU."""

    def meet(self) -> None:
        self.group.channel.barrier(self.group.unique_name("bench/meet"), 120.0)


def _environment(group: EPGroup) -> dict[str, Any]:
    return environment() if group.device.type == "cuda" else {"gpu": "none (rehearsal)", "torch": torch.__version__}


def show(records: Sequence[dict[str, Any]]) -> str:
    """The table in microseconds, one line a point."""
    columns = ("router", "dispatch", "experts", "combine", "total", "floor", "collective", "grouped_mm", "batched_mm")
    lines = [f"{'preset':<15}{'T':>5}" + "".join(f"{name:>11}" for name in columns) + "  right"]
    for record in records:
        if "tokens" not in record:
            lines.append(f"{record['preset']:<15} {record.get('error') or 'left out: T = ' + str(record['left_out'])}")
            continue
        cells = [record.get(f"{name}_us") for name in columns]
        wrong = [name for name, right in record["correct"].items() if not right]
        figures = "".join(f"{'-' if cell is None else format(cell, '.1f'):>11}" for cell in cells)
        lines.append(f"{record['preset']:<15}{record['tokens']:>5}{figures}  {'no: ' + ', '.join(wrong) if wrong else 'yes'}")
    return "\n".join(lines)


def layer_command(
    ranks: int,
    presets: str,
    tokens: str,
    budget_s: float,
    output: Path | None,
    *,
    transport: str = "p2p",
    commit: str = "unknown",
    rehearse: bool = False,
) -> int:
    """`tokenferry bench layer`: the exit code, 1 if a result was wrong or a preset failed."""
    found = torch.cuda.device_count()
    if not rehearse and found < ranks:
        fewer = f"--ranks {found} at most, or " if found else ""
        needs = f"{ranks} CUDA GPU{'s'[: ranks > 1]}"
        raise DeviceError(f"bench layer needs {needs}, found {found}; give {fewer}--rehearse to try it on CPUs, without times")
    known = {preset.name: preset for preset in (REHEARSAL if rehearse else PRESETS)}
    names = list(known) if presets == "all" else presets.split(",")
    for name in names:
        if name not in known:
            whose = "with --rehearse a preset" if rehearse else "preset"
            raise ConfigError(f"{whose} must be one of {', '.join(known)}, or all of them by 'all'; got {name!r}")
    if not all(count.isdecimal() and int(count) for count in tokens.split(",")):
        raise ConfigError(f"tokens must be positive ints with commas between them, got {tokens!r}")
    check_output(output)
    if output is not None:
        output.write_text("")
    request = Request(
        presets=tuple(known[name] for name in names),
        tokens=(1, 8) if rehearse else tuple(sorted({int(count) for count in tokens.split(",")})),
        transport="collective" if rehearse else transport,
        budget_s=budget_s,
        output=output,
        commit=commit,
        started_s=time.time(),
    )
    backend: Any = "gloo" if rehearse else "nccl"
    records = run_ranks(worker, ranks, request, backend=backend, timeout_s=budget_s + 240.0)[0]
    print(show(records))
    return int(any("error" in record or not all(record.get("correct", {}).values()) for record in records))
