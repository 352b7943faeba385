"""The class that stands in the place of vLLM's `AgRsAll2AllManager`, and derives from it."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch

from tokenferry.errors import ConfigError
from tokenferry.groups import EPGroup
from tokenferry.integrations.vllm import cpu, known_versions
from tokenferry.integrations.vllm.exchange import Exchange
from tokenferry.integrations.vllm.in_place import write_sums_in_place
from tokenferry.integrations.vllm.known_versions import ORIGINAL
from tokenferry.integrations.vllm.settings import LOGGER, PluginSettings, settings_from

_log = logging.getLogger(LOGGER)


def manager_class(original: type) -> type:
    """A subclass of vLLM's manager that goes through tokenferry. Where tokenferry is switched off, making an object of it makes
    one of vLLM's own class.

    Args:
        original: vLLM's `AgRsAll2AllManager`.
    """
    base: Any = original

    class TokenferryAll2AllManager(base):  # type: ignore[misc]
        """Gathers the tokens of all ranks and sums their experts' terms; see `Exchange`.

        What it cannot carry goes to vLLM's own code, with one line in the log for each reason: the reasons are the same on all
        ranks, since they follow from the model and its configuration.
        """

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from vllm.config import get_current_vllm_config

            # Arguments pass as they are: switched off, a later vLLM must find its own constructor.
            if settings_from(get_current_vllm_config().additional_config) is None:
                return base(*args, **kwargs)
            return super().__new__(cls)

        def __init__(self, cpu_group: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(cpu_group, *args, **kwargs)
            from vllm.config import get_current_vllm_config
            from vllm.distributed.parallel_state import get_dp_group
            from vllm.forward_context import get_forward_context
            from vllm.platforms import current_platform

            config = get_current_vllm_config()
            settings = settings_from(config.additional_config)
            assert settings is not None  # __new__ has looked
            known_versions.check(settings.allow_unknown_version)
            if current_platform.is_cpu():
                check_eager(config)
                cpu.bring_what_is_missing()
            if not hasattr(base, "combine_into_output"):
                write_sums_in_place()
            device = get_dp_group().device
            self.exchange = exchange_for(config, cpu_group, device, settings)
            self._said: set[str] = set()
            self._forward_context: Any = get_forward_context  # found once: an import takes a microsecond in each layer

        def dispatch(
            self,
            hidden_states: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            is_sequence_parallel: bool = False,
            extra_tensors: list[torch.Tensor] | None = None,
        ) -> Any:
            refusal = self._refusal(hidden_states, topk_weights, topk_ids, is_sequence_parallel, extra_tensors)
            if refusal is not None:
                self._say(refusal)
                return super().dispatch(hidden_states, topk_weights, topk_ids, is_sequence_parallel, extra_tensors)
            hidden, ids, weights, scales = self._dispatch(hidden_states, topk_ids, topk_weights, extra_tensors)
            return (hidden, weights, ids) if scales is None else (hidden, weights, ids, [scales])

        def dispatch_router_logits(
            self,
            hidden_states: torch.Tensor,
            router_logits: torch.Tensor,
            is_sequence_parallel: bool = False,
            extra_tensors: list[torch.Tensor] | None = None,
        ) -> Any:
            refusal = self._refusal(hidden_states, router_logits, None, is_sequence_parallel, extra_tensors)
            if refusal is not None:
                self._say(refusal)
                return super().dispatch_router_logits(hidden_states, router_logits, is_sequence_parallel, extra_tensors)
            # Logits travel in the place of weights, which arrive unchanged beside an expert number of -1 too.
            no_ids = torch.full_like(router_logits, -1, dtype=torch.int32)
            hidden, _, logits, scales = self._dispatch(hidden_states, no_ids, router_logits, extra_tensors)
            return (hidden, logits) if scales is None else (hidden, logits, [scales])

        def allocate_combine_input(
            self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, is_sequence_parallel: bool = False
        ) -> torch.Tensor | None:
            if self.exchange.is_pending:
                return self.exchange.combine_input(shape, dtype)
            theirs: torch.Tensor | None = super().allocate_combine_input(shape, dtype, device, is_sequence_parallel)
            return theirs

        def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
            if self.exchange.is_pending:
                return self.exchange.combine(hidden_states)
            theirs: torch.Tensor = super().combine(hidden_states, is_sequence_parallel)
            return theirs

        def combine_into_output(
            self, hidden_states: torch.Tensor, output: torch.Tensor, is_sequence_parallel: bool = False
        ) -> torch.Tensor:
            if self.exchange.is_pending:
                return self.exchange.combine(hidden_states, output)
            theirs: torch.Tensor = super().combine_into_output(hidden_states, output, is_sequence_parallel)
            return theirs

        def destroy(self) -> None:
            self.exchange.close()
            super().destroy()

        def _dispatch(
            self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, extra_tensors: list[torch.Tensor] | None
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
            scales = extra_tensors[0] if extra_tensors else None
            counts = self._get_sizes(hidden.shape[0], self._get_comm_group(False))
            return self.exchange.dispatch(self._forward_context().additional_kwargs, counts, hidden, ids, weights, scales)

        def _refusal(
            self,
            hidden: torch.Tensor,
            weights: torch.Tensor,
            ids: torch.Tensor | None,
            is_sequence_parallel: bool,
            extra_tensors: list[torch.Tensor] | None,
        ) -> str | None:
            if is_sequence_parallel:
                return "the rows are split over tensor-parallel ranks (sequence parallelism)"
            num_ranks = self._get_comm_group(False).world_size
            if num_ranks != self.world_size:
                return f"rows are gathered from {num_ranks} ranks, but the experts are spread over {self.world_size}"
            counts = self._get_sizes(hidden.shape[0], self._get_comm_group(False)) if extra_tensors else ()
            return self.exchange.refusal(hidden, weights, ids, extra_tensors, counts)

        def _say(self, reason: str) -> None:
            if reason not in self._said:
                self._said.add(reason)
                _log.warning("vLLM's own gathers carry these rows, not tokenferry: %s", reason)

    setattr(TokenferryAll2AllManager, ORIGINAL, original)
    return TokenferryAll2AllManager


def exchange_for(config: Any, cpu_group: Any, device: torch.device, settings: PluginSettings) -> Exchange:
    """The exchange of a worker with this `VllmConfig`."""
    dtype = getattr(config.model_config, "dtype", None)
    return Exchange(
        EPGroup(cpu_group, device=device),
        settings,
        most_rows(config),
        most_experts(config),
        dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        masks=device.type == "cpu" or experts_skip_padding(),
    )


def experts_skip_padding() -> bool:
    """Whether vLLM's experts on GPUs are to skip the expert number -1, which not all of them do: vLLM's own switch for its
    padding rows, off in 0.26 and on in 0.33."""
    envs = importlib.import_module("vllm.envs")
    return bool(getattr(envs, "VLLM_MOE_SKIP_PADDING", False))


def most_rows(config: Any) -> int:
    """The most rows of a forward: of a batch, or of the largest graph, to which smaller batches are padded."""
    largest_graph = getattr(getattr(config, "compilation_config", None), "max_cudagraph_capture_size", None)
    return max(int(config.scheduler_config.max_num_batched_tokens), int(largest_graph or 0))


def most_experts(config: Any) -> int:
    """Of the model or its draft model, whichever has more; redundant ones, which load balancing adds, are counted in."""
    draft = getattr(getattr(config, "speculative_config", None), "draft_model_config", None)
    models = [model for model in (config.model_config, draft) if model is not None]
    parallel = config.parallel_config
    redundant = parallel.eplb_config.num_redundant_experts if getattr(parallel, "enable_eplb", False) else 0
    return max(int(model.get_num_experts()) for model in models) + int(redundant)


def check_eager(config: Any) -> None:
    """On CPUs vLLM's compiler traces through the exchange, which it cannot compile.

    Raises:
        ConfigError: the model would be compiled.
    """
    model = config.model_config
    if model is not None and getattr(model, "enforce_eager", True) is False:
        raise ConfigError("on CPUs tokenferry needs vLLM without torch.compile; add --enforce-eager")
