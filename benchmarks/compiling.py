"""Compiles kernels for Hopper in many processes, into Triton's cache. It needs no GPU."""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor

import torch
import triton
from triton.backends.compiler import GPUTarget

from tokenferry.kernels.launch import KernelSpec

WANTED: list[KernelSpec] = []
"""What the processes compile. They are forks, since a kernel cannot be pickled."""


def compile_spec(number: int) -> str:
    """What went wrong, if anything did: it fails again, and is told, where the kernel is asked for."""
    spec = WANTED[number]
    torch.set_num_threads(1)
    try:
        triton.compile(spec.source(), target=GPUTarget("cuda", 90, 32), options=spec.options())
    except Exception as error:  # noqa: BLE001 - compilers raise anything
        return f"{spec.name}: {type(error).__name__}"
    return ""


def compile_all(specs: Iterable[KernelSpec], processes: int, meanwhile: Callable[[], None] | None = None) -> list[str]:
    """What went wrong. `meanwhile` is called once all processes are forked, which a process with a CUDA context cannot be."""
    WANTED[:] = dict.fromkeys(specs)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        results = pool.map(compile_spec, range(len(WANTED)))
        if meanwhile is not None:
            meanwhile()
        return [text for text in results if text]
