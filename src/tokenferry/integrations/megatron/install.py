"""Puts the dispatchers in the place of megatron-core's."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from types import MappingProxyType, ModuleType, TracebackType
from typing import Any, Final

from tokenferry.errors import ConfigError, StateError
from tokenferry.integrations.megatron.base import InferenceAllGatherDispatcherBase, StandaloneBase
from tokenferry.integrations.megatron.engine_hook import EngineHook, place_engine_hook
from tokenferry.integrations.megatron.nccl import NCCLAllGatherDispatcher
from tokenferry.integrations.megatron.nvls import NVLSAllGatherVDispatcher

KNOWN_VERSIONS: Final = ("0.19",)
"""Release series whose behaviour was compared; 0.19.2 was read and run, on CPUs (2026-11-22)."""

DISPATCHER_MODULE: Final = "megatron.core.transformer.moe.token_dispatcher_inference"
BASE_MODULE: Final = "megatron.core.transformer.moe.token_dispatcher"
BASE_NAME: Final = "MoEAllGatherTokenDispatcher"
CLASSES: Final = MappingProxyType(
    {cls.__name__: cls for cls in (InferenceAllGatherDispatcherBase, NCCLAllGatherDispatcher, NVLSAllGatherVDispatcher)}
)


@dataclass(frozen=True)
class _Patch:
    module: ModuleType
    name: str
    original: Any


class Installation:
    """What `install` has done. Calling it undoes that; so does leaving it as a context manager. Undoing twice does nothing.

    Attributes:
        version: of the megatron-core that was found.
        replaced: "module.name" for every name that was replaced.
    """

    def __init__(self, version: str, patches: list[_Patch], engine_hook: EngineHook) -> None:
        self.version = version
        self._patches, self._engine_hook = patches, engine_hook
        self.replaced = (*(f"{patch.module.__name__}.{patch.name}" for patch in patches), *engine_hook.replaced)

    def __call__(self) -> None:
        """Puts everything back. Dispatchers that exist stay ours."""
        patches, self._patches = self._patches, []
        self._engine_hook()
        for patch in patches:
            setattr(patch.module, patch.name, patch.original)
        if patches:
            InferenceAllGatherDispatcherBase.__bases__ = (StandaloneBase,)

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self()

    def __repr__(self) -> str:
        return f"Installation(megatron-core {self.version}, {len(self._patches)} names replaced)"


def install(*, allow_unknown_version: bool = False) -> Installation:
    """Replaces megatron-core's three inference dispatchers by ours, in every module that has imported them, until undone.

    Comes before the model is built: dispatchers that exist stay what they are, and must not be used until undone, since
    Megatron's code finds their class attributes by the names that are replaced. Ours become subclasses of Megatron's
    `MoEAllGatherTokenDispatcher` for as long. All ranks do it.

    Args:
        allow_unknown_version: go on with a megatron-core outside `KNOWN_VERSIONS`. Names and signatures are compared either way.

    Returns:
        A callable that undoes it, also a context manager.

    Raises:
        ConfigError: no megatron-core, a version that is not known, or one whose classes have other constructors.
        StateError: it is installed already.
    """
    if InferenceAllGatherDispatcherBase.__bases__ != (StandaloneBase,):
        raise StateError("install: the dispatchers are installed already; undo that first")
    dispatchers, base = _import(DISPATCHER_MODULE), _import(BASE_MODULE)
    version = _version()
    if not any(version == known or version.startswith(f"{known}.") for known in KNOWN_VERSIONS) and not allow_unknown_version:
        raise ConfigError(
            f"megatron-core {version} is not known; tokenferry knows {', '.join(f'{v}.x' for v in KNOWN_VERSIONS)} "
            "(0.19.2 was compared). install(allow_unknown_version=True) goes on if names and signatures agree"
        )
    originals = {name: _compatible(dispatchers, name, cls, version) for name, cls in CLASSES.items()}
    InferenceAllGatherDispatcherBase.__bases__ = (getattr(base, BASE_NAME),)
    engine_hook = place_engine_hook()  # before the search: it imports modules that hold the names
    patches = _patches(originals)
    for patch in patches:
        setattr(patch.module, patch.name, CLASSES[_name_of(originals, patch.original)])
    return Installation(version, patches, engine_hook)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"install: {name} cannot be imported ({error}); install megatron-core {KNOWN_VERSIONS[-1]}.x, "
            "or use tokenferry.integrations.megatron without it"
        ) from error


def _version() -> str:
    text = str(getattr(_import("megatron.core.package_info"), "__version__", "unknown"))
    release = re.match(r"\d+(\.\d+)*", text)
    return release.group() if release else text


def _compatible(module: ModuleType, name: str, ours: type, version: str) -> Any:
    original = getattr(module, name, None)
    if original is None:
        raise ConfigError(f"megatron-core {version} has no {name} in {module.__name__}")
    theirs, own = (list(inspect.signature(cls).parameters) for cls in (original, ours))
    if theirs != own:
        raise ConfigError(f"{name} of megatron-core {version} is constructed with {theirs}, ours with {own}")
    return original


def _patches(originals: dict[str, Any]) -> list[_Patch]:
    """Every place that imported one of the originals. Outside Megatron only under its own name: who keeps the original under
    another one, to compare with, means the original."""
    found = []
    for module in {id(module): module for module in list(sys.modules.values()) if isinstance(module, ModuleType)}.values():
        inside = module.__name__.partition(".")[0] == "megatron"
        for name, value in list(vars(module).items()):
            if any(value is original and (inside or name == own) for own, original in originals.items()):
                found.append(_Patch(module, name, value))
    return found


def _name_of(originals: dict[str, Any], original: Any) -> str:
    return next(name for name, value in originals.items() if value is original)
