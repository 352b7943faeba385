"""Opening a transport by name."""

from __future__ import annotations

from tokenferry.config import MoEConfig
from tokenferry.step import StepTensors
from tokenferry.transports.base import Transport, TransportSettings
from tokenferry.transports.collective import CollectiveTransport
from tokenferry.transports.local import LocalTransport


def open_transport(name: str, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
    """Opens the transport `name`, on all ranks of the group together."""
    if name == "local":
        return LocalTransport(settings, step_tensors)
    assert name == "collective", "select.choose returns known names only"
    return CollectiveTransport(settings, step_tensors)


def required_bytes(name: str, config: MoEConfig, ep_size: int, max_tokens_per_rank: int, combine_dtype: object) -> int:
    """Bytes that a rank's workspace holds for as long as it is open."""
    return LocalTransport.required_bytes(ep_size) if name == "local" else CollectiveTransport.required_bytes(ep_size)
