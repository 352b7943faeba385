"""What Megatron's engine says when rank 1 fails amid its steps, and how it goes on. For the tests of ranks/ and gpu/."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from patience import PATIENT_S
from tokenferry.groups import EPGroup

FAULT_STEP = 6
NEW_TOKENS = 16
CULPRIT = 1


@dataclass(frozen=True)
class Trial:
    """One engine on every rank, of which rank 1 does something amid the steps.

    Attributes:
        dispatcher: "nccl" or "nvls", Megatron's names.
        transport: of the NVLS class.
        fault: what rank 1 does at step FAULT_STEP: "dies" without a word, comes "late", "raises" within its forward, or
            "nothing".
        idle: rank 0 has no request and makes dummy steps.
        graph_scope: "none", "layer" or "block".
        late_s: how late a late rank is.
        options: further fields of `EngineOptions`.
    """

    dispatcher: str
    fault: str
    transport: str = "auto"
    idle: bool = False
    graph_scope: str = "none"
    timeout_s: float = 2.0
    late_s: float = 4.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        names = [self.dispatcher, *([] if self.transport == "auto" else [self.transport]), self.fault]
        names += [self.graph_scope] if self.graph_scope != "none" else []
        return "-".join([*names, *(["dummy"] if self.idle else []), *self.options])


@dataclass
class Outcome:
    """What a rank saw.

    Attributes:
        error: the type's name; "" if nothing was raised.
        said: its text.
        blamed: the rank that it names.
        step: of the engine, counted from 0, in which it was raised.
        waited_s: how long that step took.
        tokens: of the request, if it was finished: after a restart, where there was one.
    """

    error: str = ""
    said: str = ""
    blamed: int = -2
    step: int = -1
    waited_s: float = 0.0
    tokens: list[int] = field(default_factory=list)


class OwnFaultError(Exception):
    """What the culprit raises."""


def suffer(group: EPGroup, trial: Trial) -> Outcome:
    """Runs an engine without faults first, so that everything is compiled, then one request a rank with the fault."""
    from engine_harness import EngineOptions, Ranks, even
    from tokenferry.integrations import megatron

    ranks = Ranks(group)
    megatron.install()
    megatron.configure(transport=trial.transport, timeout_s=60.0)
    opened = ranks.engine(EngineOptions(graph_scope=trial.graph_scope, **trial.options), dispatcher=trial.dispatcher)
    engine = opened.__enter__()  # never left: its end is no part of the trial
    engine.run(even(1, 4, 24))
    for workspace in megatron.InferenceAllGatherDispatcherBase._registry.workspaces():
        workspace._settings = replace(workspace._settings, timeout_s=trial.timeout_s)
    megatron.restart_engine(engine.engine, timeout_s=60.0)  # the short limit holds from here on
    with torch.inference_mode():
        return Steps(ranks, engine, trial).run()


class Steps:
    """One rank's steps."""

    def __init__(self, ranks: Any, engine: Any, trial: Trial) -> None:
        self.ranks, self.engine, self.trial = ranks, engine, trial
        self.is_idle = trial.idle and ranks.rank != CULPRIT
        self.tokens: dict[int, list[int]] = {}

    def run(self) -> Outcome:
        """Steps until an error, then, where rank 1 still lives, until both ranks' requests are finished."""
        if not self.is_idle:
            prompt = torch.randint(0, 64, (24,), generator=torch.Generator().manual_seed(self.ranks.rank)).tolist()
            self.engine.add(0, prompt, NEW_TOKENS)
        self.ranks.any(True)  # both begin now
        outcome = self.run_into_the_fault()
        if self.trial.fault != "dies":
            self.go_on()
            outcome.tokens = self.tokens.get(0, [])
        return outcome

    def run_into_the_fault(self) -> Outcome:
        """The ranks meet in the engine's own steps alone."""
        sample = self.engine.controller._dynamic_step_sample_logits
        for step in range(FAULT_STEP + 3):
            if self.ranks.rank == CULPRIT and step == FAULT_STEP:
                self.misbehave()
            start_s = time.monotonic()
            while True:  # a dummy step launches and returns: one of the next finds what became of it
                try:
                    self.one_step()
                except (tf.PeerError, OwnFaultError) as error:
                    took_s = time.monotonic() - start_s
                    self.engine.controller._dynamic_step_sample_logits = sample
                    return Outcome(type(error).__name__, str(error), getattr(error, "rank", -2), step, took_s)
                if not (self.is_idle and step >= FAULT_STEP and self.trial.fault != "nothing"):
                    break
                assert time.monotonic() - start_s < PATIENT_S / 2, "the peer's fault was not noticed"
        return Outcome()

    def one_step(self) -> None:
        if self.is_idle:
            self.engine.dummy_step()
        else:
            self.engine.step(self.tokens)

    def go_on(self) -> None:
        from tokenferry.integrations import megatron

        if self.trial.fault != "nothing":
            megatron.restart_engine(self.engine.engine, timeout_s=60.0)
        while self.ranks.any(not self.is_idle and self.engine.engine.has_unfinished_requests()):
            if self.is_idle or self.engine.engine.has_unfinished_requests():
                self.one_step()
            else:
                self.engine.dummy_step()

    def misbehave(self) -> None:
        if self.trial.fault == "dies":
            os._exit(0)
        if self.trial.fault == "late":
            time.sleep(self.trial.late_s)
        if self.trial.fault == "raises":

            def raises(*_: object, **__: object) -> None:
                raise OwnFaultError("out of order")

            self.engine.controller._dynamic_step_sample_logits = raises


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Of the rank processes that are started inside. Not within `run_unsupervised`, which may run on several threads."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}.items():
            patch.setenv(name, value)
        yield


def run_unsupervised(trial: Trial, folder: Path, backend: str, timeout_s: float) -> list[Outcome | None]:
    """`suffer` on two ranks, in rank order; None for one that has said nothing, whose stacks are in a file then. No rank is ended
    because the other one is."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=bare_rank, args=(rank, str(folder), backend, trial, timeout_s)) for rank in range(2)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout_s
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.join()
    found = [folder / f"{rank}.json" for rank in range(2)]
    return [Outcome(**json.loads(path.read_text())) if path.exists() else None for path in found]


def bare_rank(rank: int, folder: str, backend: str, trial: Trial, timeout_s: float) -> None:
    """Ends without a word to torch or Megatron, whose groups would wait for the rank that is gone."""
    faulthandler.dump_traceback_later(0.9 * timeout_s, file=(Path(folder) / f"stacks.{rank}").open("w"))
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    group = EPGroup.from_store(dist.FileStore(os.path.join(folder, "store"), 2), rank, 2, device)
    outcome = suffer(group, trial)
    path = Path(folder) / f"{rank}.json"
    path.with_suffix(".part").write_text(json.dumps(asdict(outcome)))
    path.with_suffix(".part").rename(path)
    time.sleep(1.0 if rank == 0 else 0.0)
    os._exit(0)
