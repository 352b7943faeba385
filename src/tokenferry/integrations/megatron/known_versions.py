"""Which releases of megatron-core are known, and what install() relies on in them: a table of names and parameters, and the
comparison of a megatron-core with it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, Final

KNOWN_VERSIONS: Final = ("0.19", "0.20")
"""Release series whose text was read: 0.19.2, and 0.20.0 as of 2026-08-22, from its repository. Another release of a series is
taken if it agrees with `NAMES`."""

TRIED_VERSIONS: Final = ("0.19.2",)
"""Releases that were run with ours in the place of their own: on CPUs, and with their engine on GPUs."""

DISPATCHERS: Final = "megatron.core.transformer.moe.token_dispatcher_inference"
BASE: Final = "megatron.core.transformer.moe.token_dispatcher"
EXPERT_ENTRIES: Final = "megatron.core.inference.moe"
EXPERTS: Final = "megatron.core.transformer.moe.experts"

_CONSTRUCTED_WITH = "num_local_experts, local_expert_indices, config, pg_collection"
_EXPERTS_TAKE = (
    "hidden_states, probs, fc1_weight, fc2_weight, activation_type, num_local_experts, local_expert_start, "
    "valid_tokens, routing_map"
)

NAMES: Final[Mapping[str, Mapping[str, str | None]]] = MappingProxyType(
    {
        BASE: {"MoEAllGatherTokenDispatcher": _CONSTRUCTED_WITH},
        DISPATCHERS: {
            "InferenceAllGatherDispatcherBase": "*args, runs_metadata_sync, **kwargs",
            "InferenceAllGatherDispatcherBase._valid_tokens_tensor": None,
            "InferenceAllGatherDispatcherBase._host_valid_tokens_estimate": None,
            "InferenceAllGatherDispatcherBase._valid_tokens": "",
            "InferenceAllGatherDispatcherBase._get_host_valid_tokens_estimate": "",
            "InferenceAllGatherDispatcherBase.allocate_valid_tokens_tensor": "",
            "InferenceAllGatherDispatcherBase.update_metadata": "local_tokens",
            "NCCLAllGatherDispatcher": f"{_CONSTRUCTED_WITH}, runs_metadata_sync",
            "NCCLAllGatherDispatcher._use_allgather_v": None,
            "NCCLAllGatherDispatcher._local_tokens_per_rank": None,
            "NCCLAllGatherDispatcher.allocate_buffers": "",
            "NCCLAllGatherDispatcher.update_metadata": "local_tokens",
            "NCCLAllGatherDispatcher.token_dispatch": "hidden_states, probs",
            "NCCLAllGatherDispatcher.dispatch_postprocess": "hidden_states, probs",
            "NCCLAllGatherDispatcher.combine_preprocess": "expert_output",
            "NCCLAllGatherDispatcher.token_combine": "hidden_states",
            "NVLSAllGatherVDispatcher": f"{_CONSTRUCTED_WITH}, runs_metadata_sync",
            "NVLSAllGatherVDispatcher._step_metadata": None,
            "NVLSAllGatherVDispatcher._per_rank_worst_case_token_count": None,
            "NVLSAllGatherVDispatcher._real_token_count_tensor": None,
            "NVLSAllGatherVDispatcher._symm_agv_hidden": None,
            "NVLSAllGatherVDispatcher._symm_agv_routing": None,
            "NVLSAllGatherVDispatcher._symm_agv_probs": None,
            "NVLSAllGatherVDispatcher._symm_rsv": None,
            "NVLSAllGatherVDispatcher._get_rsv_tensor": "",
            "NVLSAllGatherVDispatcher.set_real_token_count_tensor": "tensor",
            "NVLSAllGatherVDispatcher.modify_real_token_count_for_mtp": "mtp_token_count",
            "NVLSAllGatherVDispatcher._rank_token_offset": "",
            "NVLSAllGatherVDispatcher._ep_max_tokens": "",
            "NVLSAllGatherVDispatcher._delete_buffers": "",
            "NVLSAllGatherVDispatcher.allocate_buffers": "per_rank_worst_case_token_count, topk, hidden_size, ep_group",
            "NVLSAllGatherVDispatcher.update_metadata": "local_tokens",
            "NVLSAllGatherVDispatcher.dispatch_preprocess": "hidden_states, routing_map, probs",
            "NVLSAllGatherVDispatcher.token_dispatch": "hidden_states, probs",
            "NVLSAllGatherVDispatcher.dispatch_postprocess": "hidden_states, probs",
            "NVLSAllGatherVDispatcher.combine_preprocess": "expert_output",
            "NVLSAllGatherVDispatcher.token_combine": "hidden_states",
            "NVLSAllGatherVDispatcher.combine_postprocess": "hidden_states",
        },
    }
)
"""By module, what 0.19.2 and 0.20.0 both have: parameters without `self`, or None for an attribute."""

EXPERT_NAMES: Final[Mapping[str, Mapping[str, str | None]]] = MappingProxyType(
    {
        EXPERT_ENTRIES: {
            "mcore_fused_moe": f"{_EXPERTS_TAKE}, disable_fused_quant_kernels, out",
            "vllm_fused_moe": f"{_EXPERTS_TAKE}, out, num_tokens_hint",
            "ActivationType.SQUARED_RELU": None,
        },
        EXPERTS: {
            "mcore_fused_moe": f"{_EXPERTS_TAKE}, disable_fused_quant_kernels, out",
            "vllm_fused_moe": f"{_EXPERTS_TAKE}, out, num_tokens_hint",
            "InferenceGroupedMLP._mcore_fused_moe_forward": "hidden_states, probs, routing_map",
            "InferenceGroupedMLP._vllm_forward": "hidden_states, probs, routing_map",
        },
    }
)
"""What `install(experts=True)` relies on besides."""

REMARKS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "0.20": (
            "its text was read, and its names and parameters agree. Not in 0.19: SwiGLU experts (ours serve them), MXFP8 experts "
            "in its own kernels (those stay), batch_invariant.ordered_reduce_scatter_v (our combine always adds in rank order), "
            "and rounding of graph buckets in batch-invariant mode (the engine's own affair)"
        )
    }
)
"""By series, what is to be known of a release that was not tried."""


def series_of(version: str) -> str | None:
    """The known series that a version belongs to."""
    return next((known for known in KNOWN_VERSIONS if version == known or version.startswith(f"{known}.")), None)


def differences(
    modules: Mapping[str, ModuleType],
    names: Mapping[str, Mapping[str, str | None]],
    own: Mapping[str, type] = MappingProxyType({}),
) -> list[str]:
    """Where a megatron-core departs from a table, a sentence each.

    Args:
        modules: the imported modules, by name; all that `names` has.
        names: `NAMES` or `EXPERT_NAMES`.
        own: our classes by the name of those that they stand for. What Megatron's define and ours lack is a difference too,
            since Megatron's code may ask for it.
    """
    found = [text for module, table in names.items() for text in _missing_or_changed(modules[module], table)]
    for name, cls in own.items():
        theirs = getattr(modules[DISPATCHERS], name, None)
        found += [] if theirs is None else [f"{name}.{member} is new: ours has no such name" for member in _new(theirs, cls)]
    return found


def parameters_of(target: Any) -> str:
    """Names of the parameters of a callable, without `self`."""
    # As Python prints them, without annotations and defaults: "*args" keeps its star.
    bare = (each.replace(annotation=each.empty, default=each.empty) for each in inspect.signature(target).parameters.values())
    return ", ".join(str(each) for each in bare if each.name != "self")


def _missing_or_changed(module: ModuleType, table: Mapping[str, str | None]) -> Iterator[str]:
    for path, expected in table.items():
        target: Any = module
        for part in path.split("."):
            target = getattr(target, part, _MISSING)
            if target is _MISSING:
                yield f"{module.__name__} has no {path}"
                break
        else:
            found = None if expected is None else parameters_of(target)
            if found != expected:
                yield f"{path} takes ({found}), not ({expected})"


def _new(theirs: type, ours: type) -> list[str]:
    return [name for name in vars(theirs) if not name.startswith("__") and not hasattr(ours, name)]


_MISSING = object()
