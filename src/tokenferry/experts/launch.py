"""Kernels of the experts, compiled for one configuration and loaded once, launched without Triton's analysis of arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from triton.compiler import ASTSource

from tokenferry.kernels import wire
from tokenferry.kernels.expert_gemm import QUANTIZE_SIGNATURE, expert_gemm_kernel, quantize_rows_kernel
from tokenferry.kernels.expert_gemm import SIGNATURE as GEMM_SIGNATURE
from tokenferry.kernels.expert_sum import SIGNATURE as SUM_SIGNATURE
from tokenferry.kernels.expert_sum import expert_sum_kernel
from tokenferry.kernels.expert_table import SIGNATURE as TABLE_SIGNATURE
from tokenferry.kernels.expert_table import expert_table_kernel

TYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}
INTERPRETED_PROGRAMS = 3
"""Programs run one after another in the interpreter; more than one, so that the sharing of tiles is tried."""

KERNELS: Mapping[str, tuple[Any, Mapping[str, str]]] = {
    "table": (expert_table_kernel, TABLE_SIGNATURE),
    "gemm": (expert_gemm_kernel, GEMM_SIGNATURE),
    "quantize": (quantize_rows_kernel, QUANTIZE_SIGNATURE),
    "sum": (expert_sum_kernel, SUM_SIGNATURE),
}


@dataclass(frozen=True)
class KernelSpec:
    """One compiled variant. Equal specs are one kernel.

    Attributes:
        name: key of `KERNELS`.
        types: what the placeholders of its signature stand for, e.g. ("DTYPE", torch.bfloat16).
        constants: values of the constexpr arguments, in the order of the signature.
        num_warps, num_stages: of the compiler.
        aligned: every pointer is a multiple of 16 bytes.
        block: of the weights' tensor descriptor; empty where weights are a pointer.
    """

    name: str
    types: tuple[tuple[str, torch.dtype], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    aligned: bool = True
    block: tuple[int, ...] = ()

    def source(self) -> ASTSource:
        """What Triton compiles: argument types are fixed, so that no value of an argument ever needs another variant."""
        kernel, signature = KERNELS[self.name]
        types = {f"*{placeholder}": f"*{TYPE_NAMES[dtype]}" for placeholder, dtype in self.types}
        signature = {name: types.get(kind, kind) for name, kind in signature.items()}
        if self.block:
            signature["weights"] = f"tensordesc<{signature['weights'][1:]}{list(self.block)}>"
        pointers = [place for place, kind in enumerate(signature.values()) if kind.startswith("*")]
        attributes = {(place,): [["tt.divisibility", 16]] for place in pointers} if self.aligned else {}
        return ASTSource(kernel, signature=signature, constexprs=dict(self.constants), attrs=attributes)

    def options(self) -> dict[str, Any]:
        """Compiler options. Fusion is off: Triton's default changes, and with it the bits."""
        pdl = bool(dict(self.constants)["PDL"])
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False, "launch_pdl": pdl}


class LoadedKernel:
    """A kernel in the memory of one GPU, or in the interpreter."""

    def __init__(self, spec: KernelSpec, device: torch.device) -> None:
        self._constants = dict(spec.constants)
        self._kernel, _ = KERNELS[spec.name]
        self._compiled: Any = None
        if not wire.INTERPRETED:
            self._device_index = device.index if device.index is not None else torch.cuda.current_device()
            with torch.cuda.device(self._device_index):
                self._compiled = triton.compile(spec.source(), options=spec.options())
                self._compiled._init_handles()  # loads the module: that waits for the device, so never later
            self._tail = tuple(self._constants.values())

    def __call__(self, grid: int, *args: Any) -> None:
        """Runs `grid` programs on the current stream."""
        if self._compiled is None:
            with np.errstate(all="ignore"):  # infinities and NaNs are payload
                self._kernel[(grid,)](*args, **self._constants)
            return
        compiled = self._compiled
        stream = torch._C._cuda_getCurrentRawStream(self._device_index)
        words = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
        compiled.run(grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *words, *self._tail)


class KernelStore:
    """Kernels by what they are compiled for, each loaded once on this device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loaded: dict[KernelSpec, LoadedKernel] = {}

    def load(self, spec: KernelSpec) -> LoadedKernel:
        """The kernel, compiled (or found in Triton's cache) and loaded at its first mention."""
        kernel = self._loaded.get(spec)
        if kernel is None:
            kernel = self._loaded[spec] = LoadedKernel(spec, self._device)
        return kernel
