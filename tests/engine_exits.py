"""Whether processes that have run Megatron's engine come to their end, and where they stand if they do not."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tokenferry.groups import EPGroup

STAGES = ("run", "our connections closed", "graphs deleted", "groups destroyed")


@dataclass(frozen=True)
class Run:
    """Engines of these dispatchers, one after the other in the same two processes. "megatron" is Megatron's own for NCCL.

    Attributes:
        transport: of the NVLS class.
        options: fields of `EngineOptions`.
    """

    dispatchers: Sequence[str]
    transport: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class End:
    """How a rank's process ended: its exit code, None if it had to be killed; the last thing that it did; its threads then."""

    code: int | None
    last: str
    stacks: str = ""


def ends_of(run: Run, folder: Path, backend: str, run_s: float, exit_s: float = 20.0) -> list[End]:
    """Both ranks' ends, in the environment of `engine_failures.environment`. A process may take `run_s` to do its work, and
    `exit_s` to end after that."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=one_rank, args=(rank, str(folder), backend, run)) for rank in range(2)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + run_s
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if all(STAGES[-1] in stages_of(folder, rank) for rank in range(2)):
            deadline = min(deadline, time.monotonic() + exit_s)
        time.sleep(0.1)
    return [end_of(process, folder, rank) for rank, process in enumerate(ranks)]


def end_of(process: Any, folder: Path, rank: int) -> End:
    last = ([stage for stage in stages_of(folder, rank).splitlines() if stage] or ["nothing"])[-1]
    if not process.is_alive():
        process.join()
        return End(process.exitcode, last)
    names = [path.read_text().strip() for path in Path(f"/proc/{process.pid}/task").glob("*/comm")]
    time.sleep(1.0)  # the rank writes its stacks now and then
    process.kill()
    process.join()
    stacks = folder / f"stacks.{rank}"
    return End(None, last, f"threads {sorted(names)}\n{stacks.read_text()[-4000:] if stacks.exists() else ''}")


def stages_of(folder: Path, rank: int) -> str:
    path = folder / f"stages.{rank}"
    return path.read_text() if path.exists() else ""


def one_rank(rank: int, folder: str, backend: str, run: Run) -> None:
    """Returns at its end, so that the interpreter ends as after a script."""
    faulthandler.dump_traceback_later(15.0, repeat=True, file=(Path(folder) / f"stacks.{rank}").open("w"))
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    group = EPGroup.from_store(dist.FileStore(os.path.join(folder, "store"), 2), rank, 2, device)

    def reached(stage: str) -> None:
        with (Path(folder) / f"stages.{rank}").open("a") as file:
            file.write(f"{stage}\n")

    run_engines(group, run, reached)


def run_engines(group: EPGroup, run: Run, reached: Any) -> None:
    from engine_harness import EngineOptions, Ranks, even
    from tokenferry.integrations import megatron

    with Ranks(group) as ranks:
        for dispatcher in run.dispatchers:
            is_ours = dispatcher != "megatron"
            undo = megatron.install() if is_ours else None
            megatron.configure(transport=run.transport)
            with ranks.engine(EngineOptions(**run.options), dispatcher=dispatcher if is_ours else "nccl") as engine:
                engine.run(even(1, 4, 24))
                reached(f"{dispatcher}: {STAGES[0]}")
                if undo is not None:
                    megatron.close()
                    undo()
                reached(f"{dispatcher}: {STAGES[1]}")
            reached(f"{dispatcher}: {STAGES[2]}")
    reached(STAGES[3])
