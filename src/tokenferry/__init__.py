"""tokenferry: moves tokens to their experts and back in mixture-of-experts inference.

Importing the package loads nothing else. A public name, or a module of the package, is imported at its first mention, and torch
with it: `tokenferry --version` and plug-ins that other programs look for at their start must not wait for torch.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
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

__version__ = "0.2.0"

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

_HOMES: Final = {
    "Dispatched": "dispatched",
    "Dispatcher": "dispatcher",
    "EPGroup": "groups",
    "GraphRunner": "graphs",
    "MoEConfig": "config",
    "QuantizedRows": "dispatched",
    "RowFormat": "dispatched",
    "Step": "step",
    "Workspace": "workspace",
}
"""The module of each public name that is neither an error nor a module itself."""


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package, imported now. Python asks only for what is not here yet."""
    home = _HOMES.get(name, "errors" if name in __all__ and name.endswith("Error") else None)
    if home is not None:
        value = globals()[name] = getattr(importlib.import_module(f"tokenferry.{home}"), name)
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"tokenferry.{name}") is not None:
        return importlib.import_module(f"tokenferry.{name}")
    raise AttributeError(f"module 'tokenferry' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
