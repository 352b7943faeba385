"""Rank processes that are started once and then run one test's worker after another.

Starting a rank process takes seconds: torch is imported, CUDA and NCCL come up, kernels are loaded. The fixture `on_ranks` of
conftest.py is called like `tokenferry.testing.run_ranks` and keeps its processes for all tests of a file. Every call gets a
group and a store of its own, and after it each process puts torch's state back as it was. A worker that fails or hangs takes its
processes with it; the next test gets new ones. Tests that kill their ranks, or measure a fresh process, use `run_ranks`.
"""

import contextlib
import faulthandler
import gc
import os
import pickle
import queue
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tokenferry.errors import RankFailedError
from tokenferry.groups import EPGroup
from tokenferry.supervisor import run_processes
from tokenferry.testing.ranks import Backend

START_S = 150.0
"""Until all processes of a pool have started; a call's own time begins after that."""
END_S = 60.0
CALL_S = 240.0
"""For a call, which may be one of many interpreted launches on a busy machine. pytest ends a test after 300."""


class RankPools:
    """Called like `run_ranks`. Keeps one pool for each backend, environment and, on GPUs, number of ranks."""

    def __init__(self) -> None:
        self._pools: list[RankPool] = []

    def __call__(
        self,
        worker: Callable[..., Any],
        world_size: int,
        *args: Any,
        backend: Backend = "gloo",
        timeout_s: float = CALL_S,
        env: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """See `tokenferry.testing.run_ranks`."""
        call = pickle.dumps((worker, args))  # before anything is started: this fails without harm
        pool = self._pool(world_size, backend, dict(env or {}))
        try:
            return pool.run(call, world_size, timeout_s)
        except BaseException:  # an interrupt too leaves the ranks amid a call
            self._pools.remove(pool)
            pool.kill()
            raise

    def _pool(self, world_size: int, backend: Backend, env: dict[str, str]) -> "RankPool":
        alike = [pool for pool in self._pools if (pool.backend, pool.env) == (backend, env)]
        for pool in alike:
            # PyTorch counts the symmetric buffers of a process, and ranks whose counts differ wait for one another for ever: on
            # GPUs all ranks of a pool take part in every call, but for calls of one rank, which have no such buffer.
            if pool.size == world_size or (pool.size > world_size and (backend == "gloo" or world_size == 1)):
                return pool
        for pool in alike if backend == "gloo" else ():
            self._pools.remove(pool)
            pool.close()
        self._pools.append(RankPool(world_size, backend, env))
        return self._pools[-1]

    def close(self) -> None:
        """Ends all processes. Raises what went wrong in one of them after its last call."""
        with contextlib.ExitStack() as closing:
            for pool in self._pools:
                closing.callback(pool.close)
            self._pools = []


class RankPool:
    """`size` rank processes under one supervisor, which lives in a thread."""

    def __init__(self, size: int, backend: Backend, env: dict[str, str]) -> None:
        self.size, self.backend, self.env = size, backend, env
        self._folder = tempfile.TemporaryDirectory(prefix="rank-pool-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        for rank in range(size):
            os.mkfifo(folder / f"calls{rank}")
        # Open for both directions: neither opening nor writing a few bytes ever waits for the other side.
        self._pipes = [os.open(folder / f"calls{rank}", os.O_RDWR | os.O_CLOEXEC) for rank in range(size)]
        self._said: queue.SimpleQueue[tuple[int, dict[str, Any]] | BaseException | None] = queue.SimpleQueue()
        self._pids: dict[int, int] = {}
        self._num_calls = 0
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    def _supervise(self) -> None:
        try:
            run_processes(
                _serve,
                self.size,
                (self._folder.name, self.backend),
                timeout_s=None,
                env=self.env,
                on_message=lambda rank, message: self._said.put((rank, message)),
            )
            self._said.put(None)
        except BaseException as error:
            self._said.put(error)

    def run(self, call: bytes, world_size: int, timeout_s: float) -> list[Any]:
        """`call` holds a worker and its arguments. Afterwards nothing of it is left, or the pool is to be thrown away."""
        if len(self._pids) < self.size:
            self._pids = {rank: message["pid"] for rank, message in self._hear(range(self.size), "pid", START_S)}
        self._num_calls += 1
        path = Path(self._folder.name, f"call{self._num_calls}")
        path.write_bytes(call)
        for rank in range(world_size):
            os.write(self._pipes[rank], b"%d %d\n" % (self._num_calls, world_size))
        for rank, message in self._hear(range(world_size), "done", timeout_s):
            assert message["done"] == self._num_calls, f"rank {rank}"
        path.unlink()
        return [pickle.loads(Path(f"{path}.result{rank}").read_bytes()) for rank in range(world_size)]

    def _hear(self, ranks: range, what: str, timeout_s: float) -> list[tuple[int, dict[str, Any]]]:
        """One message of each of `ranks`. Raises the first failure of any rank, or the ranks that are stuck."""
        heard: dict[int, dict[str, Any]] = {}
        deadline_s = time.monotonic() + timeout_s
        while len(heard) < len(ranks):
            try:
                said = self._said.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                stuck = [rank for rank in ranks if rank not in heard]
                stacks = "".join(f"\nstack of rank {rank}:\n{self._stack(rank)}" for rank in stuck)
                raise RankFailedError(
                    stuck[0], f"not finished within {timeout_s} s: ranks {stuck} of {len(ranks)}{stacks}"
                ) from None
            if isinstance(said, BaseException):
                raise said
            assert said is not None, "rank processes end only when they are told to"
            assert what in said[1]
            heard[said[0]] = said[1]
        return sorted(heard.items())

    def _stack(self, rank: int) -> str:
        if rank not in self._pids:
            return "(not started yet)\n"
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pids[rank], signal.SIGUSR1)
        time.sleep(0.2)
        return Path(self._folder.name, f"stack{rank}").read_text(errors="replace") or "(no answer)\n"

    def kill(self) -> None:
        """Ends the processes at once. What they were at is not reported."""
        if self._thread.is_alive():
            for pid in self._pids.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._end()

    def close(self) -> None:
        """Lets the processes end. Raises what went wrong in one of them after its last call."""
        for pipe in self._pipes:
            os.write(pipe, b"end\n")
        self._thread.join(END_S)
        failure = None if self._said.empty() else self._said.get()
        hangs = self._thread.is_alive()
        self.kill()
        assert not hangs, f"rank processes did not end within {END_S} s"
        if isinstance(failure, BaseException):
            raise failure

    def _end(self) -> None:
        for pipe in self._pipes:
            os.write(pipe, b"end\n")  # for those that have not told their number yet
        self._thread.join(END_S)
        for pipe in self._pipes:
            os.close(pipe)
        self._pipes = []
        self._folder.cleanup()


# --- in the rank processes --------------------------------------------------------------------------------------------


def _serve(rank: int, _size: int, _store_path: str, folder: str, backend: Backend, *, send: Callable[[Any], None]) -> None:
    """Runs calls until told to end. An exception leaves this function, which ends the process: its group is of no use."""
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    with open(Path(folder, f"stack{rank}"), "w") as stack, open(Path(folder, f"calls{rank}")) as calls:
        faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
        gc.collect()
        gc.freeze()  # what is here for good need not be looked through after every call
        send({"pid": os.getpid()})
        while (line := calls.readline()) != "end\n":
            number, world_size = map(int, line.split())
            path = Path(folder, f"call{number}")
            store = dist.FileStore(f"{path}.store", world_size)
            with _state_put_back(device):
                result = _run(path, EPGroup.from_store(store, rank, world_size, device))
            Path(f"{path}.result{rank}").write_bytes(result)
            send({"done": number})


def _run(path: Path, group: EPGroup) -> bytes:
    """A function of its own, so that its frame keeps nothing of the call alive."""
    worker, args = pickle.loads(path.read_bytes())
    return pickle.dumps(worker(group, *args))


@contextlib.contextmanager
def _state_put_back(device: torch.device) -> Iterator[None]:
    """Within it a worker finds torch as in a new process; what it leaves behind (graphs, memory, settings) is gone afterwards."""
    environment, num_threads = dict(os.environ), torch.get_num_threads()
    random.seed(0)
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
        yield
    gc.enable()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_autocast_enabled("cpu", False)
    torch.set_num_threads(num_threads)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)  # imports the compiler, a second
    torch.set_float32_matmul_precision("highest")
    os.environ.clear()
    os.environ.update(environment)
    if device.type == "cuda":
        torch.set_autocast_enabled("cuda", False)
        if torch.cuda.get_sync_debug_mode():
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.default_stream(device))
        torch.cuda.synchronize()  # an error of a kernel belongs to the call that launched it
    gc.collect()  # graphs and buffers that lie in cycles; a workspace that was left open
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
