"""Start N rank processes under one supervisor, and blame the rank that failed first.

The supervisor polls all ranks at once and never joins them in rank order: a rank that waits for a dead peer would hide it.
Ranks meet in a folder of their own (a file store), so no port is used. A rank that loses its supervisor ends itself.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import inspect
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, Literal

from tokenferry import env as environment_table
from tokenferry.errors import ConfigError, RankFailedError, UsageError

StartMethod = Literal["forkserver", "spawn", "fork"]

GRACE_S: Final = 2.0
"""After the first failure the other ranks have this long to report theirs, which may turn out to be the earlier one."""
DEATH_HEAD_START_S: Final = 0.2
"""A death by signal is seen only when its connection closes, which its peers see too: it counts as this much earlier."""
BOOT: Final = environment_table.ENTER_ENVIRONMENT + "\nfrom tokenferry.supervisor import _run_rank\n_run_rank(**start)"
"""A rank process's first lines: its environment is set before anything is imported that might read it."""


@dataclass(frozen=True, order=True)
class _Failure:
    time_s: float
    rank: int
    text: str


@dataclass
class _Rank:
    """The supervisor's side of one rank process."""

    rank: int
    process: BaseProcess
    connection: Connection
    result: bytes | None = None


def run_processes(
    target: Callable[..., Any],
    world_size: int,
    args: Sequence[Any] = (),
    *,
    timeout_s: float | None,
    store_dir: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    start_method: StartMethod = "forkserver",
    preload: Sequence[str] = ("torch",),
    on_message: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """Run `target(rank, world_size, store_path, *args)` in one process per rank and return the results in rank order.

    Args:
        target: a plain module-level function; in a notebook or under `python -c`, with cloudpickle installed, any function.
            `store_path` is for `torch.distributed.FileStore(store_path, world_size)`.
        timeout_s: deadline for the whole run; None for no deadline.
        store_dir: where the run's own folder (mode 0700, removed afterwards) is made; default the system's temporary folder.
        env: variables to set on top of this process's environment, before the rank imports anything. OMP_NUM_THREADS
            (default 1) is also the number of torch threads.
        preload: modules that the fork server imports once; they do not see `env`. The first call in a process decides.
        on_message: called in this process as `on_message(rank, message)`. If given, `target` also gets a keyword argument
            `send`, a function that takes one JSON-serialisable message.

    Raises:
        RankFailedError: of the first failure: an exception (its traceback), death by a signal (its name), an exit without
            a result, or ranks that are stuck at the deadline (their numbers and stacks). All ranks are dead by then.
        ConfigError: `world_size` < 1, or `target` or `args` cannot be pickled, or are of a program that rank processes cannot
            import: one read from standard input, typed at a prompt or in a notebook without cloudpickle being installed, or that
            would start them again as it is imported.
    """
    if world_size < 1:
        raise ConfigError(f"world_size must be at least 1, got {world_size!r}")
    try:
        call = _pickled_call(target, tuple(args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"rank processes get the function and its arguments pickled, and these cannot be: {error}; give a plain function "
            "at the top of a module, no lambda and none within another, and arguments that pickle takes"
        ) from error
    if start_method != "fork":
        _check_main_can_be_imported()
        _check_main_is_guarded()
    deadline_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload(list(preload))
    environment = environment_table.for_rank_process(env)
    with tempfile.TemporaryDirectory(prefix="tokenferry-", dir=store_dir, ignore_cleanup_errors=True) as folder:
        ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                start = {
                    "rank": rank,
                    "world_size": world_size,
                    "folder": folder,
                    "call": call,
                    "wants_messages": on_message is not None,
                }
                ranks.append(_start(context, environment, start))
            _supervise(ranks, deadline_s, timeout_s, Path(folder), on_message)
            return [pickle.loads(rank.result) for rank in ranks if rank.result is not None]
        finally:
            _end(ranks)


def start_fork_server(preload: Sequence[str] = ("torch",)) -> None:
    """Lets the process that rank processes are forked from import `preload` now, while this one is busy with something else.

    Without it `run_processes` does so when it is called. The first of both calls decides what is imported.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    with _interrupts_held():
        forkserver.ensure_running()


def _pickled_call(target: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Functions and classes of a module travel by name. Those of a notebook, or of `python -c`, have no module that a rank
    process could import: cloudpickle, where it is installed, sends what they are made of."""
    call = None
    with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError):
        call = pickle.dumps((target, args))
    if hasattr(sys.modules["__main__"], "__file__") or (call is not None and b"__main__" not in call):
        return pickle.dumps((target, args)) if call is None else call
    try:
        import cloudpickle
    except ImportError:
        raise ConfigError(
            "rank processes import the program that starts them, and this one has no file; save it as a .py file, or "
            "`pip install cloudpickle`, which lets functions of a notebook travel without one"
        ) from None
    by_value: bytes = cloudpickle.dumps((target, args))
    return by_value


def _check_main_can_be_imported() -> None:
    """A program read from standard input fails in the rank processes only, with what says nothing about the cause."""
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    if main_file is not None and Path(main_file).name == "<stdin>":
        raise ConfigError("rank processes import the program that starts them, and this one has no file; save it as a .py file")


def _check_main_is_guarded() -> None:
    """Rank processes import the program that starts them. One that starts them at its top level, unguarded, would do so again in
    each; Python's own report of that is a page for every rank, and does not name the line."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if getattr(getattr(main, "__spec__", None), "name", "").endswith("__main__"):
        return  # a package run with -m: rank processes do not import that
    frame = inspect.currentframe()
    while frame is not None and not (frame.f_code.co_name == "<module>" and frame.f_code.co_filename == file):
        frame = frame.f_back
    if frame is None or file is None or frame.f_globals.get("__name__") != "__main__":
        return
    try:
        program = ast.parse(Path(file).read_text())
    except (OSError, ValueError, SyntaxError):  # a program that Python runs from elsewhere, such as an archive
        return
    line = frame.f_lineno
    conditions = [node for node in ast.walk(program) if isinstance(node, ast.If | ast.IfExp | ast.BoolOp)]
    guards = [node for node in conditions if "__name__" in ast.unparse(getattr(node, "test", node))]
    if not any(guard.lineno <= line <= (guard.end_lineno or guard.lineno) for guard in guards):
        raise ConfigError(
            f"line {line} of {file} starts rank processes, which import that file and would start them again: put it under "
            '`if __name__ == "__main__":`'
        )


def _start(context: Any, environment: Mapping[str, str], start: Mapping[str, Any]) -> _Rank:
    ours, theirs = context.Pipe(duplex=True)
    scope = {"environment": dict(environment), "start": {**start, "connection": theirs}}
    process = context.Process(target=exec, args=(BOOT, scope), name=f"tokenferry-rank{start['rank']}")
    with theirs, _interrupts_held():
        process.start()
    return _Rank(start["rank"], process, ours)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started inside never get Ctrl-C, which is the supervisor's alone to handle: they inherit the blocked mask."""
    resource_tracker.ensure_running()  # first: starting it unblocks SIGINT again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _supervise(
    ranks: Sequence[_Rank],
    deadline_s: float,
    timeout_s: float | None,
    folder: Path,
    on_message: Callable[[int, Any], None] | None,
) -> None:
    """Poll until every rank has ended well; otherwise raise the earliest failure."""
    running, failures = list(ranks), list[_Failure]()
    while running and time.monotonic() < deadline_s:
        handles = [handle for rank in running for handle in (rank.connection, rank.process.sentinel)]
        left_s = None if deadline_s == float("inf") else max(0.0, deadline_s - time.monotonic())
        ready = wait(handles, left_s)
        for rank in [rank for rank in running if rank.connection in ready or rank.process.sentinel in ready]:
            ended = not rank.process.is_alive()  # asked before reading: what it wrote before its end is then all there
            ended = _read(rank, failures, on_message) or ended
            if ended:
                running.remove(rank)
                failures += _unexplained_end(rank, failures)
        if failures:
            deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
    if failures:
        first = min(failures)
        raise RankFailedError(first.rank, first.text)
    if running:
        stuck = ", ".join(str(rank.rank) for rank in running)
        stacks = "".join(f"\nstack of rank {rank.rank}:\n{_stack(rank, folder)}" for rank in running)
        raise RankFailedError(running[0].rank, f"not finished within {timeout_s} s: ranks [{stuck}] of {len(ranks)}{stacks}")


