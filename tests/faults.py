"""What can befall a rank, and what every rank sees of it: one worker for gloo, for interpreted kernels and for GPUs.

The faults come one after another in one workspace; a reset, and steps whose bits are checked, stand between them.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from cases import settle
from processes import Process, of_this_process, once_gone
from tokenferry.groups import EPGroup
from tokenferry.testing import run_ranks, same_bits
from tokenferry.testing.data import make_inputs

CULPRIT = 1
CONFIG = tf.MoEConfig(hidden_size=16, num_experts=8, topk=2)
CAPACITY = 8
SHARED = Path("/dev/shm")
ERRORS, PHASES = ("PeerTimeoutError", "PeerFailedError"), ("not-entered", "data-missing", "counts-disagree")


@dataclass(frozen=True)
class Fault:
    """What it is called, and what the others see: the error, its phase and a part of its text.

    `phase` on `p2p` is what a rank knows that waits in vain. It is empty where ranks are at two places and give up at the same
    time: then it depends on who is first, see `may_be_told`.
    """

    name: str
    error: str
    phase: str
    text: str = ""


FAULTS = (
    Fault("late", "PeerTimeoutError", "not-entered"),
    Fault("stopped", "PeerTimeoutError", "not-entered"),
    Fault("late-in-layer", "PeerTimeoutError", "data-missing"),
    Fault("one-layer-fewer", "PeerTimeoutError", "counts-disagree"),
    Fault("one-layer-fewer-at-once", "PeerTimeoutError", ""),
    Fault("one-layer-more", "PeerTimeoutError", "not-entered"),
    Fault("one-step-behind", "PeerTimeoutError", "not-entered"),
    Fault("raises", "PeerFailedError", "data-missing", "ValueError: out of luck"),
    Fault("other-shapes", "PeerFailedError", "data-missing", "ShapeError: partial must have shape"),
    Fault("out-of-memory", "PeerFailedError", "data-missing", "memory"),
    Fault("ctrl-c", "PeerFailedError", "data-missing", "KeyboardInterrupt"),
)
LATE = ("late", "stopped", "late-in-layer", "stopped-while-sending")
"""The culprit cannot hear anything for so long as it sleeps."""
OFF = ("one-layer-fewer", "one-layer-fewer-at-once", "one-layer-more", "one-step-behind")
"""Ranks at two places. All but one of these come half a time-out late, so that on `p2p` it is the others who give up first."""
KILLED = Fault("killed", "PeerTimeoutError", "not-entered")
"""Before it enters a step. Sockets close with their process, memory does not: on `p2p` it is late, elsewhere it has failed."""
KILLED_IN_LAYER = Fault("killed-in-layer", "PeerTimeoutError", "data-missing")
"""Between a dispatch and its combine."""
DEADLY = (KILLED, KILLED_IN_LAYER)
STOPPED_WHILE_SENDING = Fault("stopped-while-sending", "PeerTimeoutError", "data-missing")
"""After its count packet, between two packets of rows. Woken after the others have given up, it goes on to store what it was
about to: in the interpreter alone."""


@dataclass(frozen=True)
class Setting:
    """Where the faults happen, and how long ranks wait."""

    transport: str
    backend: str = "gloo"
    timeout_s: float = 1.5
    right_steps: int = 20
    env: tuple[tuple[str, str], ...] = ()

    @property
    def where(self) -> str:
        """Who carries rows: "p2p", "gloo" or "nccl"."""
        return self.backend if self.transport == "collective" else self.transport


@dataclass(frozen=True)
class Outcome:
    """What a rank saw."""

    fault: str
    pid: int
    error: str
    rank: int
    phase: str
    text: str
    waited_s: float
    right_steps: int


# --- steps --------------------------------------------------------------------------------------------------------------


def one_step(
    ws: tf.Workspace, dispatchers: Sequence[tf.Dispatcher], seed: int, between: Callable[[], object] | None = None
) -> bool:
    """One step with a check of the bits; `between` is called between the first dispatch and its combine."""
    tokens = [(3 * rank + seed) % 5 for rank in range(ws.group.size)]
    rank, num_valid = ws.group.rank, sum(tokens)
    ws.begin_step(tokens[rank])
    compared = []
    for layer, dispatcher in enumerate(dispatchers):
        inputs = make_inputs(CONFIG, tokens, seed=seed * 7 + layer)
        own = inputs[rank]
        got = dispatcher.dispatch(*(each.to(ws.device) for each in (own.hidden, own.topk_idx, own.topk_weights)))
        gathered = got.hidden[:num_valid].clone()
        if between is not None:
            between()
        partial = torch.full((got.hidden.shape[0], CONFIG.hidden_size), torch.nan, dtype=CONFIG.dtype, device=ws.device)
        partial[:num_valid] = own.partial.to(ws.device)
        out = dispatcher.combine(partial, got)
        wanted = tf.reference.combine([each.partial for each in inputs], tokens, CONFIG.dtype, CONFIG.dtype)[rank]
        compared += [(gathered, torch.cat([each.hidden for each in inputs])), (out, wanted)]
    finish(ws)
    return all(same_bits(got.cpu(), wanted) for got, wanted in compared)


def finish(ws: tf.Workspace) -> None:
    """What a caller does before it trusts results."""
    settle(ws)
    ws.check()


def go_on(ws: tf.Workspace, dispatchers: Sequence[tf.Dispatcher], group: tf.EPGroup, count: int, late_stores: bool) -> int:
    """Resets and counts right steps. With `late_stores` this rank meanwhile stores into what it has mapped of old buffers."""
    buffer = getattr(ws._transport.innermost, "_buffer", None)
    old = [buffer.of_peer(rank) for rank in range(ws.group.size) if rank != ws.group.rank] if buffer and late_stores else []
    kept = (buffer._handle, list(buffer._tensors)) if old else None  # the mapping, as in a process that knows of no reset
    ws.reset(group=group, timeout_s=30)
    right = 0
    for seed in range(count):
        for region in old:
            region.fill_(0 if seed % 2 else 0x5A)
        right += one_step(ws, dispatchers, seed)
    del kept
    return right


# --- faults -------------------------------------------------------------------------------------------------------------


def out_of_luck() -> None:
    raise ValueError("out of luck")


def interrupted() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)


def crash(fault: str, ws: tf.Workspace, dispatcher: tf.Dispatcher) -> Callable[[], object] | None:
    """What goes wrong between dispatch and combine, if that is the fault."""
    return {
        "raises": out_of_luck,
        "other-shapes": lambda: dispatcher.combine(torch.zeros(3, 2, dtype=CONFIG.dtype, device=ws.device)),
        "out-of-memory": lambda: torch.empty(2**52, dtype=torch.uint8, device=ws.device),
        "ctrl-c": interrupted,
        "killed-in-layer": lambda: os.kill(os.getpid(), signal.SIGKILL),
    }.get(fault)


def resume_after(seconds: float) -> None:
    """A process that continues this one, which is about to be stopped."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])


