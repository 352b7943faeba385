"""Ranks for tests: processes under one supervisor, or threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal

import torch
import torch.distributed as dist

from tokenferry import env as env_table
from tokenferry.errors import UsageError, check_kind
from tokenferry.groups import EPGroup, ThreadRanks
from tokenferry.supervisor import run_processes

Backend = Literal["gloo", "nccl"]


def run_ranks(
    worker: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: Backend = "gloo",
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Runs `worker(group, *args)` in `world_size` processes and returns the results in rank order.

    Args:
        worker: a plain module-level function; in a notebook, with cloudpickle installed, any function. `group` is the `EPGroup`
            of all ranks.
        backend: "gloo" puts rank r on the CPU, "nccl" on CUDA device r.
        timeout_s: deadline for the whole call, after which the stuck ranks are named.
        env: environment variables of the ranks, set before they import anything.

    Raises:
        RankFailedError: the FIRST failure, with its rank and traceback; the other ranks are ended.
        ConfigError: `worker` is no such function, or the program cannot be imported by rank processes; see
            `supervisor.run_processes`.
        UsageError: torchrun started this process already.
    """
    check_kind("worker", worker, Callable)  # type: ignore[arg-type]
    place = env_table.read(env_table.TorchrunSettings)
    if place.active and (place.world_size or 1) > 1:
        raise UsageError(
            f"run_ranks starts rank processes itself, but RANK={place.rank} and WORLD_SIZE={place.world_size} say that torchrun "
            "started this one: make its group with EPGroup(torch.distributed.group.WORLD), after init_process_group(); or start "
            "the program with python, without these variables"
        )
    return run_processes(_with_group, world_size, (worker, backend, args), timeout_s=timeout_s, env=env)


def _with_group(rank: int, world_size: int, store_path: str, worker: Callable[..., Any], backend: Backend, args: Any) -> Any:
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    store = dist.FileStore(store_path, world_size)
    return worker(EPGroup.from_store(store, rank, world_size, device), *args)


def virtual_ranks(num_ranks: int, device: torch.device | str = "cpu") -> list[EPGroup]:
    """Groups for `num_ranks` ranks within this process, each to be used by a thread of its own (see `run_virtual`)."""
    store, threads = dist.HashStore(), ThreadRanks()
    return [EPGroup.from_store(store, rank, num_ranks, device, threads=threads) for rank in range(num_ranks)]


def run_virtual(worker: Callable[..., Any], num_ranks: int, *args: Any, device: torch.device | str = "cpu") -> list[Any]:
    """Runs `worker(group, *args)` on `num_ranks` threads, on CUDA each on a stream of its own; results in rank order.

    The first exception that a rank raises is raised here, after all threads have ended.
    """
    groups = virtual_ranks(num_ranks, device)

    def run(group: EPGroup) -> Any:
        if group.device.type != "cuda":
            return worker(group, *args)
        torch.cuda.set_device(group.device)
        with torch.cuda.stream(torch.cuda.Stream(group.device)):
            result = worker(group, *args)
            torch.cuda.current_stream().synchronize()
        return result

    with ThreadPoolExecutor(num_ranks) as pool:
        futures = [pool.submit(run, group) for group in groups]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
