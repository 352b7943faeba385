"""What the hardware can do at most, measured in the same run, and what it is."""

from __future__ import annotations

import datetime
import statistics
from typing import Any, Final, Literal

import torch

from tokenferry.benchmarking.timing import MEETING_TIMEOUT_S, GroupTimer, elapsed_us
from tokenferry.errors import DeviceError
from tokenferry.transports.symmetric.buffer import SymmetricBuffer

Device = Literal["cpu", "cuda"]

COPY_BYTES: Final = 256 << 20
REHEARSED_RATES: Final = (10.0, 0.01)
"""GB/s and TFLOP/s that stand in for measurements on CPUs."""
NO_GPU: Final = "none (rehearsal)"
"""In the records of a rehearsal."""


def copy_rate(timer: GroupTimer) -> float:
    """GB/s of a plain copy into the next rank's memory, all ranks at once; the slowest rank's median of 8.

    0.0 where there is nothing to measure: one rank, or no GPUs. Collective over the timer's group.
    """
    group = timer.group
    if group.size == 1 or group.device.type != "cuda":
        return 0.0
    buffer = SymmetricBuffer(group, 2 * COPY_BYTES, group.unique_name("bench/copy"), MEETING_TIMEOUT_S)
    target = buffer.of_peer((group.rank + 1) % group.size)[:COPY_BYTES]
    source = buffer.tensor[COPY_BYTES:]
    times = []
    for _ in range(8):
        timer.meet()
        times.append(elapsed_us(lambda: target.copy_(source)))
    timer.meet()
    return COPY_BYTES / timer.slowest(statistics.median(times)) / 1e3


def device_rates(device: torch.device) -> dict[str, float]:
    """`read_gb_per_s` of a large sum and `gemm_tflops` of a large bfloat16 product on this device: medians of 8."""
    if device.type != "cuda":
        return dict(zip(("read_gb_per_s", "gemm_tflops"), REHEARSED_RATES, strict=True))
    source = torch.zeros(1 << 28, dtype=torch.float32, device=device)
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))

    def sum_up() -> None:
        source.sum()

    def multiply() -> None:
        torch.mm(left, right)

    sum_us, product_us = (statistics.median([elapsed_us(work) for _ in range(9)][1:]) for work in (sum_up, multiply))
    return {"read_gb_per_s": round(source.nbytes / sum_us / 1e3, 1), "gemm_tflops": round(2 * 8192**3 / product_us / 1e6, 1)}


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and date, for every record."""
    if device.type != "cuda":
        return {"gpu": NO_GPU, "torch": torch.__version__}
    import triton

    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def check_gpus(num_ranks: int, device: Device) -> None:
    """Asked before any rank is started.

    Raises:
        DeviceError: `device` is "cuda" and this machine has fewer GPUs than ranks.
    """
    found = torch.cuda.device_count()
    if device == "cuda" and found < num_ranks:
        fewer = f"num_ranks={found} at most, or " if found else ""
        raise DeviceError(
            f"num_ranks is {num_ranks}, but this machine has {found} CUDA GPUs; give {fewer}device='cpu' for a rehearsal, "
            "whose times say nothing"
        )