def stop_for(seconds: float) -> None:
    resume_after(seconds)
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_at_a_send(ws: tf.Workspace, seconds: float) -> None:
    """The next packet but a few that this rank's kernels send waits until the process has been stopped and woken."""
    from tokenferry.kernels.wire_interpreter import Observer

    class StopsOnce(Observer):
        sends = 0

        def event(self, kind: str, addresses: object) -> None:
            if kind == "send":
                self.sends += 1
                if self.sends == 2:
                    stop_for(seconds)

    ws._transport.innermost.observe(StopsOnce())


def culprit_acts(fault: str, ws: tf.Workspace, dispatchers: Sequence[tf.Dispatcher]) -> None:
    used, late_s = dispatchers[:2], 1.5 * ws.timeout_s + 1
    between = crash(fault, ws, dispatchers[0])
    if between is not None:
        try:
            one_step(ws, used, 3, between)
        except tf.PeerError:
            raise
        except (ValueError, RuntimeError, KeyboardInterrupt) as error:
            ws.fail(f"{type(error).__name__}: {error}")
    elif fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stopped":
        stop_for(late_s)
    elif fault == "stopped-while-sending":
        stop_at_a_send(ws, late_s)
    elif fault == "late":
        time.sleep(late_s)
    elif fault == "late-in-layer":
        ws.begin_step((3 * ws.group.rank + 3) % 5)
        settle(ws)
        time.sleep(late_s)
    if fault in OFF:
        be_off(fault, ws, dispatchers)
    else:
        one_step(ws, used, 3)
    ws.begin_step(0)
    finish(ws)


