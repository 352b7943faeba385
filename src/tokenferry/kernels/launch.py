"""Compiled kernels, launched without Triton's analysis of arguments: all are compiled and loaded when a workspace opens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from tokenferry.kernels import direct_launch, wire

DTYPES: Mapping[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}

REGISTERS_PER_SM = 65536
"""On every NVIDIA GPU since 2014."""


PROGRAMS_PER_SM = 2
"""More do not help: round trips of 2 x H100 at T = 128 to 4096, 2026-11-22."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How kernels are cut into programs.

    Attributes:
        num_warps: of a dispatch or combine program; each thread handles one packet at a time.
        max_programs: most programs of a launch.
    """

    num_warps: int
    max_programs: int

    @property
    def block(self) -> int:
        """Packets of a program at a time."""
        return self.num_warps * 32


def tuning_for(num_packets: int, num_sms: int) -> Tuning:
    """The fewest warps with which one wave of programs has a thread for each packet of the largest step in slots.

    Small programs begin sooner, large ones keep more packets under way: on 2 x H100 (2026-11-22) 4 warps were best up to 132
    programs, 8 up to 264, and 16 from there on.
    """
    for num_warps, programs in ((4, num_sms), (8, PROGRAMS_PER_SM * num_sms)):
        if num_packets <= num_warps * 32 * programs:
            return Tuning(num_warps=num_warps, max_programs=PROGRAMS_PER_SM * num_sms)
    return Tuning(num_warps=16, max_programs=PROGRAMS_PER_SM * num_sms)


Bound = Callable[..., None]
"""A launch whose constant arguments are in place: called with the others, in the order of the signature."""


class Launch(Protocol):
    """A kernel ready to run. `resident`: the most programs of it that the device holds at once."""

    @property
    def resident(self) -> int: ...

    def __call__(self, grid: int, *args: int) -> None:
        """Runs `grid` programs on the current stream."""

    def bind(self, grid: int, **fixed: int) -> Bound:
        """The same, again and again, with `fixed` arguments by name. One thread at a time may call what this returns."""


@dataclass(frozen=True)
class InterpretedLaunch:
    """One program, in this thread: the interpreter would run several one after another, and the first would wait for ever."""

    kernel: Any
    constants: Mapping[str, Any]
    resident: int = 1

    def __call__(self, grid: int, *args: int) -> None:
        """See `Launch`."""
        with np.errstate(all="ignore"):  # infinities and NaNs are payload
            self.kernel[(1,)](*args, **self.constants)

    def bind(self, grid: int, **fixed: int) -> Bound:
        """See `Launch`."""
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        return _in_order(names, fixed, lambda *args: self(grid, *args))


class CompiledLaunch:
    """A kernel in the memory of one GPU."""

    def __init__(self, compiled: Any, signature: Mapping[str, str], constants: Mapping[str, Any], device_index: int) -> None:
        compiled._init_handles()  # loads the module: that waits for the device, so never later, while a peer spins
        self._compiled, self._run, self._function = compiled, compiled.run, compiled.function
        self._metadata, self._constants = compiled.packed_metadata, tuple(constants.values())
        self._types = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        self._device_index = device_index
        self.resident = _resident(compiled, device_index)

    def __call__(self, grid: int, *args: int) -> None:
        """See `Launch`."""
        with torch.cuda.device(self._device_index):  # another one may be current, and have a default stream with the same handle
            stream = torch._C._cuda_getCurrentRawStream(self._device_index)
            self._run(grid, 1, 1, stream, self._function, self._metadata, None, None, None, *args, *self._constants)

    def bind(self, grid: int, **fixed: int) -> Bound:
        """See `Launch`. By the driver itself where the kernel takes its arguments as expected, else by Triton's launcher."""
        fallback = _in_order(list(self._types), fixed, lambda *args: self(grid, *args))
        driver = direct_launch.find_driver()
        shape = direct_launch.launch_shape(self._compiled, self._types)
        if driver is None or shape is None:
            return fallback
        index, current = self._device_index, torch._C._cuda_getCurrentRawStream
        return direct_launch.bind(
            driver, self._function, shape, grid, self._types, fixed, functools.partial(current, index), fallback
        )


def _in_order(names: Sequence[str], fixed: Mapping[str, int], run: Callable[..., None]) -> Bound:
    """Calls `run` with all arguments, the fixed ones in their places."""
    varying = [names.index(name) for name in names if name not in fixed]
    template = [fixed.get(name, 0) for name in names]

    def bound(*args: int) -> None:
        full = list(template)
        for place, value in zip(varying, args, strict=True):
            full[place] = value
        run(*full)

    return bound


def _resident(compiled: Any, device_index: int) -> int:
    """Programs that the whole GPU holds at once, which a launch must not exceed: one that waits for room cannot send what the
    peers' waiting programs, and through them its own, wait for."""
    properties = torch.cuda.get_device_properties(device_index)
    threads = compiled.metadata.num_warps * properties.warp_size
    registers = -(-compiled.n_regs // 8) * 8 * threads
    by_threads = properties.max_threads_per_multi_processor // threads
    return int(properties.multi_processor_count * min(by_threads, REGISTERS_PER_SM // registers))


def source(kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any]) -> ASTSource:
    """What Triton compiles: argument types are fixed, so no value of an argument ever needs another variant."""
    return ASTSource(kernel, signature=dict(signature), constexprs=dict(constants))


def options(num_warps: int, pdl: bool) -> dict[str, Any]:
    """Compiler options. Fusion is off: a sum's bits are promised, and Triton's default changes."""
    return {"num_warps": num_warps, "enable_fp_fusion": False, "launch_pdl": pdl}


def prepare(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], num_warps: int, device: torch.device
) -> Launch:
    """Compiles (or finds in Triton's cache) and loads a kernel."""
    if wire.INTERPRETED:
        return InterpretedLaunch(kernel, constants)
    with torch.cuda.device(device):
        compiled = triton.compile(source(kernel, signature, constants), options=options(num_warps, bool(constants["PDL"])))
        return CompiledLaunch(compiled, signature, constants, device.index)


def check_addresses(addresses: Sequence[int]) -> None:
    """Peers' buffers must be 16-byte aligned: packets are stored whole."""
    assert all(address % 16 == 0 for address in addresses), "allocators align to far more"
