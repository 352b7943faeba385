"""What a whole MoE layer takes beside its floor, the collective transport, and transformers' experts.

Each figure is of a CUDA graph that holds one `begin_step` and a chain of layers on different rows, divided by their number.
Results are compared after the timing with plain float32 products of a few rows.

    floor = max(bytes of the touched experts / read bandwidth, their FLOP / GEMM rate) + round trip,   all measured in the run
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from tokenferry.benchmarking.layer_checks import expected_rows, experts_floor, is_right
from tokenferry.benchmarking.layer_formats import FormatLayers
from tokenferry.benchmarking.layer_model import LayerModel
from tokenferry.benchmarking.layer_times import time_dispatch_and_combine, time_layer, time_stages
from tokenferry.benchmarking.machine import Device, check_gpus, device_rates, environment
from tokenferry.benchmarking.presets import Preset
from tokenferry.benchmarking.records import Record, append_record
from tokenferry.benchmarking.timing import GroupTimer, Laps, Progress
from tokenferry.benchmarking.transformers_experts import TransformersExperts, experts_functions
from tokenferry.errors import TokenferryError
from tokenferry.groups import EPGroup
from tokenferry.testing import run_ranks
from tokenferry.workspace import Workspace

MAX_WEIGHT_COPY_BYTES: Final = 8 << 30
"""batched_mm copies an expert's weights for each choice of each row; beyond this it is left out."""
START_AND_LAST_POINT_S: Final = 240.0
"""What a run may take beyond its budget before it counts as stuck."""


@dataclass(frozen=True, kw_only=True)
class LayerRequest:
    """What `run_layer` measures.

    Attributes:
        presets: the layers, one after another, with random weights.
        tokens: T of every rank, one point each. All points of a preset share a workspace of the largest.
        transport: beside which `collective` is measured too.
        budget_s: no point begins later than this after the start; what is left out gets a record that says so.
        repeats: replays of each graph, of which the median counts.
        commit: of the code that is measured, for the records.
        float8: layers with float8 weights instead, once for each way in which rows and terms travel; see `layer_formats`.
        float8_too: names of presets that are measured with float8 weights too, made of the same bfloat16 ones, in records of
            their own behind the preset's others.
    """

    presets: tuple[Preset, ...]
    tokens: tuple[int, ...]
    transport: str = "p2p"
    budget_s: float = 200.0
    repeats: int = 9
    commit: str = "unknown"
    float8: bool = False
    float8_too: tuple[str, ...] = ()


