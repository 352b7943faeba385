"""A MoE layer of a transformers model whose experts are spread over ranks: what stands between its router and its experts.

transformers 5.23 has an interface for this, `EPImplementationInterface`. Before it, the same object becomes the experts' forward
directly. Llama 4's experts take no choices, so the forward of its whole MoE module is replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Final, Protocol

import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tokenferry.errors import ConfigError
from tokenferry.integrations.transformers.kernel_experts import KernelExperts, NotServed, implementation_of
from tokenferry.integrations.transformers.loading import Shard, keep_rows
from tokenferry.integrations.transformers.local_experts import Llama4Experts, LocalExperts, RoutedExperts, experts_forward
from tokenferry.integrations.transformers.packed_experts import PackedExperts

EP_IMPLEMENTATION: Final = "tokenferry"
"""Our name in `EPImplementationInterface`."""
LOCAL_EXPERTS: Final = "tokenferry"
"""Our name in `ExpertsInterface`: transformers' grouped_mm under a name that `generate()` does not swap for batched_mm when it
decodes on a GPU, which would gather the weights of one expert for every choice of every rank's rows. Load an unmodified model
with `experts_implementation=LOCAL_EXPERTS` (after `register()`) to compare bits with it on a GPU. Where grouped_mm refuses the
sizes, batched_mm stands in for it."""

_DECORATED: Final = ("has_gate", "has_bias", "is_transposed", "num_experts")
"""What `@use_experts_implementation` leaves on a module."""


class LayerHost(Protocol):
    """Moves the rows of a model's layers; `ExpertParallel` is the one there is."""

    def add_layer(self, layer: ExpertLayer) -> int: ...
    def owned_experts(self, num_experts: int) -> range: ...
    def run_layer(
        self, layer: ExpertLayer, hidden_TH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> torch.Tensor: ...


class ExpertLayer:
    """One MoE layer. Calling it with this rank's rows returns, for each of them, the weighted sum over all ranks' experts.

    It is made with the arguments of transformers' `EPImplementation`. It needs no device mesh; the place of one carries the
    model's `ExpertParallel`.

    Attributes:
        module: the experts module, cut to this rank's experts.
        num_experts: E.
        experts: this rank's, as `LocalExperts`: by the model's own code.
        kernels: this rank's by our own kernels, or None.
        packed: how the module holds this rank's, where they are packed and our kernels alone can run them; else None.
        shards: the parameters that were cut, by their names within the module.
        number: its place among the model's MoE modules, by which compiled code knows it.
    """

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any = None) -> None:
        if not hasattr(ep_mesh, "run_layer"):
            raise ConfigError(
                f"ep_implementation={EP_IMPLEMENTATION!r} is chosen by loading the model with "
                "tokenferry.integrations.transformers.from_pretrained(), not through DistributedConfig"
            )
        self._host: LayerHost = ep_mesh
        self.module = experts
        self.num_experts = int(experts.num_experts)  # type: ignore[arg-type]
        owned = self._host.owned_experts(self.num_experts)
        kind = RoutedExperts if is_decorated(experts) else Llama4Experts
        self.experts: LocalExperts = kind(experts, self.num_experts, owned)
        self.kernels: KernelExperts | None = None
        self.packed: PackedExperts | None = None
        self.shards: dict[str, Shard] = keep_rows(experts, owned)
        self.number: int = self._host.add_layer(self)

    def __call__(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return self._host.run_layer(self, hidden_states, top_k_index, top_k_weights)

    def take_kernels(self, dtype: torch.dtype) -> None:
        """From here on our own kernels run this rank's experts, on rows of `dtype`. The weights are loaded by now.

        Raises:
            NotServed: they cannot, with the reason.
        """
        if not is_decorated(self.module):
            raise NotServed("its experts take no choices")
        implementation = implementation_of(self.module)
        if implementation not in (LOCAL_EXPERTS, "grouped_mm"):
            raise NotServed(f"experts_implementation is {implementation!r}")
        self.kernels = KernelExperts(self.module, self.experts.owned, dtype, self.packed)


class Llama4MoE:
    """The forward of a Llama 4 MoE module, with its experts behind an `ExpertLayer`."""

    def __init__(self, module: nn.Module, layer: ExpertLayer) -> None:
        self._module: Any = module
        self._layer = layer

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_TH = hidden_states.reshape(-1, self._module.hidden_dim)
        scores_TE, logits_TE = self._module.router(hidden_TH)
        topk_scores_TK, topk_idx_TK = scores_TE.topk(self._module.top_k, dim=1)
        routed_TH = self._layer(hidden_TH, topk_idx_TK, topk_scores_TK)
        return self._module.shared_expert(hidden_TH).add_(routed_TH), logits_TE


def register() -> None:
    """Makes our names known to transformers. `from_pretrained` does it; calling it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(LOCAL_EXPERTS, experts_forward)
    ALL_FP8_EXPERTS_FUNCTIONS.register(LOCAL_EXPERTS, ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"])
    interface = _interface_module()
    if interface is not None:
        interface.EPImplementationInterface.register(EP_IMPLEMENTATION, ExpertLayer)


def is_decorated(module: nn.Module) -> bool:
    """Whether the module's class carries `@use_experts_implementation`."""
    return all(hasattr(module, name) for name in _DECORATED)


def install_layers(model: nn.Module, host: LayerHost) -> None:
    """Puts an `ExpertLayer` into every MoE layer of a model that holds no weights yet. There may be none."""
    for module in list(model.modules()):
        if is_decorated(module):
            _install_experts(module, host)
        elif type(module).__name__ == "Llama4TextMoe":
            _install_llama4(module, host)


def _install_experts(experts: Any, host: LayerHost) -> None:
    interface = _interface_module()
    if interface is None:
        experts.forward = ExpertLayer(experts, host)
    else:
        interface.EpDispatchExpertsParallel().install_forward(experts, host, tp_mesh=None, ep_implementation=EP_IMPLEMENTATION)


def _install_llama4(module: Any, host: LayerHost) -> None:
    module.forward = Llama4MoE(module, ExpertLayer(module.experts, host))


def _interface_module() -> Any | None:
    """transformers' module with the interface, or None before there was one (5.22 has the module without it)."""
    name = "transformers.distributed.expert_parallel"
    module = importlib.import_module(name) if importlib.util.find_spec(name) else None
    return module if hasattr(module, "EPImplementationInterface") else None
