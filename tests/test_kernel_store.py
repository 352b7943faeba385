"""In which order the ranks of a host load their kernels."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import pytest
import torch

from tokenferry.kernels import launch
from tokenferry.kernels.abort import SIGNATURE as ABORT_SIGNATURE
from tokenferry.kernels.abort import abort_kernel
from tokenferry.kernels.control_words import SIGNATURE as ADD_SIGNATURE
from tokenferry.kernels.control_words import add_kernel
from tokenferry.kernels.launch import KernelStore, in_order_of, specify

ABORT = specify(abort_kernel, ABORT_SIGNATURE, {"PDL": 0}, num_warps=1)
ADD = specify(add_kernel, ADD_SIGNATURE, {"PDL": 0}, num_warps=1)
WIDE_ADD = specify(add_kernel, ADD_SIGNATURE, {"PDL": 0}, num_warps=2)


@dataclass(frozen=True)
class Host:
    """GPUs that share a cache, and the kernels that all of them want."""

    num_gpus: int
    num_kernels: int

    def __str__(self) -> str:
        return f"{self.num_gpus}-gpus-{self.num_kernels}-kernels"


@pytest.mark.parametrize("host", [Host(1, 5), Host(2, 29), Host(4, 8), Host(8, 29), Host(8, 3)], ids=str)
def test_ranks_that_go_on_at_one_pace_compile_each_kernel_once(host: Host) -> None:
    """One kernel at a time on each GPU: but for those that two GPUs begin at the same moment, none is compiled twice."""
    kernels = list(range(host.num_kernels))
    orders = [in_order_of(kernels, gpu, host.num_gpus) for gpu in range(host.num_gpus)]
    assert all(sorted(order) == kernels for order in orders)
    compiled, most = set[int](), 0
    for step in range(host.num_kernels):
        wanted = {order[step] for order in orders} - compiled
        compiled |= wanted
        most += bool(wanted)
    assert most == -(-host.num_kernels // host.num_gpus)  # moments in which anybody compiles


@pytest.mark.parametrize(("gpu", "order"), [(0, (ABORT, ADD, WIDE_ADD)), (1, (ADD, WIDE_ADD, ABORT))], ids=["first", "second"])
def test_each_gpu_of_two_begins_with_its_own_part(gpu: int, order: tuple[object, ...]) -> None:
    loaded: list[object] = []
    device = torch.device("cuda", gpu)
    with (
        mock.patch.object(launch, "load", lambda spec, device: loaded.append(spec) or spec),
        mock.patch.object(torch.cuda, "device_count", lambda: 2),
    ):
        store = KernelStore(device)
        store.load_all([ABORT, ADD, ABORT, WIDE_ADD])
        assert store.load(ADD) is ADD
    assert tuple(loaded) == order
