"""What models of transformers take to decode: ours, transformers' own expert parallelism and the plain model, in one run.

A way is a model and how it is spread over the ranks; a mode is how its decode steps run. Weights are random and the same in every
way, and so are the prompts, so that tokens can be compared: those of the plain model come first.

    step_ms   one decode step by itself, with a static cache: a replay of its CUDA graph, or eager calls
    host_ms   in which the host has issued such a step's work, without waiting for it
    token_ms  a token in `generate()` or `generate_batch()`, after the first one
    around_ms token_ms less step_ms, of graphs: what the host does around a replay in `generate()`

All are the slowest rank's.
"""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from tokenferry import env
from tokenferry.benchmarking.machine import Device, check_gpus, environment
from tokenferry.benchmarking.model_checks import agreement, check_family
from tokenferry.benchmarking.model_modes import MODES, Measured, Scene
from tokenferry.benchmarking.model_plan import Part, parts_of
from tokenferry.benchmarking.model_request import ModelPoint, ModelRequest
from tokenferry.benchmarking.model_times import NotCaptured
from tokenferry.benchmarking.model_ways import WAYS
from tokenferry.benchmarking.records import Record, append_record
from tokenferry.benchmarking.timing import GroupTimer, Progress
from tokenferry.groups import EPGroup
from tokenferry.supervisor import run_processes

LAST_POINT_S: Final = 240.0
"""What a run may take beyond its budget before it counts as stuck: one point that compiles, or a peer that is waited for."""
COLLECTIVE_TIMEOUT: Final = datetime.timedelta(seconds=90)


