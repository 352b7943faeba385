"""The models that are compared, with the same random weights: ours, transformers' own expert parallelism, the plain model."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch

from tokenferry.benchmarking.model_request import ModelRequest
from tokenferry.groups import EPGroup

SEED: Final = 0
EAGERLY: Final[Mapping[str, Any]] = MappingProxyType({"cache_implementation": "dynamic"})
"""What `generate()` of a model of ours takes to leave its CUDA graphs out."""
NOT_COMPILED: Final[Mapping[str, Any]] = MappingProxyType({"disable_compile": True})
"""What makes them graphs of the model's own forward. Else they are of what the compiler makes of it first, which takes long."""
OPEN_TIMEOUT_S: Final = 240.0
STEP_TIMEOUT_S: Final = 120.0
"""A rank may compile meanwhile."""


@dataclasses.dataclass(frozen=True)
class Way:
    """A model, and the modes in which it is measured; see `model_modes.MODES`.

    Attributes:
        make: gets the group, a configuration of transformers, and the request.
        slow_modes: those that compile for each point, and come last.
        replicates: whether every rank works on all ranks' prompts.
    """

    make: Callable[[EPGroup, Any, ModelRequest], Any]
    modes: tuple[str, ...]
    slow_modes: tuple[str, ...] = ()
    replicates: bool = False

    @contextlib.contextmanager
    def open(self, group: EPGroup, config: Any, request: ModelRequest) -> Iterator[Any]:
        """The model. Collective."""
        from transformers import GenerationConfig

        model = self.make(group, config, request)
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None, bos_token_id=None)
        parallel = getattr(model, "expert_parallel", None)
        try:
            yield model
            if parallel is not None:
                parallel.finish()
        finally:
            if parallel is not None:
                parallel.close()


def _p2p(group: EPGroup, config: Any, request: ModelRequest) -> Any:
    return ours(group, config, request.capacity, request.transport, _dtype(group), **graphs_wanted())


def _collective(group: EPGroup, config: Any, request: ModelRequest) -> Any:
    return ours(group, config, request.capacity, "collective", _dtype(group))


def ours(group: EPGroup, config: Any, capacity: int, transport: str, dtype: torch.dtype, **settings: Any) -> Any:
    """A model with random weights whose experts tokenferry spreads over the ranks. Collective."""
    from tokenferry.integrations.transformers import from_config

    return from_config(
        config,
        group=group,
        max_tokens_per_rank=capacity,
        seed=SEED,
        transport=transport,
        dtype=dtype,
        timeout_s=STEP_TIMEOUT_S,
        open_timeout_s=OPEN_TIMEOUT_S,
        **settings,
    )


def graphs_wanted() -> dict[str, Any]:
    """The argument of `from_config` that makes `generate()` decode by CUDA graphs; nothing where it has none."""
    from tokenferry.integrations.transformers import from_config

    return {"cuda_graphs": "auto"} if "cuda_graphs" in inspect.signature(from_config).parameters else {}


def _transformers(group: EPGroup, config: Any, request: ModelRequest) -> Any:
    from transformers.distributed.configuration_utils import DistributedConfig

    size = group.size
    takes_ep_size = "ep_size" in {field.name for field in dataclasses.fields(DistributedConfig)}
    settings: Any = {"ep_size": size} if takes_ep_size else {"enable_expert_parallel": True}  # the latter until 5.20
    return unmodified(group, config, _dtype(group), distributed_config=DistributedConfig(tp_size=size, **settings))


def _plain(group: EPGroup, config: Any, request: ModelRequest) -> Any:
    return unmodified(group, config, _dtype(group))


def unmodified(group: EPGroup, config: Any, dtype: torch.dtype, **settings: Any) -> Any:
    """transformers' own class, with the weights that `ours` gives to it, on this rank's device."""
    from transformers import AutoModelForCausalLM

    from tokenferry.integrations.transformers import LOCAL_EXPERTS, random_state, register
    from tokenferry.integrations.transformers.packed_experts import unpacking

    register()
    settings |= unpacking(getattr(config, "quantization_config", None))
    if "distributed_config" not in settings and group.device.type == "cuda":
        settings["device_map"] = {"": group.device}
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    state = random_state(model_class, config, dtype, group.device, SEED)
    model = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, experts_implementation=LOCAL_EXPERTS, **settings
    )
    return model.eval()


def _dtype(group: EPGroup) -> torch.dtype:
    return torch.bfloat16 if group.device.type == "cuda" else torch.float32


WAYS: Final = MappingProxyType({
    "plain": Way(_plain, ("graph", "eager", "batching")),
    "p2p": Way(_p2p, ("graph", "eager", "batching"), ("graph-compiled",)),
    "transformers": Way(
        _transformers, ("graph", "graph-batched", "eager", "eager-batched"), ("compile-batched", "compile"), replicates=True
    ),
    "collective": Way(_collective, ("eager",)),
})  # fmt: skip
"""plain: each rank has the whole model. p2p: ours, its experts spread over the ranks; collective: the same over NCCL (gloo).
transformers: the library's own expert parallelism. "-batched": its batched_mm, which `generate()` takes for decoding if it is not
told otherwise; else grouped_mm."""