def _read(rank: _Rank, failures: list[_Failure], on_message: Callable[[int, Any], None] | None) -> bool:
    """Take in all that a rank has sent so far; True if its connection is closed."""
    try:
        while rank.connection.poll():
            kind, _, body = rank.connection.recv_bytes().partition(b" ")
            if kind == b"result":
                rank.result = body
            elif kind == b"failure":
                failures.append(_Failure(*json.loads(body)))
            elif on_message is not None:
                on_message(rank.rank, json.loads(body))
    except (EOFError, OSError):
        return True
    return False


def _unexplained_end(rank: _Rank, failures: Sequence[_Failure]) -> list[_Failure]:
    """The failure of a rank that ended without saying why: killed, or gone without a result."""
    rank.process.join(GRACE_S)
    code = rank.process.exitcode
    if (code == 0 and rank.result is not None) or any(failure.rank == rank.rank for failure in failures):
        return []
    now_s = time.monotonic()
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        # gloo aborts a rank in consequence of a peer's failure, so SIGABRT gets no head start.
        return [_Failure(now_s - (0.0 if name == "SIGABRT" else DEATH_HEAD_START_S), rank.rank, f"killed by {name}")]
    return [
        _Failure(now_s, rank.rank, f"exited with code {code} " + ("before" if rank.result is None else "after") + " it returned")
    ]