def be_off(fault: str, ws: tf.Workspace, dispatchers: Sequence[tf.Dispatcher]) -> None:
    """Other calls than the others', who wait at another place by then, or come there at the same time."""
    late_s = 0.0 if fault.endswith("at-once") else ws.timeout_s / 2
    if fault == "one-step-behind":  # the others go on to the next step at once
        ws.begin_step(3)
        time.sleep(late_s)
        dispatch_alone(ws, dispatchers[0])
    elif fault == "one-layer-more":
        one_step(ws, dispatchers[:2], 3)
        time.sleep(late_s)
        dispatch_alone(ws, dispatchers[2])
    else:  # leaves out the second layer, and so comes to the next step too early
        one_step(ws, dispatchers[:1], 3)
        time.sleep(late_s)


def dispatch_alone(ws: tf.Workspace, dispatcher: tf.Dispatcher) -> None:
    own = make_inputs(CONFIG, [ws.step.num_tokens], seed=1)[0]
    dispatcher.dispatch(*(each.to(ws.device) for each in (own.hidden, own.topk_idx, own.topk_weights)))
    finish(ws)


def suffer(ws: tf.Workspace, dispatchers: Sequence[tf.Dispatcher], fault: str, steps: int) -> Outcome:
    """One fault, the reset after it, and right steps."""
    group = ws.group
    assert all(one_step(ws, dispatchers[:2], seed) for seed in range(3))
    start = time.monotonic()
    try:
        if group.rank == CULPRIT:
            culprit_acts(fault, ws, dispatchers)
        else:
            if fault == "one-step-behind":
                ws.begin_step(3)
            else:
                one_step(ws, dispatchers[:2], 3)
            ws.begin_step(0)
            finish(ws)
        raise AssertionError(f"{fault}: nothing was raised")
    except tf.PeerError as caught:
        error, waited_s = caught, time.monotonic() - start
    with pytest.raises(type(error)):
        ws.begin_step(1)  # it stays broken until the reset
    alive = [rank for rank in range(group.size) if not fault.startswith("killed") or rank != CULPRIT]
    survivors = group if len(alive) == group.size else group.subset(alive)
    right = go_on(ws, dispatchers[:2], survivors, steps, late_stores=group.rank == CULPRIT)
    return Outcome(fault, os.getpid(), type(error).__name__, error.rank, error.phase, str(error), waited_s, right)


def suffer_all(group: tf.EPGroup, setting: Setting, faults: Sequence[str], folder: str) -> None:
    """Writes what it saw to files, so that one rank's failure hides no other's outcome."""
    with tf.Workspace(
        CONFIG, group, max_tokens_per_rank=CAPACITY, transport=setting.transport, timeout_s=setting.timeout_s
    ) as ws:
        dispatchers = [ws.dispatcher() for _ in range(3)]
        for fault in faults:
            outcome = suffer(ws, dispatchers, fault, setting.right_steps)
            Path(folder, f"{fault}-{group.rank}").write_text(repr(outcome))


# --- what has to come of it -----------------------------------------------------------------------------------------------


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
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if setting.backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    suffer_all(EPGroup.from_store(dist.FileStore(store_path, world_size), rank, world_size, device), *args)


def run_unsupervised(setting: Setting, world_size: int, args: tuple, timeout_s: float) -> str:
    """Ranks that nobody ends, whatever happens to the others, but at the deadline. Returns how they ended."""
    folder = args[2]
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=bare_rank, args=(rank, world_size, os.path.join(folder, "store"), args))
        for rank in range(world_size)
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("OMP_NUM_THREADS", "1"), ("GLOO_SOCKET_IFNAME", "lo"), *setting.env):
            patch.setenv(name, value)
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
    orphans = once_gone(lambda: {pid: each for pid, each in of_this_process().items() if pid not in others}, limit_s=2.0)
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


def assert_named_in_time(run: Run, fault: Fault, slack_s: float = 2.0) -> None:
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
        late_s = 1.5 * run.timeout_s + 1 if rank == CULPRIT and fault.name in LATE else 0.0
        assert outcome.waited_s < late_s + run.timeout_s + slack_s


def assert_nothing_left(run: Run) -> None:
    assert run.orphans == ()
    assert run.left_in_shared_memory == ()
