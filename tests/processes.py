"""Which processes live, as /proc tells: to see that none outlives what started it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One that runs, sleeps or is stopped; one that has ended and waits to be collected does not count."""

    pid: int
    parent: int
    group: int
    session: int
    command: str


def living() -> dict[int, Process]:
    """All processes that this one may see, by number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, *fields = (path / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if state not in "ZX":
            found[int(path.name)] = Process(int(path.name), *map(int, fields), command)
    return found


def of_session(session: int) -> dict[int, Process]:
    """Everything that a process with a session of its own has started, however deep, whoever its parent is by now."""
    return {pid: process for pid, process in living().items() if process.session == session}


def of_this_process() -> dict[int, Process]:
    """All that descends from this process, and what of its process group has lost its parent. The fork server and the resource
    tracker are left out: they live as long as this process."""
    everyone, own = living(), os.getpid()
    services = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    found = {own}
    while more := {pid for pid, process in everyone.items() if process.parent in found} - found:
        found |= more
    group = {pid for pid, process in everyone.items() if process.group == os.getpgid(0)}
    lost = {pid for pid in group if everyone[pid].parent not in group and everyone[pid].parent != os.getppid()}
    return {pid: everyone[pid] for pid in (found | lost) - services - {own}}


def once_gone(look: Callable[[], dict[int, Process]], limit_s: float) -> tuple[Process, ...]:
    """Those that `look` still finds after `limit_s`; returns earlier if there are none."""
    deadline = time.monotonic() + limit_s
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return tuple(left.values())
