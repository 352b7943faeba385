"""Megatron-Core's inference dispatchers, name by name, on tokenferry's transports. Runs without Megatron too.

from tokenferry.integrations import megatron

undo = megatron.install()                                  # inside Megatron, before the model is built
megatron.NVLSAllGatherVDispatcher(num_local_experts, local_expert_indices, config, pg_collection)   # or on its own
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenferry.integrations.megatron.base import InferenceAllGatherDispatcherBase
from tokenferry.integrations.megatron.buffers import Settings
from tokenferry.integrations.megatron.engine_restart import delete_graphs, restart_engine
from tokenferry.integrations.megatron.fused_moe import fused_moe
from tokenferry.integrations.megatron.install import Installation, install
from tokenferry.integrations.megatron.known_versions import KNOWN_VERSIONS, TRIED_VERSIONS
from tokenferry.integrations.megatron.nccl import NCCLAllGatherDispatcher
from tokenferry.integrations.megatron.nvls import NVLSAllGatherVDispatcher
from tokenferry.integrations.megatron.stand_ins import InferenceMoEConfig, ProcessGroups, StreamedSharedExperts
from tokenferry.integrations.megatron.validation import validate_config


def configure(**changes: Any) -> Settings:
    """Changes how connections and buffers are opened from now on, equally on all ranks; those that are open stay.

    Args:
        changes: fields of `Settings`.

    Returns:
        The settings as they are now.

    Raises:
        ConfigError: a combine dtype that is neither float32 nor bfloat16, or an order that is neither "rank" nor "any".
    """
    registry = InferenceAllGatherDispatcherBase._registry
    registry.configure(dataclasses.replace(registry.settings, **changes))
    return registry.settings


def check(*, wait: bool = True) -> None:
    """Raises what a peer, or this rank, has failed with. Call it after your own synchronisation, before trusting results. Within
    Megatron's engine `install()` sees to that.

    Args:
        wait: as of `Workspace.check`; False looks at the host's memory alone.

    Raises:
        PeerTimeoutError, PeerFailedError: another rank is the cause.
    """
    for workspace in InferenceAllGatherDispatcherBase._registry.workspaces():
        workspace.check(wait=wait)


def reset(timeout_s: float | None = None) -> None:
    """Starts anew after a failure: `Workspace.reset` of all buffers and connections of both classes. Every rank of their groups
    calls it, since Megatron's groups and its placement of experts know of no rank that is gone; dispatchers stay as they are.

    Megatron's CUDA graphs are deleted first: they hold the addresses of the old buffers. `restart_engine` does beside that what
    an engine needs.

    Args:
        timeout_s: how long to wait for the others. Default: `open_timeout_s`.

    Raises:
        PeerTimeoutError: a rank did not come. Call it again when it can.
    """
    delete_graphs()
    NVLSAllGatherVDispatcher._reset(timeout_s)


def close() -> None:
    """Closes all buffers and connections of both classes, before the process groups are destroyed. See `Workspace.close`."""
    NVLSAllGatherVDispatcher._delete_buffers()
    InferenceAllGatherDispatcherBase._registry.close()


__all__ = [
    "KNOWN_VERSIONS",
    "TRIED_VERSIONS",
    "InferenceAllGatherDispatcherBase",
    "InferenceMoEConfig",
    "Installation",
    "NCCLAllGatherDispatcher",
    "NVLSAllGatherVDispatcher",
    "ProcessGroups",
    "Settings",
    "StreamedSharedExperts",
    "check",
    "close",
    "configure",
    "fused_moe",
    "install",
    "reset",
    "restart_engine",
    "validate_config",
]
