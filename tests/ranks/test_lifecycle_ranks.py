"""Two ranks, of which one is closed or failed by a watchdog's thread, runs out of memory, forks, or fails to reset."""

import contextlib
import errno
import faulthandler
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import tokenferry as tf
from patience import PATIENT_S, SLACK_S
from tokenferry.graphs import GraphRunner
from tokenferry.testing import run_ranks
from tokenferry.transports import opening

pytestmark = pytest.mark.ranks

CONFIG = tf.MoEConfig(hidden_size=4, num_experts=4, topk=1, dtype=torch.float32)
Said = dict[str, Any]


def arguments(group: tf.EPGroup) -> list[torch.Tensor]:
    rows = torch.arange(8.0).reshape(2, 4) + 100 * group.rank
    return [rows, torch.tensor([[0], [3]], dtype=torch.int32), torch.ones(2, 1)]


def step_is_right(ws: tf.Workspace) -> bool:
    d, (rows, idx, weights) = ws.dispatcher(), arguments(ws.group)
    ws.begin_step(2)
    got = d.dispatch(rows, idx, weights)
    mine = torch.isin(got.topk_idx, torch.tensor(list(ws.group.expert_range(4)), dtype=torch.int32))
    return torch.equal(d.combine(got.hidden * 10 * mine, got), 10 * rows)


def said_by(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@contextlib.contextmanager
def opened(group: tf.EPGroup, transport: str) -> Iterator[tf.Workspace]:
    ws = tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport=transport, timeout_s=PATIENT_S, open_timeout_s=PATIENT_S)
    yield ws
    ws.close()


def watched(group: tf.EPGroup, transport: str, watchdog: Callable[[tf.Workspace, Said], None]) -> Said:
    """Rank 0 waits in a dispatch for rank 1, and a thread does something about it; rank 1 comes when rank 0 is out."""
    with opened(group, transport) as ws:
        said: Said = {"before": step_is_right(ws)}
        ws.begin_step(2)
        if group.rank == 0:
            timer = threading.Timer(0.5, watchdog, (ws, said))
            timer.start()
        else:
            group.channel.barrier(f"rank 0 is out of {watchdog.__name__}", PATIENT_S)
        start = time.monotonic()
        said["inside"] = said_by(lambda: ws.dispatcher().dispatch(*arguments(group)))
        said["waited_s"] = time.monotonic() - start
        if group.rank == 0:
            group.channel.barrier(f"rank 0 is out of {watchdog.__name__}", PATIENT_S)
            timer.join()
        said["after"] = said_by(lambda: ws.begin_step(2))
        return said


def looks_and_closes(ws: tf.Workspace, said: Said) -> None:
    said["check"], said["reset"] = said_by(ws.check), said_by(ws.reset)
    ws.close()


def fails(ws: tf.Workspace, _: Said) -> None:
    ws.fail("a watchdog")


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def runs_out_of_memory(group: tf.EPGroup, transport: str) -> Said:
    """Rank 0, when its rows are on their way."""
    with opened(group, transport) as ws:
        said: Said = {"before": step_is_right(ws)}
        ws.begin_step(2)
        d, start = ws.dispatcher(), time.monotonic()
        if group.rank == 0:
            ws.lifecycle.advance = out_of_memory
            said["inside"] = said_by(lambda: d.dispatch_begin(*arguments(group)))
        else:
            said["inside"] = said_by(lambda: d.combine(d.dispatch(*arguments(group)).hidden.clone()))
        said["waited_s"] = time.monotonic() - start
        said["after"] = said_by(lambda: ws.begin_step(2))
        return said


def resets_without_memory(group: tf.EPGroup, transport: str) -> Said:
    with opened(group, transport) as ws:
        ws.begin_step(2)
        module, name = (opening, "open_transport") if transport == "collective" else (os, "posix_fallocate")
        original = getattr(module, name)
        if group.rank == 1:
            setattr(module, name, no_space)
        said = {
            "inside": said_by(lambda: ws.reset(timeout_s=PATIENT_S)),
            "after": said_by(ws.check),
            "begin_step": said_by(lambda: ws.begin_step(2)),
        }
        setattr(module, name, original)
        ws.reset()
        return {**said, "mended": step_is_right(ws)}


