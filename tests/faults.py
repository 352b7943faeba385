"""What can befall a rank, and what every rank sees of it: one worker for gloo, for interpreted kernels and for GPUs.

The faults come one after another in one workspace; a reset, and steps whose bits are checked, stand between them.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenferry as tf
from cases import settle
from patience import PATIENT_S, SLACK_S
from tokenferry.dispatched import HiddenRows, QuantizedRows
from tokenferry.testing import same_bits
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
"""The culprit comes when the others have given up, and hears nothing before."""
OFF = ("one-layer-fewer", "one-layer-fewer-at-once", "one-layer-more", "one-step-behind")
"""Ranks at two places. In all but one of these the culprit is the more patient, so that on `p2p` it is the others who give up
first."""
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
    """Where the faults happen, how long ranks wait, and whether rows and terms are float8 with scales or bfloat16."""

    transport: str
    backend: str = "gloo"
    timeout_s: float = 1.5
    right_steps: int = 20
    env: tuple[tuple[str, str], ...] = ()
    float8: bool = False

    @property
    def where(self) -> str:
        """Who carries rows: "p2p", "gloo" or "nccl"."""
        return self.backend if self.transport == "collective" else self.transport

    @property
    def formats(self) -> dict[str, Any]:
        """For the workspace."""
        return {"dispatch_format": "fp8_block128", "combine_dtype": torch.float8_e4m3fn} if self.float8 else {}


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
        wanted = tf.reference.combine([each.partial for each in inputs], tokens, ws.combine_dtype, CONFIG.dtype)[rank]
        hidden = tf.reference.in_format(torch.cat([each.hidden for each in inputs]), ws.dispatch_format)
        compared += [*zip(parts(gathered), parts(hidden), strict=True), (out, wanted)]
    finish(ws)
    return all(same_bits(got.cpu(), wanted) for got, wanted in compared)


def parts(rows: HiddenRows) -> list[torch.Tensor]:
    """The tensors that rows consist of."""
    return [rows.values.view(torch.uint8), rows.scales] if isinstance(rows, QuantizedRows) else [rows]


def finish(ws: tf.Workspace) -> None:
    """What a caller does before it trusts results."""
    settle(ws)
    ws.check()


def go_on(ws: tf.Workspace, dispatchers: Sequence[tf.Dispatcher], group: tf.EPGroup, count: int, late_stores: bool) -> int:
    """Resets and counts right steps. With `late_stores` this rank meanwhile stores into what it has mapped of old buffers."""
    buffer = getattr(ws._transport.innermost, "_buffer", None)
    old = [buffer.of_peer(rank) for rank in range(ws.group.size) if rank != ws.group.rank] if buffer and late_stores else []
    kept = (buffer._handle, list(buffer._tensors)) if old else None  # the mapping, as in a process that knows of no reset
    ws.set_timeout(PATIENT_S)
    ws.reset(group=group, timeout_s=PATIENT_S)
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


def stop_until(files: Sequence[Path], limit_s: float) -> None:
    """Stops this process until all these files are there; after `limit_s` in any case."""
    there = " && ".join(f"[ -e '{file}' ]" for file in files)
    wait = f"i=0; until {{ {there}; }} || [ $i -ge {int(10 * limit_s)} ]; do sleep 0.1; i=$((i + 1)); done"
    subprocess.Popen(["sh", "-c", f"{wait}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_at_a_send(ws: tf.Workspace, stop: Callable[[], None]) -> None:
    """The next packet but a few that this rank's kernels send waits until the process has been stopped and woken."""
    from tokenferry.kernels.wire_interpreter import Observer

    class StopsOnce(Observer):
        sends = 0

        def event(self, kind: str, addresses: object) -> None:
            if kind == "send":
                self.sends += 1
                if self.sends == 2:
                    stop()

    ws._transport.innermost.observe(StopsOnce())


