"""What a user of vLLM can set: `--additional-config '{"tokenferry": {...}}'`, and an environment variable of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tokenferry import env
from tokenferry.dispatched import FLOAT8
from tokenferry.errors import ConfigError
from tokenferry.transports.base import CombineOrder

KEY: Final = "tokenferry"
"""Of our settings within vLLM's `additional_config`."""
FLOAT8_NAME: Final = str(FLOAT8).removeprefix("torch.")

LOGGER: Final = "vllm.tokenferry"
"""Below vLLM's own logger, whose handlers and level it has: what is logged elsewhere does not show in a vLLM server."""


@dataclass(frozen=True, kw_only=True)
class PluginSettings:
    """How workspaces are opened inside vLLM. All ranks need the same.

    Attributes:
        transport: as of `Workspace`.
        timeout_s: how long a peer may be late. Longer than a workspace's own default, because ranks compile kernels and capture
            graphs while others wait for them.
        combine_order: "rank" for sums that have the same bits whatever the batch, "any" for the library's own order.
        combine_dtype: None: partial rows travel in the model's dtype; "float8_e4m3fn": as float8 with a scale for every 128
            columns, half the bytes. The hidden size must be a multiple of 16 then.
        allow_unknown_version: go on with a vLLM that is not known, or whose names or parameters differ; the log says which.
    """

    transport: str = "auto"
    timeout_s: float = 300.0
    combine_order: CombineOrder = "rank"
    combine_dtype: str | None = None
    allow_unknown_version: bool = False

    def __post_init__(self) -> None:
        _check("transport", self.transport, (str,), "the name of a transport")
        _check("timeout_s", self.timeout_s, (int, float), "a number of seconds")
        _check("allow_unknown_version", self.allow_unknown_version, (bool,), "true or false")
        if self.timeout_s <= 0:
            raise ConfigError(f"timeout_s must be above 0, got {self.timeout_s!r} in vLLM's additional_config[{KEY!r}]")
        if self.combine_order not in ("rank", "any"):
            raise ConfigError(f"combine_order must be 'rank' or 'any', got {self.combine_order!r} in additional_config[{KEY!r}]")
        if self.combine_dtype not in (None, FLOAT8_NAME):
            raise ConfigError(
                f"combine_dtype must be null, for the model's own, or {FLOAT8_NAME!r}, got {self.combine_dtype!r} in "
                f"additional_config[{KEY!r}]"
            )


def settings_from(additional_config: Any) -> PluginSettings | None:
    """The settings if tokenferry is switched on, else None.

    The environment variable wins: 0 leaves vLLM alone whatever its configuration says, and 1 switches tokenferry on where the
    configuration does not mention it.

    Args:
        additional_config: vLLM's own of that name, usually a dict. Under "tokenferry" it holds a dict of the fields of
            `PluginSettings`, or true or false.

    Raises:
        ConfigError: an unknown setting, or a value that it does not take.
    """
    switch = env.read(env.VllmSettings).enabled
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if switch is False or given is False or (given is None and not switch):
        return None
    if given is None or given is True:
        return PluginSettings()
    if not isinstance(given, Mapping):
        raise ConfigError(f"additional_config[{KEY!r}] must be a dict of settings, true or false, got {given!r}")
    known = [field.name for field in dataclasses.fields(PluginSettings)]
    unknown = sorted(map(str, set(given) - set(known)))
    if unknown:
        raise ConfigError(f"additional_config[{KEY!r}] has {', '.join(unknown)}; the settings are {', '.join(known)}")
    return PluginSettings(**given)


def _check(name: str, value: object, kinds: tuple[type, ...], what: str) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ConfigError(f"{name} must be {what}, got {value!r} in vLLM's additional_config[{KEY!r}]")
