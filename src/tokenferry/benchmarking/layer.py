"""What a whole MoE layer takes beside its floor, the collective transport, and transformers' experts.

Each figure is of a CUDA graph that holds one `begin_step` and a chain of layers on different rows, divided by their number.
Results are compared after the timing with plain float32 products of a few rows.

    floor = max(bytes of the touched experts / read bandwidth, their FLOP / GEMM rate) + round trip,   all measured in the run
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
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
from tokenferry.benchmarking.timing import GroupTimer, Progress
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
        float8: layers with float8 weights instead, once for each dispatch format; see `layer_formats`.
    """

    presets: tuple[Preset, ...]
    tokens: tuple[int, ...]
    transport: str = "p2p"
    budget_s: float = 200.0
    repeats: int = 9
    commit: str = "unknown"
    float8: bool = False


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
        `correct` for each of them. Records with `error` or `left_out` stand for points that were not measured.

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


def _measure_all(
    group: EPGroup, request: LayerRequest, started_s: float, output: Path | None, progress: Progress | None
) -> list[Record]:
    timer = GroupTimer(group, repeats=request.repeats, progress=progress)
    rates = device_rates(group.device)
    common = rates | environment(group.device) | {"world_size": group.size, "commit": request.commit}
    records: list[Record] = []
    for preset in request.presets:
        named = {"what": "layer", "preset": preset.name, "capacity": max(request.tokens), "float8": request.float8}
        for found in _measure_preset(timer, request, preset, rates, started_s):
            records.append(named | found | common)
            if group.rank == 0 and output is not None:
                append_record(records[-1], output)
        gc.collect()
        torch.cuda.empty_cache()
    return records


def _measure_preset(
    timer: GroupTimer, request: LayerRequest, preset: Preset, rates: dict[str, float], started_s: float
) -> Iterator[Record]:
    """A record for each point, then what went wrong, then what was left out."""
    remaining = list(request.tokens)

    def is_late() -> bool:
        return timer.slowest(time.time() - started_s) >= request.budget_s

    try:
        if not is_late():
            model = LayerModel(timer.group, preset, max(request.tokens), float8=request.float8)
            with ExitStack() as stack:
                measure, transport = _measurement(timer, model, request.transport, stack, rates)
                for count in request.tokens:
                    if is_late():
                        break
                    timer.say(f"{preset.name}: {count} tokens a rank")
                    point = measure(count)
                    remaining.remove(count)
                    yield {"tokens": count, "transport": transport, **point}
                timer.meet()
    except (TokenferryError, torch.OutOfMemoryError) as error:
        yield {"error": _first_line(error)}
    if remaining:
        yield {"left_out": remaining, "reason": f"budget of {request.budget_s:.0f} s, or the error above"}


def _measurement(
    timer: GroupTimer, model: LayerModel, transport: str, stack: ExitStack, rates: dict[str, float]
) -> tuple[Callable[[int], Record], str]:
    """What measures a point of the model, and the transport. Collective."""
    if model.float8:
        layers = FormatLayers(model, transport, stack)
        return (lambda count: layers.measure(timer, count, rates)), layers.transport
    ours, collective = (stack.enter_context(model.open(name)) for name in (transport, "collective"))
    return (lambda count: measure_point(timer, model, ours, collective, count, rates)), ours.transport


@torch.no_grad()
def measure_point(
    timer: GroupTimer, model: LayerModel, ours: Workspace, collective: Workspace, count: int, rates: dict[str, float]
) -> Record:
    """One row of the table: the layer on `ours` and on `collective`, with `count` tokens on every rank. Collective."""
    rows, expected = model.rows(timer.group.rank, count), expected_rows(model, count)
    layer = model.layer(ours)
    total_us, outputs = time_layer(timer, ours, layer, rows)
    right = {"layer": is_right(timer, outputs, expected)}
    round_trip_us = time_dispatch_and_combine(timer, ours, layer, rows)
    record: Record = experts_floor(timer, model, count, rates)
    record |= {"total_us": round(total_us, 2), "round_trip_us": round(round_trip_us, 2)}
    record["floor_us"] = round(record["experts_floor_us"] + round_trip_us, 2)
    record["experts_floor_us"] = round(record["experts_floor_us"], 2)
    try:
        record |= time_stages(timer, ours, layer, rows)
    except RuntimeError as error:  # no time stamps within graphs here: the rest of the row stands without them
        record["stages_error"] = _first_line(error)
    layer = model.layer(collective)
    total_us, outputs = time_layer(timer, collective, layer, rows)
    right["collective"] = is_right(timer, outputs, expected)
    record["collective_us"] = round(total_us, 2)
    record["collective_round_trip_us"] = round(time_dispatch_and_combine(timer, collective, layer, rows), 2)
    record |= _transformers_times(timer, model, ours, rows, expected, right)
    return record | {"correct": right}


def _transformers_times(
    timer: GroupTimer,
    model: LayerModel,
    ws: Workspace,
    rows: list[torch.Tensor],
    expected: torch.Tensor,
    right: dict[str, bool],
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
    return record


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
