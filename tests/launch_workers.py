"""What the ranks of `test_launch.py` do. Apart from it, so that each rank process need not import pytest."""

import os
import sys
import time
from pathlib import Path

import torch


def add_rank(rank, world_size, store_path, offset):
    return rank + offset, world_size, torch.get_num_threads()


def meet_through_store(rank, world_size, store_path):
    store = torch.distributed.FileStore(store_path, world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    total = torch.tensor([rank + 1])
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    return total.item(), oct(Path(store_path).parent.stat().st_mode)[-3:], str(Path(store_path).parent)


def fail_in_a_race(rank, world_size, store_path, first):
    """Rank `first` fails, and the others as soon as the time of its failure has been noted."""
    failed = Path(store_path + ".failed")

    class NotedValueError(ValueError):
        def __str__(self):
            failed.touch()  # its text is asked for when the time stands
            return super().__str__()

    while rank != first and not failed.exists():
        time.sleep(0.001)
    raise NotedValueError(f"rank {rank} says no")


def die(rank, world_size, store_path, signum):
    """Rank 1 dies; the others notice and raise, as peers do whose connection breaks."""
    store = torch.distributed.FileStore(store_path, world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    if rank == 1:
        os.kill(os.getpid(), signum)
    torch.distributed.all_reduce(torch.zeros(1))


def hang(rank, world_size, store_path, stuck):
    while rank in stuck:
        time.sleep(0.05)


def leave(rank, world_size, store_path):
    sys.exit(3) if rank == 0 else os._exit(0)


def read_environment(rank, world_size, store_path):
    return os.environ.get("TOKENFERRY_TEST"), "triton" in sys.modules


def report(rank, world_size, store_path, send):
    for step in range(3):
        send({"rank": rank, "step": step})
    return "done"


def hold(rank, world_size, store_path, folder):
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    time.sleep(300)