def gave_up(folder: Path, fault: str, rank: int) -> Path:
    """The file by which a rank says that it did."""
    return folder / f"gave-up.{fault}.{rank}"


def culprit_acts(fault: str, ws: tf.Workspace, dispatchers: Sequence[tf.Dispatcher], folder: Path) -> None:
    used, limit_s = dispatchers[:2], ws.timeout_s + SLACK_S
    others = [gave_up(folder, fault, rank) for rank in range(ws.group.size) if rank != CULPRIT]

    def wait_for_the_others() -> None:
        give_up_s = time.monotonic() + limit_s
        while not all(file.exists() for file in others) and time.monotonic() < give_up_s:
            time.sleep(0.02)

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
        stop_until(others, limit_s)
    elif fault == "stopped-while-sending":
        stop_at_a_send(ws, lambda: stop_until(others, limit_s))
    elif fault == "late":
        wait_for_the_others()
    elif fault == "late-in-layer":
        ws.begin_step((3 * ws.group.rank + 3) % 5)
        settle(ws)
        wait_for_the_others()
    if fault in OFF:
        be_off(fault, ws, dispatchers)
    else:
        one_step(ws, used, 3)
    ws.begin_step(0)
    finish(ws)


def be_off(fault: str, ws: tf.Workspace, dispatchers: Sequence[tf.Dispatcher]) -> None:
    """Other calls than the others', who wait at another place by then, or come there at the same time."""
    if not fault.endswith("at-once"):
        ws.set_timeout(PATIENT_S)
    if fault == "one-step-behind":  # the others go on to the next step at once
        ws.begin_step(3)
        dispatch_alone(ws, dispatchers[0])
    elif fault == "one-layer-more":
        one_step(ws, dispatchers[:2], 3)
        dispatch_alone(ws, dispatchers[2])
    else:  # leaves out the second layer, and so comes to the next step too early
        one_step(ws, dispatchers[:1], 3)


def dispatch_alone(ws: tf.Workspace, dispatcher: tf.Dispatcher) -> None:
    own = make_inputs(CONFIG, [ws.step.num_tokens], seed=1)[0]
    dispatcher.dispatch(*(each.to(ws.device) for each in (own.hidden, own.topk_idx, own.topk_weights)))
    finish(ws)


def suffer(ws: tf.Workspace, dispatchers: Sequence[tf.Dispatcher], fault: str, setting: Setting, folder: Path) -> Outcome:
    """One fault, the reset after it, and right steps. Only the fault has the short time-out."""
    group = ws.group
    assert all(one_step(ws, dispatchers[:2], seed) for seed in range(3))
    group.channel.barrier(f"before the fault {fault}", PATIENT_S)
    ws.set_timeout(setting.timeout_s)
    start = time.monotonic()
    try:
        if group.rank == CULPRIT:
            culprit_acts(fault, ws, dispatchers, folder)
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
        gave_up(folder, fault, group.rank).touch()
    with pytest.raises(type(error)):
        ws.begin_step(1)  # it stays broken until the reset
    alive = [rank for rank in range(group.size) if not fault.startswith("killed") or rank != CULPRIT]
    survivors = group if len(alive) == group.size else group.subset(alive)
    right = go_on(ws, dispatchers[:2], survivors, setting.right_steps, late_stores=group.rank == CULPRIT)
    return Outcome(fault, os.getpid(), type(error).__name__, error.rank, error.phase, str(error), waited_s, right)


def suffer_all(group: tf.EPGroup, setting: Setting, faults: Sequence[str], folder: str) -> None:
    """Writes what it saw to files, so that one rank's failure hides no other's outcome."""
    how = {"transport": setting.transport, "timeout_s": PATIENT_S, **setting.formats}
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=CAPACITY, **how) as ws:
        dispatchers = [ws.dispatcher() for _ in range(3)]
        for fault in faults:
            outcome = suffer(ws, dispatchers, fault, setting, Path(folder))
            Path(folder, f"{fault}-{group.rank}").write_text(repr(outcome))
