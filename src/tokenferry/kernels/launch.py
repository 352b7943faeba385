"""The one launcher: a kernel is compiled and loaded once, and its launches are bound to the arguments that never change.

Names of arguments stand once, in the `SIGNATURE` beside each kernel. They are resolved when a launch is bound; what `bind`
returns is called with the other arguments by position, so that a step spends no host time on names, or on Triton's analysis of
arguments.

Example:
    launch = load(specify(counts_kernel, SIGNATURE, {"LANES": 32, "PDL": 1}, num_warps=1), device)
    count = launch.bind({"rank": 0, "size": 2, ...}, varying=("num_tokens", "flags"), grid=1)
    count(17, 0)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from tokenferry.errors import UsageError
from tokenferry.kernels import driver_launch, wire

DTYPES: Mapping[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}

TYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}
"""As signatures have them."""

REGISTERS_PER_SM = 65536
"""On every NVIDIA GPU since 2014."""
PDL_MAJOR = 9
"""Hopper and newer can let a kernel begin before the one before it ends."""
POINTER_ALIGNMENT = 16
"""Bytes. Where every pointer is a multiple of it, packets and rows are loaded and stored in the widest accesses."""

BoundLaunch = Callable[..., None]
"""A launch whose fixed arguments are in place: called with the others by position, in the order that `bind` was given. One thread
at a time may call it."""


@dataclass(frozen=True)
class KernelSpec:
    """One compiled variant of a kernel. Equal specs are one kernel: see `KernelStore`.

    Attributes:
        kernel: the function that `triton.jit` made.
        signature: type of every argument by name, in order; "constexpr" for constants.
        constants: value of each constexpr argument.
        num_warps, num_stages: of the compiler.
        aligned: every pointer argument is a multiple of 16 bytes.
        max_registers: of a thread; None: as the assembler likes.
    """

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    aligned: bool
    max_registers: int | None = None

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.fn.__name__)

    @property
    def argument_types(self) -> dict[str, str]:
        """Of the arguments that a launch is given, by name, in order."""
        return {name: kind for name, kind in self.signature if kind != "constexpr"}

    def source(self) -> ASTSource:
        """What Triton compiles."""
        return source(self.kernel, dict(self.signature), dict(self.constants), aligned=self.aligned)

    def options(self) -> dict[str, Any]:
        """Compiler options."""
        return options(self.num_warps, bool(dict(self.constants)["PDL"]), self.num_stages, self.max_registers)


def specify(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int = 3,
    dtypes: Mapping[str, torch.dtype] | None = None,
    descriptors: Mapping[str, Sequence[int]] | None = None,
    aligned: bool = False,
    max_registers: int | None = None,
) -> KernelSpec:
    """A variant of a kernel.

    Args:
        signature: the kernel's own, with placeholders such as "*DTYPE" where a pointer's type varies.
        dtypes: what the placeholders stand for, e.g. {"DTYPE": torch.bfloat16}.
        descriptors: arguments that are tensor descriptors in place of pointers, with the block that each loads.
        constants, num_warps, num_stages, aligned, max_registers: see `KernelSpec`. 3 stages are Triton's default.
    """
    pointers = {f"*{placeholder}": f"*{TYPE_NAMES[dtype]}" for placeholder, dtype in (dtypes or {}).items()}
    resolved = {name: pointers.get(kind, kind) for name, kind in signature.items()}
    for name, block in (descriptors or {}).items():
        resolved[name] = f"tensordesc<{resolved[name].removeprefix('*')}{list(block)}>"
    return KernelSpec(kernel, tuple(resolved.items()), tuple(constants.items()), num_warps, num_stages, aligned, max_registers)


def source(kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], *, aligned: bool = False) -> ASTSource:
    """What Triton compiles: argument types are fixed, so no value of an argument ever needs another variant."""
    pointers = [position for position, kind in enumerate(signature.values()) if kind.startswith("*")]
    attributes = {(position,): [["tt.divisibility", POINTER_ALIGNMENT]] for position in pointers} if aligned else None
    return ASTSource(kernel, signature=dict(signature), constexprs=dict(constants), attrs=attributes)


def options(num_warps: int, pdl: bool, num_stages: int = 3, max_registers: int | None = None) -> dict[str, Any]:
    """Compiler options. Fusion is off: a sum's bits are promised, and Triton's default changes."""
    limit = {} if max_registers is None else {"maxnreg": max_registers}
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False, "launch_pdl": pdl, **limit}


class Launch:
    """A kernel ready to run."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec

    @property
    def resident(self) -> int:
        """The most programs of it that the device holds at once."""
        raise NotImplementedError

    def __call__(self, grid: int, *args: Any) -> None:
        """Runs `grid` programs on the current stream. All arguments by position, as in the signature."""
        raise NotImplementedError

    def bind(self, fixed: Mapping[str, Any], varying: Sequence[str] = (), *, grid: int | None = None) -> BoundLaunch:
        """This launch with `fixed` arguments by name, again and again.

        Args:
            fixed: values of arguments that stay. Tensors among them must live as long as what is returned.
            varying: names of all others, in the order in which they will be given. Pointers are given as tensors.
            grid: number of programs; None: it is given at every call, before the others.

        Raises:
            UsageError: an argument of the kernel is missing, named twice, or not one of its own. Nothing has been launched.
        """
        self._check_names(fixed, varying)
        return self._bind(fixed, tuple(varying), grid)

    def _check_names(self, fixed: Mapping[str, Any], varying: Sequence[str]) -> None:
        wanted, given = list(self.spec.argument_types), [*fixed, *varying]
        faults = {
            "unknown": [name for name in dict.fromkeys(given) if name not in wanted],
            "missing": [name for name in wanted if name not in given],
            "named twice": [name for name in dict.fromkeys(given) if given.count(name) > 1],
        }
        said = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        if said:
            raise UsageError(
                f"{self.spec.name} has {len(wanted)} arguments and bind was given {len(given)} names; {said}. "
                f"Give each of {', '.join(wanted)} once, as fixed or as varying"
            )

    def _bind(self, fixed: Mapping[str, Any], varying: tuple[str, ...], grid: int | None) -> BoundLaunch:
        """Puts the fixed arguments in their places at every call."""
        names = list(self.spec.argument_types)
        if list(varying) == names:
            return self.__call__ if grid is None else functools.partial(self.__call__, grid)
        positions = [names.index(name) for name in varying]
        template = [fixed.get(name) for name in names]

        def launch_grid(num_programs: int, *args: Any) -> None:
            full = list(template)
            for position, value in zip(positions, args, strict=True):
                full[position] = value
            self(num_programs, *full)

        return launch_grid if grid is None else functools.partial(launch_grid, grid)


