"""Runs the faults of `faults.py` on some ranks, and says what every rank must have seen and what may be left."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import tokenferry as tf
from faults import CULPRIT, DEADLY, ERRORS, LATE, OFF, PHASES, SHARED, Fault, Outcome, Setting, suffer_all
from patience import SLACK_S
from processes import Process, of_this_process, once_gone
from tokenferry.groups import EPGroup
from tokenferry.testing import run_ranks


@dataclass(frozen=True)
class Run:
    """All ranks' outcomes, by fault and rank, and what the run left behind."""

    world_size: int
    where: str
    timeout_s: float
    right_steps: int
    outcomes: dict[str, dict[int, Outcome]]
    failure: str
    orphans: tuple[Process, ...]
    left_in_shared_memory: tuple[str, ...]


def bare_rank(rank: int, world_size: int, store_path: str, args: tuple) -> None:
    setting = args[0]
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", **dict(setting.env))
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if setting.backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    suffer_all(EPGroup.from_store(dist.FileStore(store_path, world_size), rank, world_size, device), *args)


def run_unsupervised(setting: Setting, world_size: int, args: tuple, timeout_s: float) -> str:
    """Ranks that nobody ends, whatever happens to the others, but at the deadline. Returns how they ended."""
    folder = args[2]
    context = multiprocessing.get_context("forkserver")  # of conftest.py, where torch is imported already
    ranks = [
        context.Process(target=bare_rank, args=(rank, world_size, os.path.join(folder, "store"), args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout_s
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.join()
    return f"exit codes {[process.exitcode for process in ranks]}"


def run_faults(setting: Setting, world_size: int, faults: Sequence[str], folder: Path, timeout_s: float) -> Run:
    """Runs the faults; after each, as many right steps as the setting says.

    A deadly one comes alone, and without the supervisor of `run_ranks`, which ends the other ranks 2 s after a death.
    """
    is_deadly = any(fault.name in faults for fault in DEADLY)
    assert not is_deadly or len(faults) == 1
    before, others = set(os.listdir(SHARED)), set(of_this_process())
    failure = ""
    try:
        env = dict(setting.env) or None
        args = (setting, tuple(faults), str(folder))
        if is_deadly:
            failure = run_unsupervised(setting, world_size, args, timeout_s)
        else:
            run_ranks(suffer_all, world_size, *args, backend=setting.backend, timeout_s=timeout_s, env=env)
    except tf.RankFailedError as error:
        failure = f"rank {error.rank}: {error}"
    outcomes: dict[str, dict[int, Outcome]] = {fault: {} for fault in faults}
    for path in folder.glob("*-[0-9]*"):
        name, rank = path.name.rsplit("-", 1)
        outcomes[name][int(rank)] = eval(path.read_text())
    left = sorted(name for name in set(os.listdir(SHARED)) - before if name.startswith(("tokenferry", "nccl-", "symm_mem")))
    orphans = once_gone(lambda: {pid: each for pid, each in of_this_process().items() if pid not in others}, SLACK_S)
    return Run(world_size, setting.where, setting.timeout_s, setting.right_steps, outcomes, failure, orphans, tuple(left))


def may_be_told(run: Run, fault: Fault) -> set[tuple[str, int, str]]:
    """(error, rank, phase) that the ranks other than the one named may raise."""
    other = 0  # the rank that a wait of the culprit's finds missing first
    if run.where == "gloo":
        if fault.name in OFF:  # headers say where everyone is: the rank that stands alone is named, of two the one behind
            is_ahead = fault.name.startswith("one-layer-fewer") and run.world_size == 2
            return {("PeerFailedError", other if is_ahead else CULPRIT, "counts-disagree")}
        if fault in DEADLY:
            return {("PeerFailedError", CULPRIT, fault.phase)}
    elif run.where == "nccl":
        if fault.name in OFF:  # NCCL has paired calls that are not alike, and ended both or neither; -1: not known which
            return {(error, rank, phase) for error in ERRORS for rank in (-1, other, CULPRIT) for phase in PHASES}
        if fault in DEADLY:
            return {(error, CULPRIT, phase) for error in ERRORS for phase in ("not-entered", "data-missing")}
    elif not fault.phase:  # whoever gives up first names the other, and of what it knows: both may not be mixed
        return {(fault.error, CULPRIT, "counts-disagree"), (fault.error, other, "not-entered")}
    return {(fault.error, CULPRIT, fault.phase)}


def assert_named_in_time(run: Run, fault: Fault) -> None:
    """Every live rank has the right exception in time, and after the reset all steps are right."""
    outcomes = run.outcomes[fault.name]
    expected = {rank for rank in range(run.world_size) if fault not in DEADLY or rank != CULPRIT}
    assert set(outcomes) == expected, run.failure
    assert {outcome.right_steps for outcome in outcomes.values()} == {run.right_steps}
    assert len({(outcome.rank, outcome.phase) for outcome in outcomes.values()}) == 1, "all ranks name the same one"
    for rank, outcome in outcomes.items():
        if rank == outcome.rank:
            assert outcome.error == "PeerFailedError"
        else:
            assert (outcome.error, outcome.rank, outcome.phase) in may_be_told(run, fault)
            assert fault.text in outcome.text
        late_s = run.timeout_s if rank == CULPRIT and fault.name in LATE else 0.0
        assert outcome.waited_s < late_s + run.timeout_s + SLACK_S


def assert_nothing_left(run: Run) -> None:
    assert run.orphans == ()
    assert run.left_in_shared_memory == ()
