"""Opening a transport by name."""

from __future__ import annotations

import torch

from tokenferry.config import MoEConfig
from tokenferry.step import StepTensors
from tokenferry.transports.base import Transport, TransportSettings
from tokenferry.transports.collective.transport import CollectiveTransport
from tokenferry.transports.local import LocalTransport
from tokenferry.transports.selection import SYMMETRIC
from tokenferry.transports.symmetric import layout as symmetric_layout


def open_transport(name: str, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
    """Opens the transport `name`, on all ranks of the group together."""
    if name == "local":
        return LocalTransport(settings, step_tensors)
    if name in SYMMETRIC:
        from tokenferry.transports.symmetric.transport import SymmetricTransport  # imports Triton, which a CPU may do without

        return SymmetricTransport(settings, step_tensors, multicast=name == "nvls")
    assert name == "collective", "selection.choose returns known names only"
    return CollectiveTransport(settings, step_tensors)


def required_bytes(
    name: str,
    config: MoEConfig,
    ep_size: int,
    max_tokens_per_rank: int,
    combine_dtype: torch.dtype,
    index_dtype: torch.dtype = torch.int32,
) -> int:
    """Bytes that a rank's workspace holds for as long as it is open."""
    if name in SYMMETRIC:
        return symmetric_layout.required_bytes(config, ep_size, max_tokens_per_rank, combine_dtype, name == "nvls", index_dtype)
    return LocalTransport.required_bytes(ep_size) if name == "local" else CollectiveTransport.required_bytes(ep_size)