def _any_payload() -> AbstractContextManager[Any]:
    """Around an interpreted kernel: numpy must not warn of infinities and NaNs, which are payload. GPUs need no numpy, so that it
    is imported here alone."""
    import numpy as np

    return np.errstate(all="ignore")


class InterpretedLaunch(Launch):
    """Programs one after another, in this thread. Of kernels that wait for peers there may be one only: a second would never
    begin while the first waits."""

    @property
    def resident(self) -> int:
        """See `Launch`."""
        return 1

    def __call__(self, grid: int, *args: Any) -> None:
        """See `Launch`."""
        plain = [int(arg) if isinstance(arg, bool) else arg for arg in args]  # Triton 3.6's interpreter refuses a bool as "int1"
        with _any_payload():
            self.spec.kernel[(grid,)](*plain, **dict(self.spec.constants))


class CompiledLaunch(Launch):
    """A kernel in the memory of one GPU."""

    def __init__(self, spec: KernelSpec, device: torch.device) -> None:
        super().__init__(spec)
        self._device_index = torch.cuda.current_device() if device.index is None else device.index
        with torch.cuda.device(self._device_index):
            compiled = triton.compile(spec.source(), options=spec.options())
            compiled._init_handles()  # loads the module: that waits for the device, so never later, while a peer spins
        self._compiled, self._run, self._function = compiled, compiled.run, compiled.function
        self._metadata, self._constants = compiled.packed_metadata, tuple(value for _, value in spec.constants)

    @property
    def resident(self) -> int:
        """See `Launch`. A launch that waits for peers must not have more: a program that waits for room cannot send what the
        peers' waiting programs, and through them its own, wait for."""
        properties = torch.cuda.get_device_properties(self._device_index)
        threads = self._compiled.metadata.num_warps * properties.warp_size
        registers = -(-self._compiled.n_regs // 8) * 8 * threads
        by_threads = properties.max_threads_per_multi_processor // threads
        return int(properties.multi_processor_count * min(by_threads, REGISTERS_PER_SM // registers))

    def __call__(self, grid: int, *args: Any) -> None:
        """See `Launch`."""
        if torch._C._cuda_getDevice() != self._device_index:  # its default stream would have the same handle as this one's
            with torch.cuda.device(self._device_index):  # takes microseconds, which most calls are spared
                self(grid, *args)
            return
        words = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
        stream = torch._C._cuda_getCurrentRawStream(self._device_index)
        self._run(grid, 1, 1, stream, self._function, self._metadata, None, None, None, *words, *self._constants)

    @functools.cached_property
    def _driver_kernel(self) -> driver_launch.DriverKernel | None:
        """None where the kernel wants anything that only Triton's launcher knows."""
        types = self.spec.argument_types
        driver, shape = driver_launch.find_driver(), driver_launch.launch_shape(self._compiled, types)
        if driver is None or shape is None:
            return None
        return driver_launch.DriverKernel(
            driver=driver,
            function=self._function,
            shape=shape,
            types=types,
            current_stream=functools.partial(torch._C._cuda_getCurrentRawStream, self._device_index),
        )

    def _bind(self, fixed: Mapping[str, Any], varying: tuple[str, ...], grid: int | None) -> BoundLaunch:
        """By the driver itself where the kernel takes its arguments as expected, else by Triton's launcher."""
        fallback, kernel = super()._bind(fixed, varying, grid), self._driver_kernel
        if kernel is None:
            return fallback
        words = {name: _word(value) for name, value in fixed.items()}
        bound = driver_launch.bind(kernel, grid, words, varying, fallback)
        is_pointer = [kernel.types[name].startswith("*") for name in varying]
        if not any(is_pointer):
            return bound
        is_tensor = is_pointer if grid is not None else [False, *is_pointer]

        def by_address(*args: Any) -> None:
            bound(*[arg.data_ptr() if tensor else arg for arg, tensor in zip(args, is_tensor, strict=True)])

        return by_address


def _word(argument: Any) -> Any:
    """A tensor's address in its place."""
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


def load(spec: KernelSpec, device: torch.device) -> Launch:
    """Compiles (or finds in Triton's cache) and loads a kernel."""
    return InterpretedLaunch(spec) if wire.INTERPRETED else CompiledLaunch(spec, device)


def prepare(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int,
    device: torch.device,
    *,
    max_registers: int | None = None,
) -> Launch:
    """`load` of a variant whose signature has no placeholders."""
    return load(specify(kernel, signature, constants, num_warps=num_warps, max_registers=max_registers), device)


def launch_unbound(
    kernel: Any, grid: int, arguments: Sequence[Any], constants: Mapping[str, Any], *, num_warps: int, device: torch.device
) -> None:
    """Runs `grid` programs on the current stream of `device`, for plain functions, which have nothing to keep a loaded kernel in.
    `arguments` are in the order of the signature.

    Triton keeps what it has compiled with the function, and finds it again by analysing the arguments at each call. Unlike a
    bound launch, this may be called by several threads at once.
    """
    if wire.INTERPRETED:
        with _any_payload():
            kernel[(grid,)](*arguments, **constants)
    elif torch._C._cuda_getDevice() != device.index:  # Triton takes the current device, whatever device the arguments are on
        with torch.cuda.device(device):
            launch_unbound(kernel, grid, arguments, constants, num_warps=num_warps, device=device)
    else:
        kernel.run(
            *arguments,
            grid=(grid,),
            warmup=False,
            **constants,
            num_warps=num_warps,
            enable_fp_fusion=False,
            launch_pdl=constants["PDL"],
        )


def has_pdl(device: torch.device) -> bool:
    """Whether kernels there may begin before the one before them ends (programmatic dependent launch). Where nothing is
    interpreted, a CPU stands for the newest GPUs: kernels are compiled without one."""
    return not wire.INTERPRETED and (device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= PDL_MAJOR)


class KernelStore:
    """Kernels by what they are compiled for, each loaded once on this device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loaded: dict[KernelSpec, Launch] = {}

    def load(self, spec: KernelSpec) -> Launch:
        """The kernel, compiled (or found in Triton's cache) and loaded at its first mention."""
        launch = self._loaded.get(spec)
        if launch is None:
            launch = self._loaded[spec] = load(spec, self._device)
        return launch

    def load_all(self, specs: Iterable[KernelSpec]) -> None:
        """Loads these kernels, in an order that differs between the GPUs of a host.

        Their ranks want the same kernels at the same time and share Triton's cache. Were each to begin with the first one, all
        would compile everything. So each begins with its own part, and finds what the others have compiled when it gets there.
        """
        for spec in in_order_of(list(dict.fromkeys(specs)), *_place_on_host(self._device)):
            self.load(spec)


def in_order_of(specs: Sequence[KernelSpec], place: int, num_places: int) -> list[KernelSpec]:
    """The specs in a circle, begun where the part of this one of `num_places` begins.

    Example:
        The third of four that share eight kernels compiles 4, 5, 6, 7 and then 0, 1, 2, 3.
    """
    begin = len(specs) * place // num_places
    return [*specs[begin:], *specs[:begin]]


def _place_on_host(device: torch.device) -> tuple[int, int]:
    """Which of the host's GPUs this is, and how many this process sees: the first of one, if each rank sees its own alone."""
    if device.type != "cuda":
        return 0, 1
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.device_count()


def check_addresses(addresses: Sequence[int]) -> None:
    """Peers' buffers must be 16-byte aligned: packets are stored whole."""
    assert all(address % POINTER_ALIGNMENT == 0 for address in addresses), "allocators align to far more"