def in_child(ws: tf.Workspace, runner: GraphRunner) -> Said:
    """What a forked child hears, from the workspace and from what stands on it."""
    group = ws.group
    dispatcher = tf.Dispatcher(ws, 0)
    calls: dict[str, Callable[[], Any]] = {
        "begin_step": lambda: ws.begin_step(2),
        "announce": lambda: ws.announce(2),
        "dispatch": lambda: dispatcher.dispatch(*arguments(group)),
        "dispatch_begin": lambda: dispatcher.dispatch_begin(*arguments(group)),
        "dispatch_end": dispatcher.dispatch_end,
        "combine_input": dispatcher.combine_input,
        "combine": lambda: dispatcher.combine(torch.zeros(4, 4)),
        "combine_begin": lambda: dispatcher.combine_begin(torch.zeros(4, 4)),
        "combine_end": dispatcher.combine_end,
        "check": ws.check,
        "fail": lambda: ws.fail("a child"),
        "reset": lambda: ws.reset(timeout_s=2.0),
        "solo": lambda: ws.solo().__enter__(),
        "capturing": lambda: ws.capturing().__enter__(),
        "replaying": lambda: ws.replaying().__enter__(),
        "dispatcher": ws.dispatcher,
        "with": ws.__enter__,
        "GraphRunner": lambda: runner(torch.zeros(1, 2)),
        "GraphRunner.capture": runner.capture,
        "channel": lambda: group.channel.peek("word"),
        "subset": lambda: group.subset([group.rank]),
        "another workspace": lambda: tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport=ws.transport),
    }
    said = {name: said_by(call) for name, call in calls.items()}
    runner.close()
    ws.close()
    ws.__exit__(ValueError, ValueError("the child's own"), None)
    return said


def forks(group: tf.EPGroup, transport: str) -> Said:
    kept = [ws := tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport=transport, timeout_s=PATIENT_S)]
    kept.append(GraphRunner(ws, lambda rows: rows, [8], inputs=[torch.zeros(1, 2)]))
    before = step_is_right(ws)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(PATIENT_S))
        try:
            os.write(write, json.dumps(in_child(*kept)).encode())
            kept.clear()
            del ws  # nothing refers to the workspace any more
            gc.collect()
        except BaseException as error:
            os.write(write, repr(error).encode())
            os._exit(1)
        os._exit(0)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(read) as pipe:
        text = pipe.read()
    said = {"before": before, "status": status, "text": text, "parent": said_by(ws.check), "right": step_is_right(ws)}
    ws.close()
    return said


@pytest.fixture(scope="module", params=["collective", pytest.param("p2p", marks=pytest.mark.interpreter)])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


def all_of_it(group: tf.EPGroup, transport: str) -> dict[str, Said]:
    return {
        "closed": watched(group, transport, looks_and_closes),
        "failed": watched(group, transport, fails),
        "memory": runs_out_of_memory(group, transport),
        "reset": resets_without_memory(group, transport),
        "forked": forks(group, transport),
    }


@pytest.fixture(scope="module")
def said(transport: str) -> list[dict[str, Said]]:
    return run_ranks(all_of_it, 2, transport, env={"TRITON_INTERPRET": str(int(transport == "p2p"))}, timeout_s=2 * PATIENT_S)


def test_another_thread_may_look_and_close_while_a_call_waits(said: list[dict[str, Said]]) -> None:
    waiting = said[0]["closed"]
    assert waiting["check"] == "nothing"
    assert waiting["reset"].startswith("WrongCallerError: reset: another thread is inside a call")
    assert waiting["inside"].startswith("StateError: the workspace was closed by another thread while this call was inside")
    assert waiting["after"].startswith("StateError: begin_step: the workspace is closed")
    assert waiting["waited_s"] < SLACK_S


def test_who_is_waited_for_when_another_thread_closes_learns_it_at_once(said: list[dict[str, Said]]) -> None:
    late = said[1]["closed"]
    assert late["inside"].startswith("PeerFailedError: rank 0 failed in step 2")
    assert late["waited_s"] < SLACK_S


def test_another_thread_may_fail_while_a_call_waits(said: list[dict[str, Said]]) -> None:
    for each in (said[0]["failed"], said[1]["failed"]):
        assert each["inside"].startswith("PeerFailedError: rank 0 failed in step 2: a watchdog")
        assert each["after"].startswith("PeerFailedError: rank 0 failed in step 2: a watchdog")
        assert each["waited_s"] < SLACK_S


def test_out_of_memory_amid_a_call_is_told_at_once(said: list[dict[str, Said]]) -> None:
    broken, told = said[0]["memory"], said[1]["memory"]
    why = "dispatch_begin raised OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert broken["inside"].startswith("OutOfMemoryError")
    assert broken["after"].startswith(f"StateError: the workspace is broken since {why}")
    assert told["inside"].startswith(f"PeerFailedError: rank 0 failed in step 2: {why}")
    assert told["waited_s"] < SLACK_S


def test_a_reset_that_runs_out_of_memory_on_one_rank_is_said_by_every_call_and_mended_by_the_next(
    said: list[dict[str, Said]],
) -> None:
    for each in (said[0]["reset"], said[1]["reset"]):
        assert "rank 1" in each["inside"]
        assert "No space left on device" in each["inside"]
        for call in ("after", "begin_step"):
            assert each[call].startswith("StateError: the workspace is broken since reset raised TransportUnavailableError")
        assert each["mended"]


def test_a_forked_child_is_refused_and_its_parent_goes_on(said: list[dict[str, Said]]) -> None:
    for each in (said[0]["forked"], said[1]["forked"]):
        assert each["status"] == 0, each
        for name, text in json.loads(each["text"]).items():
            assert "in another process" in text, name
            assert text.split(":")[0] in ("StateError", "WrongCallerError"), name
        assert each["before"] is each["right"] is True
        assert each["parent"] == "nothing"
