"""A group on a process group of another device's."""

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from cases import Case, StepCase, run_case
from tokenferry.testing import run_ranks


def on_gloo(group: tf.EPGroup) -> list[int]:
    """Runs a case on this rank's GPU, over a process group that knows CPUs alone; layers compared on each transport."""
    dist.init_process_group("gloo", store=dist.PrefixStore("engine", group.store), rank=group.rank, world_size=group.size)
    torch.cuda.set_device(group.rank)
    on_gpu = tf.EPGroup(dist.group.WORLD, device=f"cuda:{group.rank}")
    assert on_gpu.device == torch.device("cuda", group.rank)
    steps = (StepCase((3, 1), layers=2), StepCase((0, 2)))
    return [run_case(on_gpu, Case(hidden_size=64, transport=transport, steps=steps)) for transport in ("p2p", "collective")]


@pytest.mark.gpu(count=2)
def test_rows_on_gpus_travel_for_a_gloo_group() -> None:
    assert run_ranks(on_gloo, 2, backend="gloo", timeout_s=150) == [[3, 3]] * 2
