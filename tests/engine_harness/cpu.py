"""Lets Megatron's engine run on CPUs: the host's side of torch.cuda, and torch in the place of kernels that insist on CUDA.

For rank processes of their own only: nothing is put back. What is left out thereby: CUDA graphs, streams, and Megatron's own
expert and cache kernels. Its scheduling, its router, its attention metadata and the dispatchers run.
"""

import collections
import contextlib
import functools
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

CPU = torch.device("cpu")
MEMORY_BYTES = 80 << 30
FACTORIES = ("empty", "full", "zeros", "ones", "tensor", "arange", "empty_like", "zeros_like", "randn")


class NoEvent:
    """A CUDA event or stream where everything has happened when the host goes on."""

    def __init__(self, *_arguments: Any, **_options: Any) -> None: ...

    def record(self, *_arguments: Any) -> None: ...

    def wait(self, *_arguments: Any) -> None: ...

    wait_stream = wait_event = wait

    def synchronize(self) -> None: ...

    def record_event(self, *_arguments: Any) -> "NoEvent":
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: "NoEvent") -> float:
        return 0.0


def stand_in_for_cuda() -> None:
    """Before Megatron is imported: torch.cuda answers as one idle GPU whose memory is the CPU's."""
    torch.compile = uncompiled  # its tables of torch.cuda's functions take none of those below

    def nothing(*_arguments: Any, **_options: Any) -> None: ...

    cuda = torch.cuda
    for name in ("synchronize", "empty_cache", "set_device", "set_stream"):
        setattr(cuda, name, nothing)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = nothing
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 1
    cuda.is_current_stream_capturing = lambda: False
    cuda.memory_stats = lambda *_, **__: collections.defaultdict(int)
    cuda.memory_snapshot = lambda *_, **__: []
    cuda.mem_get_info = lambda *_: (MEMORY_BYTES, MEMORY_BYTES)
    properties = SimpleNamespace(total_memory=MEMORY_BYTES, multi_processor_count=132, major=9, minor=0)
    cuda.get_device_properties = lambda *_: properties
    cuda.Event = cuda.Stream = NoEvent
    cuda.current_stream = cuda.default_stream = lambda *_: NoEvent()
    cuda.stream = lambda _stream: contextlib.nullcontext()
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self


def uncompiled(function: Callable[..., Any] | None = None, **_options: Any) -> Any:
    """In the place of torch.compile, as a decorator with arguments too."""
    return uncompiled if function is None else function


def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes tensors, with "cuda" taken for the CPU."""

    def make(*arguments: Any, **options: Any) -> Any:
        options.pop("pin_memory", None)
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = CPU
        return factory(*arguments, **options)

    return make


def stand_in_for_kernels() -> None:
    """After Megatron is imported: its kernels that assert CUDA tensors, or that Triton's interpreter cannot run, in torch."""
    from tokenferry.integrations.megatron import fused_moe

    def append(
        layer_number: int,
        key: torch.Tensor,
        value: torch.Tensor,
        memory_buffer: torch.Tensor,
        padded_active_token_count: int,
        token_to_block_idx: torch.Tensor,
        token_to_local_position_within_kv_block: torch.Tensor,
    ) -> None:
        count = padded_active_token_count
        places = token_to_block_idx[:count].long(), token_to_local_position_within_kv_block[:count].long()
        for cache, rows in zip(memory_buffer[:, layer_number], (key, value), strict=True):
            cache[places] = rows[:count].squeeze(1)

    module = importlib.import_module
    experts_module = module("megatron.core.transformer.moe.experts")

    @functools.wraps(experts_module.vllm_fused_moe)  # whose parameters `install(experts=True)` compares with those it knows
    def experts(*arguments: Any, **options: Any) -> torch.Tensor:
        return fused_moe(*arguments, **options)

    experts_module.vllm_fused_moe = experts
    module("megatron.core.inference.contexts.dynamic_context").triton_append_key_value_cache = append
    tracker = module("megatron.core.tensor_parallel.random").CudaRNGStatesTracker
    tracker.fork = lambda self, *_: contextlib.nullcontext()
