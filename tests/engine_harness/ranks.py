"""The ranks of a process, in which engines are built one after another."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

import tokenferry as tf
from engine_harness import cpu
from engine_harness.attention import stand_in_for_flash_attention
from engine_harness.engine import Engine, EngineOptions


class Ranks:
    """torch's and Megatron's process groups of these ranks, for as long as the context is open. One in a process's life."""

    def __init__(self, group: tf.EPGroup) -> None:
        warnings.simplefilter("ignore")
        logging.disable(logging.INFO)
        self.rank, self.size, self.device = group.rank, group.size, group.device
        self.is_gpu = group.device.type == "cuda"
        self.has_stand_in_attention = stand_in_for_flash_attention()
        if not self.is_gpu:
            cpu.stand_in_for_cuda()
        store = dist.PrefixStore("megatron-engine", group.store)
        placed = {"device_id": self.device} if self.is_gpu else {}
        dist.init_process_group("nccl" if self.is_gpu else "gloo", store=store, rank=self.rank, world_size=self.size, **placed)
        self.host_group = dist.new_group(backend="gloo")
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(1, 1, expert_model_parallel_size=self.size, expert_tensor_parallel_size=1)
        if not self.is_gpu:
            cpu.stand_in_for_kernels()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        from megatron.core import parallel_state

        if error[0] is None:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank. The host's own exchange, which no stream waits for."""
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(flags.item())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def engine(self, options: EngineOptions | None = None, *, dispatcher: str = "nvls") -> Iterator[Engine]:
        """A model and an engine on it. `megatron.install()` comes before; all ranks enter and leave together."""
        engine = Engine(self, options or EngineOptions(), dispatcher)
        yield engine
        engine.close()  # not after a failure, when the peers may not be there, and the process ends anyway