def run_model(
    request: ModelRequest,
    num_ranks: int,
    *,
    device: Device = "cuda",
    output: Path | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Measures models on `num_ranks` GPUs of this machine, in one process a rank. Call it under `if __name__ == "__main__"`.

    Args:
        device: "cpu" makes the same calls and comparisons over gloo (give `rehearse=True`); its times say nothing.
        output: a file that the records replace, each written as soon as it is there.
        progress: gets a line before each measurement; see `Progress`.

    Returns:
        A record for each point, way and mode, and one for each tiny model. Records with `error`, `not_run` or `left_out` stand
        for what was not measured, with the reason.

    Raises:
        DeviceError: there are fewer GPUs than ranks.
        RankFailedError: a rank failed.
    """
    check_gpus(num_ranks, device)
    arguments = (request, device, time.time(), output, progress)
    records: list[Record] = run_processes(_launched, num_ranks, arguments, timeout_s=request.budget_s + LAST_POINT_S)[0]
    return records


def run_model_as_rank(
    request: ModelRequest, *, device: Device = "cuda", output: Path | None = None, progress: Progress | None = None
) -> list[Record]:
    """As `run_model`, in a process that torchrun has started: all of its processes call this."""
    started_s = time.time()
    place = env.read(env.TorchrunSettings)
    if device == "cuda":
        torch.cuda.set_device(place.local_rank or 0)
    dist.init_process_group(_backend(device), timeout=COLLECTIVE_TIMEOUT)
    return _measure(request, device, started_s, output, progress)


def _launched(
    rank: int,
    world_size: int,
    store_path: str,
    request: ModelRequest,
    device: Device,
    started_s: float,
    output: Path | None,
    progress: Progress | None,
) -> list[Record]:
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(store_path, world_size)
    dist.init_process_group(_backend(device), store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    with env.torchrun_place(rank, world_size):  # transformers' own expert parallelism reads it
        return _measure(request, device, started_s, output, progress)


def _backend(device: Device) -> str:
    return "nccl" if device == "cuda" else "gloo"


def _measure(
    request: ModelRequest, device: Device, started_s: float, output: Path | None, progress: Progress | None
) -> list[Record]:
    try:
        group = EPGroup(dist.group.WORLD, None if device == "cuda" else "cpu")
        return Run(group, request, started_s, output, progress).measure()
    finally:
        dist.destroy_process_group()


class Run:
    """A run on one rank. The ranks agree on what comes next, since only what all of them have finished counts as finished."""

    def __init__(
        self, group: EPGroup, request: ModelRequest, started_s: float, output: Path | None, progress: Progress | None
    ) -> None:
        import transformers

        self.group, self.request, self._started_s = group, request, started_s
        self.timer = GroupTimer(group, progress=progress)
        self._output = output if group.rank == 0 else None
        self._common = environment(group.device) | {
            "transformers": transformers.__version__, "world_size": group.size, "commit": request.commit,
        }  # fmt: skip
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.records: list[Record] = []
        self._plain_tokens: dict[ModelPoint, list[list[int]]] = {}

    def measure(self) -> list[Record]:
        """All records."""
        if self._output is not None:
            self._output.write_text("")
        for family in self.request.families:
            self.timer.say(f"{family}, tiny, float32: tokens")
            self._keep(self._check(family))
        for part in parts_of(self.request, self.group):
            for found in self._measure_part(part):
                self._keep({"what": "model", "config": part.config, "way": part.way} | found)
            gc.collect()  # models hold themselves in circles
            torch.cuda.empty_cache()
        return self.records

    def _check(self, family: str) -> Record:
        try:
            return check_family(self.timer, family, self.request.transport)
        except Exception as error:  # noqa: BLE001 - the figures are still worth their time
            return {"what": "model tokens", "family": family, "error": _first_line(error)}

    def _keep(self, record: Record) -> None:
        self.records.append(record | {"at_s": round(time.time() - self._started_s, 1)} | self._common)
        if self._output is not None:
            append_record(self.records[-1], self._output)

    def _is_late(self) -> bool:
        return self.timer.slowest(time.time() - self._started_s) >= self.request.budget_s

    def _measure_part(self, part: Part) -> Iterator[Record]:
        """A record for each mode and point, then what went wrong, then what was left out."""
        request, way, remaining = self.request, WAYS[part.way], list(part.steps)
        reason = f"the budget of {request.budget_s:.0f} s was spent"
        try:
            if not self._is_late():
                self.timer.say(f"{part.config}, {part.way}: loading")
                start_s, held_before = time.time(), _held_gb(self.group)
                with way.open(self.group, part.values, request) as model:
                    loaded_s = round(self.timer.slowest(time.time() - start_s), 1)
                    yield {"loaded_s": loaded_s} | self._memory(held_before) | transport_of(model)
                    scene = Scene(self.timer, model, part.values, request, way.replicates)
                    while remaining and not self._is_late():
                        mode, point = remaining[0]
                        self.timer.say(f"{point.config}, {part.way}, {mode}: batch {point.batch}, prompt {point.prompt}")
                        try:
                            found = self._record(part, mode, point, MODES[mode].measure(scene, point))
                        except NotCaptured as error:
                            found = {
                                "not_run": [[mode, point.batch, point.prompt]],
                                "reason": _first_line(error.__cause__ or error),
                            }
                        remaining.pop(0)
                        yield found
                    self.timer.meet()
        except Exception as error:  # noqa: BLE001 - the other ways are still worth their time
            reason = _first_line(error)
            yield {"error": reason}
        if remaining:
            yield {"left_out": [[mode, point.batch, point.prompt] for mode, point in remaining], "reason": reason}

    def _memory(self, held_before_gb: float) -> Record:
        """GB (10^9 bytes) that a model took on the fullest GPU, with all that it works in, and the most while it loaded."""
        if self.group.device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(self.group.device) / 1e9
        held = _held_gb(self.group)
        figures = {"held_gb": held - held_before_gb, "loading_peak_gb": peak - held_before_gb}
        return {name: round(self.timer.slowest(figure), 2) for name, figure in figures.items()}

    def _record(self, part: Part, mode: str, point: ModelPoint, found: Measured) -> Record:
        is_reference = part.way == "plain" and point not in self._plain_tokens
        if is_reference:
            self._plain_tokens[point] = found.tokens
        record: Record = {"mode": mode, "layers": part.values.num_hidden_layers, "batch": point.batch, "prompt": point.prompt}
        record |= found.figures
        expected = self._plain_tokens.get(point)
        if found.tokens and expected is not None and not is_reference:
            record |= agreement(self.timer, found.tokens, expected)
        return record


def _held_gb(group: EPGroup) -> float:
    """What is allocated now; the most begins anew from here."""
    if group.device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(group.device)
    return torch.cuda.memory_allocated(group.device) / 1e9


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:400]


def transport_of(model: Any) -> Record:
    """What moves the rows of a model of ours; nothing of others."""
    return {"transport": model.expert_parallel.workspace.transport} if hasattr(model, "expert_parallel") else {}


def is_right(record: Record) -> bool:
    """Whether a record says neither that tokens differ in float32 nor that something failed."""
    return "error" not in record and record.get("equal_tokens", True)