def _stack(rank: _Rank, folder: Path) -> str:
    """Where a stuck rank stands, as its own faulthandler writes it on SIGUSR1."""
    path = folder / f"stack{rank.rank}"
    if rank.process.pid is None or not path.exists():
        return "(not started yet)\n"
    os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    return path.read_text(errors="replace") or "(no answer)\n"


def _end(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        if rank.process.is_alive():
            rank.process.kill()
    for rank in ranks:
        rank.process.join()
        rank.connection.close()
        rank.process.close()


def _run_rank(rank: int, world_size: int, folder: str, call: bytes, wants_messages: bool, connection: Connection) -> None:
    """The rank process's side: run the target and send its result, or the time and traceback of its failure."""
    try:
        Path(folder, f".pid{rank}").write_text(str(os.getpid()))
        Path(folder, f".pid{rank}").rename(Path(folder, f"pid{rank}"))  # whole, or not there
    except FileNotFoundError:
        os._exit(1)  # the supervisor is gone already, and the run's folder with it
    threading.Thread(target=_end_with_supervisor, args=(connection, folder), daemon=True).start()
    with open(Path(folder, f"stack{rank}"), "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, stack_file, all_threads=True)
        try:
            import torch  # here, since the environment had to be set first

            torch.set_num_threads(environment_table.read(environment_table.RankProcessSettings).num_threads)
            target, args = pickle.loads(call)
            extra = (
                {"send": lambda message: connection.send_bytes(b"message " + json.dumps(message).encode())}
                if wants_messages
                else {}
            )
            result = target(rank, world_size, str(Path(folder, "store")), *args, **extra)
            connection.send_bytes(b"result " + _pickled(result))
        except BaseException:  # noqa: BLE001 - SystemExit too is a failure of this rank, and the supervisor must hear of it
            failure = [time.monotonic(), rank, traceback.format_exc()]
            connection.send_bytes(b"failure " + json.dumps(failure).encode())
            sys.stdout.flush()
            os._exit(1)  # at once: a rank that waits for others here would hide its failure from them
        finally:
            faulthandler.unregister(signal.SIGUSR1)


def _pickled(result: Any) -> bytes:
    try:
        return pickle.dumps(result)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"a rank's result travels pickled, and this {type(result).__name__} cannot be: {error}; return numbers, strings, "
            "tensors, or lists and dicts of them"
        ) from error


def _end_with_supervisor(connection: Connection, folder: str) -> None:
    """The supervisor never writes: reading ends when it closes its side or dies, and this rank has no reason to go on."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv_bytes()
    for path in Path(folder).glob("pid*"):  # a stopped rank cannot see it: woken, it does
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(path.read_text()), signal.SIGCONT)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
