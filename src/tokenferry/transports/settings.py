"""Settings of a workspace that can never work, refused before anything is agreed with a peer."""

from __future__ import annotations

import torch

from tokenferry.config import HIDDEN_DTYPES, MoEConfig
from tokenferry.dispatched import FLOAT8
from tokenferry.errors import ConfigError, DeviceError
from tokenferry.groups import EPGroup
from tokenferry.transports import selection
from tokenferry.transports.base import TransportSettings

MAX_TIMEOUT_S = 1e9
"""Time-outs are counted in nanoseconds in 64 bits; thirty years are enough."""


def check_kinds(config: object, group: object) -> None:
    """Raises ConfigError unless both are what a workspace is opened with."""
    if not isinstance(config, MoEConfig):
        raise ConfigError(f"config must be a MoEConfig, got {type(config).__name__}")
    if not isinstance(group, EPGroup):
        raise ConfigError(f"group must be an EPGroup, got {type(group).__name__}; make one with EPGroup(process_group)")


def check_settings(settings: TransportSettings, transport: object) -> None:
    """Raises ConfigError for a setting that no workspace can be opened with."""
    check_transport(transport)
    check_positive_ints(max_tokens_per_rank=settings.max_tokens_per_rank)
    check_dtypes(settings.combine_dtype, settings.index_dtype, settings.config)
    settings.dispatch_format.check(settings.config)
    if settings.result_dtype not in HIDDEN_DTYPES:
        raise ConfigError(f"result_dtype must be one of {', '.join(map(str, HIDDEN_DTYPES))}, got {settings.result_dtype!r}")
    if settings.combine_order not in ("rank", "any"):
        raise ConfigError(f"combine_order must be 'rank' or 'any', got {settings.combine_order!r}")
    if settings.counts not in ("uneven", "equal"):
        raise ConfigError(f"counts must be 'uneven' or 'equal', got {settings.counts!r}")
    check_seconds("timeout_s", settings.timeout_s)
    check_seconds("open_timeout_s", settings.open_timeout_s)
    ctas = settings.max_ctas
    if ctas is not None and (not isinstance(ctas, int) or isinstance(ctas, bool) or ctas < 1):
        raise ConfigError(f"max_ctas must be a positive int or None, got {ctas!r}")
    settings.group.expert_range(settings.config.num_experts)  # raises if there are fewer experts than ranks


def check_transport(transport: object) -> None:
    """Raises ConfigError unless it is a name (the ranks compare it before it is looked up) or an object that opens transports."""
    if isinstance(transport, str):
        return
    opens = isinstance(getattr(transport, "name", None), str) and callable(getattr(transport, "open", None))
    if not opens or isinstance(transport, type):
        raise ConfigError(
            f"transport must be 'auto' or one of {', '.join(selection.TRANSPORTS)}, or an object with a name (a str) and a "
            f"method open(settings, step_tensors) that returns an open Transport; got {transport!r}"
        )


def check_positive_ints(**values: object) -> None:
    """Raises ConfigError for the first that is not a positive int."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be a positive int, got {value!r}")


def check_dtypes(combine_dtype: object, index_dtype: object, config: MoEConfig) -> None:
    """Raises ConfigError for dtypes that no workspace carries."""
    known = (*HIDDEN_DTYPES, FLOAT8)
    if combine_dtype not in known:
        raise ConfigError(f"combine_dtype must be one of {', '.join(map(str, known))}, got {combine_dtype!r}")
    if combine_dtype == FLOAT8 and config.hidden_size % 16:
        raise ConfigError(
            f"combine_dtype {FLOAT8} needs hidden_size to be a multiple of 16, got {config.hidden_size}; pad it, or take another "
            "combine_dtype"
        )
    if index_dtype not in (torch.int32, torch.int64):
        raise ConfigError(f"index_dtype must be torch.int32 or torch.int64, got {index_dtype!r}")


def check_seconds(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is a time that can be waited."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < MAX_TIMEOUT_S:
        raise ConfigError(f"{name} must be positive, got {value!r}; give seconds, fewer than {MAX_TIMEOUT_S:.0e}")


def check_reset(old: EPGroup, group: object, timeout_s: object) -> None:
    """Raises ConfigError or DeviceError for what a workspace cannot go on with."""
    if timeout_s is not None:
        check_seconds("timeout_s", timeout_s)
    if group is None:
        return
    if not isinstance(group, EPGroup):
        raise ConfigError(f"group must be an EPGroup, got {type(group).__name__}; make one with ws.group.subset(ranks)")
    if group.device != old.device:
        raise DeviceError(f"the new group's device is {group.device} but the workspace is on {old.device}; keep the device")