def run_layer(
    request: LayerRequest,
    num_ranks: int,
    *,
    device: Device = "cuda",
    output: Path | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Measures layers on `num_ranks` GPUs of this machine, in one process a rank. Call it under `if __name__ == "__main__"`.

    Args:
        device: "cpu" makes the same calls and comparisons over gloo (give `transport="collective"`); its times say nothing.
        output: a file that the records replace, each written as soon as it is there.
        progress: gets a line before each point; see `Progress`.

    Returns:
        A record for each point: `total_us`, the stages, `floor_us`, `collective_us`, transformers' functions by name, and
        `correct` for each of them; `seconds` says what measuring it took, weights and workspaces included in a preset's first.
        Records with `error` or `left_out` stand for points that were not measured.

    Raises:
        DeviceError: there are fewer GPUs than ranks.
        RankFailedError: a rank failed.
    """
    check_gpus(num_ranks, device)
    if output is not None:
        output.write_text("")
    backend: Any = "nccl" if device == "cuda" else "gloo"
    timeout_s = request.budget_s + START_AND_LAST_POINT_S
    arguments = (request, time.time(), output, progress)
    records: list[Record] = run_ranks(_measure_all, num_ranks, *arguments, backend=backend, timeout_s=timeout_s)[0]
    return records


@dataclass(frozen=True)
class _Run:
    """What all points of a run share."""

    timer: GroupTimer
    request: LayerRequest
    rates: dict[str, float]
    started_s: float

    def is_late(self) -> bool:
        """Whether the budget is spent, on any rank. Collective."""
        return self.timer.slowest(time.time() - self.started_s) >= self.request.budget_s


def _measure_all(
    group: EPGroup, request: LayerRequest, started_s: float, output: Path | None, progress: Progress | None
) -> list[Record]:
    run = _Run(GroupTimer(group, repeats=request.repeats, progress=progress), request, device_rates(group.device), started_s)
    common = run.rates | environment(group.device) | {"world_size": group.size, "commit": request.commit}
    records: list[Record] = []
    for preset in request.presets:
        named = {"what": "layer", "preset": preset.name, "capacity": max(request.tokens)}
        for found in _measure_preset(run, preset):
            records.append(named | found | common)
            if group.rank == 0 and output is not None:
                append_record(records[-1], output)
        gc.collect()
        torch.cuda.empty_cache()
    return records


def _measure_preset(run: _Run, preset: Preset) -> Iterator[Record]:
    """The preset's records, with its weights as they are and then in float8, as asked for. The weights are made once."""
    request, bfloat16_us, weights = run.request, dict[int, float](), list[LayerModel]()

    def model_of(float8: bool) -> LayerModel:
        if not weights:
            weights.append(LayerModel(run.timer.group, preset, max(request.tokens)))
        if float8:
            weights[0].quantize()
        return weights[0]

    for float8 in (False, True) if preset.name in request.float8_too else (request.float8,):
        name = f"{preset.name} in float8" if float8 else preset.name
        for record in _measure_points(run, name, partial(model_of, float8), bfloat16_us):
            if "total_us" in record and not preset.mxfp4:  # whose layer is of packed weights
                bfloat16_us[record["tokens"]] = record["total_us"]
            yield {"float8": float8, **record}


def _measure_points(
    run: _Run, name: str, make_model: Callable[[], LayerModel], bfloat16_us: Mapping[int, float]
) -> Iterator[Record]:
    """A record for each point, then what went wrong, then what was left out."""
    request, remaining, laps = run.request, list(run.request.tokens), Laps()
    try:
        if not run.is_late():
            model = make_model()
            laps.mark("weights")
            with ExitStack() as stack:
                measure, transport = _measurement(run, model, stack, bfloat16_us)
                laps.mark("workspaces")
                for count in request.tokens:
                    if run.is_late():
                        break
                    run.timer.say(f"{time.time() - run.started_s:.0f} s: {name}, {count} tokens a rank")
                    point = measure(count)
                    remaining.remove(count)
                    yield {"tokens": count, "transport": transport, **point, "seconds": {**laps.seconds, **point["seconds"]}}
                    laps.seconds.clear()
                run.timer.meet()
    except (TokenferryError, torch.OutOfMemoryError) as error:
        yield {"error": _first_line(error)}
    if remaining:
        yield {"left_out": remaining, "reason": f"budget of {request.budget_s:.0f} s, or the error above"}


def _measurement(
    run: _Run, model: LayerModel, stack: ExitStack, bfloat16_us: Mapping[int, float]
) -> tuple[Callable[[int], Record], str]:
    """What measures a point of the model, and the transport. Collective."""
    transport = run.request.transport
    if model.float8:
        layers = FormatLayers(model, transport, stack, bfloat16_us)
        return (lambda count: layers.measure(run.timer, count, run.rates)), layers.transport
    ours, collective = (stack.enter_context(model.open(name)) for name in (transport, "collective"))
    return (lambda count: measure_point(run.timer, model, ours, collective, count, run.rates)), ours.transport


@torch.no_grad()
def measure_point(
    timer: GroupTimer, model: LayerModel, ours: Workspace, collective: Workspace, count: int, rates: dict[str, float]
) -> Record:
    """One row of the table: the layer on `ours` and on `collective`, with `count` tokens on every rank. Collective."""
    laps = Laps()
    rows, expected = model.rows(timer.group.rank, count), expected_rows(model, count)
    laps.mark("expected")
    layer = model.layer(ours)
    total_us, outputs = time_layer(timer, ours, layer, rows)
    right = {"layer": is_right(timer, outputs, expected)}
    laps.mark("layer")
    round_trip_us = time_dispatch_and_combine(timer, ours, layer, rows)
    record: Record = experts_floor(timer, model, count, rates)
    record |= {"total_us": round(total_us, 2), "round_trip_us": round(round_trip_us, 2)}
    record["floor_us"] = round(record["experts_floor_us"] + round_trip_us, 2)
    record["experts_floor_us"] = round(record["experts_floor_us"], 2)
    laps.mark("floor")
    try:
        record |= time_stages(timer, ours, layer, rows)
    except RuntimeError as error:  # no time stamps within graphs here: the rest of the row stands without them
        record["stages_error"] = _first_line(error)
    laps.mark("stages")
    layer = model.layer(collective)
    total_us, outputs = time_layer(timer, collective, layer, rows)
    right["collective"] = is_right(timer, outputs, expected)
    record["collective_us"] = round(total_us, 2)
    laps.mark("collective")
    record |= _transformers_times(timer, model, ours, rows, expected, right, laps)
    return record | {"correct": right, "seconds": laps.seconds}


def _transformers_times(
    timer: GroupTimer,
    model: LayerModel,
    ws: Workspace,
    rows: list[torch.Tensor],
    expected: torch.Tensor,
    right: dict[str, bool],
    laps: Laps,
) -> Record:
    """The layer with each of transformers' functions as its experts. Adds to `right` whether they gave the expected rows."""
    num_valid, preset, record = len(rows[0]) * timer.group.size, model.preset, dict[str, Any]()
    weight_bytes = 6 * preset.hidden_size * preset.intermediate_size
    for name, function in experts_functions().items():
        record[f"{name}_us"] = None
        if name == "batched_mm" and num_valid * preset.topk * weight_bytes > MAX_WEIGHT_COPY_BYTES:
            continue
        layer = model.layer(ws, TransformersExperts(model.bfloat16_experts, function, num_valid))
        try:
            total_us, outputs = time_layer(timer, ws, layer, rows)
        except (RuntimeError, TypeError) as error:  # another version's function, or one that cannot be captured
            ws.lifecycle.leave_step()
            record[f"{name}_error"] = _first_line(error)
            continue
        right[name] = is_right(timer, outputs, expected)
        record[f"{name}_us"] = round(total_us, 2)
        laps.mark(name)
    return record


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
