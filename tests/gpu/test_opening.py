"""How long opening takes, in fresh processes: first with an empty Triton cache, then with what the first left there."""

import time
from pathlib import Path

import pytest
import torch

import tokenferry as tf
from tokenferry.testing import run_ranks
from tokenferry.transports.symmetric.buffer import SymmetricBuffer

COLD_S, WARM_S = 60.0, 2.0
CONFIG = tf.MoEConfig(hidden_size=7168, num_experts=64, topk=8)


def opened(group: tf.EPGroup) -> tuple[float, float]:
    """Seconds in `tf.Workspace(...)`, and in a small symmetric buffer before it.

    The first has: agreeing, loading Triton, compiling or finding all kernels, loading them, our buffer and filling it. Not in
    it: importing PyTorch, CUDA's start, and what PyTorch does once a process for symmetric memory; the small buffer pays for it.
    """
    torch.zeros(1, device=group.device)
    torch.cuda.synchronize()
    group.channel.barrier(group.unique_name("test/started"), 120.0)
    start = time.monotonic()
    SymmetricBuffer(group, 1 << 20, group.unique_name("test/buffer"), 120.0).close()
    rendezvous_s = time.monotonic() - start
    group.channel.barrier(group.unique_name("test/ready"), 120.0)
    start = time.monotonic()
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=128, transport="p2p") as ws:
        opened_s = time.monotonic() - start
        assert 0 < ws.opened_s <= opened_s
        ws.begin_step(1)
        torch.cuda.synchronize()
        ws.check()
        group.channel.barrier(group.unique_name("test/used"), 60.0)
    return opened_s, rendezvous_s


@pytest.mark.gpu(count=2)
def test_opening_cold_and_warm(tmp_path: Path) -> None:
    env = {"TRITON_CACHE_DIR": str(tmp_path)}
    cold = run_ranks(opened, 2, backend="nccl", timeout_s=150, env=env)
    warm = run_ranks(opened, 2, backend="nccl", timeout_s=90, env=env)
    told = ", ".join(f"{name} {max(s for s, _ in times):.2f} s" for name, times in (("cold", cold), ("warm", warm)))
    print(f"\nopening: {told}; PyTorch's own first rendezvous {max(s for _, s in warm):.2f} s")
    assert max(s for s, _ in cold) <= COLD_S, told
    assert max(s for s, _ in warm) <= WARM_S, told
