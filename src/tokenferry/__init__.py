"""tokenferry: moves tokens to their experts and back in mixture-of-experts inference."""

from tokenferry import reference
from tokenferry.config import MoEConfig
from tokenferry.dispatched import Dispatched, QuantizedRows, RowFormat
from tokenferry.dispatcher import Dispatcher
from tokenferry.errors import (
    CapacityError,
    ConfigError,
    DeviceError,
    DtypeError,
    LayoutError,
    PeerError,
    PeerFailedError,
    PeerTimeoutError,
    RankFailedError,
    ShapeError,
    StateError,
    TokenferryError,
    TransportUnavailableError,
    UsageError,
)
from tokenferry.graphs import GraphRunner
from tokenferry.groups import EPGroup
from tokenferry.step import Step
from tokenferry.workspace import Workspace

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "ConfigError",
    "DeviceError",
    "Dispatched",
    "Dispatcher",
    "DtypeError",
    "EPGroup",
    "GraphRunner",
    "LayoutError",
    "MoEConfig",
    "PeerError",
    "PeerFailedError",
    "PeerTimeoutError",
    "QuantizedRows",
    "RankFailedError",
    "RowFormat",
    "ShapeError",
    "StateError",
    "Step",
    "TokenferryError",
    "TransportUnavailableError",
    "UsageError",
    "Workspace",
    "reference",
]
