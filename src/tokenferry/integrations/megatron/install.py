"""Puts the dispatchers, and the experts if asked for, in the place of megatron-core's."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType, TracebackType
from typing import Any, Final

from tokenferry.errors import ConfigError, StateError
from tokenferry.integrations.megatron import known_versions
from tokenferry.integrations.megatron.base import InferenceAllGatherDispatcherBase, StandaloneBase
from tokenferry.integrations.megatron.engine_hook import EngineHook, place_engine_hook
from tokenferry.integrations.megatron.expert_entries import ExpertEntries
from tokenferry.integrations.megatron.known_versions import KNOWN_VERSIONS, TRIED_VERSIONS
from tokenferry.integrations.megatron.nccl import NCCLAllGatherDispatcher
from tokenferry.integrations.megatron.nvls import NVLSAllGatherVDispatcher

_log = logging.getLogger(__name__)

BASE_NAME: Final = "MoEAllGatherTokenDispatcher"
CLASSES: Final = MappingProxyType(
    {cls.__name__: cls for cls in (InferenceAllGatherDispatcherBase, NCCLAllGatherDispatcher, NVLSAllGatherVDispatcher)}
)
ENTRIES: Final = ("mcore_fused_moe", "vllm_fused_moe")
BATCH_INVARIANT_MODULE: Final = "megatron.core.transformer.custom_layers.batch_invariant_kernels"


@dataclass(frozen=True)
class _Patch:
    module: ModuleType
    name: str
    original: Any
    replacement: Any


class Installation:
    """What `install` has done. Calling it undoes that; so does leaving it as a context manager. Undoing twice does nothing.

    Attributes:
        version: of the megatron-core that was found.
        tried: whether this release was run with ours in the place of its own; else its names and parameters agree, or were
            allowed to differ.
        differences: where its names and parameters depart from those that are known; empty unless they were allowed to.
        replaced: "module.name" for every name that was replaced.
        experts: who serves the expert kernels, and their memory; None without `experts=True`.
    """

    def __init__(
        self,
        version: str,
        patches: list[_Patch],
        engine_hook: EngineHook,
        *,
        differences: tuple[str, ...] = (),
        experts: ExpertEntries | None = None,
        undo_settings: Callable[[], None] = lambda: None,
    ) -> None:
        self.version, self.tried, self.differences, self.experts = version, version in TRIED_VERSIONS, differences, experts
        self._patches, self._engine_hook, self._undo_settings = patches, engine_hook, undo_settings
        self.replaced = (*(f"{patch.module.__name__}.{patch.name}" for patch in patches), *engine_hook.replaced)

    def __call__(self) -> None:
        """Puts everything back. Dispatchers that exist stay ours. Scratch of the experts is freed: graphs that were captured in
        between must not be replayed."""
        patches, self._patches = self._patches, []
        self._engine_hook()
        for patch in patches:
            setattr(patch.module, patch.name, patch.original)
        if not patches:
            return
        originals = {id(patch.replacement): patch.original for patch in patches}
        for module, name, value in _names_inside_megatron():  # of modules that were imported in the meantime
            if id(value) in originals:
                setattr(module, name, originals[id(value)])
        InferenceAllGatherDispatcherBase.__bases__ = (StandaloneBase,)
        InferenceAllGatherDispatcherBase._registry.installed_experts = None
        if self.experts is not None:
            self.experts.free()
        self._undo_settings()

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self()

    def __repr__(self) -> str:
        tried = "" if self.tried else ", which was not tried"
        return f"Installation(megatron-core {self.version}{tried}; {len(self._patches)} names replaced)"


def install(*, experts: bool = False, allow_unknown_version: bool = False, **settings: Any) -> Installation:
    """Replaces megatron-core's three inference dispatchers by ours, in every module that has imported them, until undone.

    Comes before the model is built: dispatchers that exist stay what they are, and must not be used until undone, since
    Megatron's code finds their class attributes by the names that are replaced. Ours become subclasses of Megatron's
    `MoEAllGatherTokenDispatcher` for as long. All ranks do it, with the same arguments.

    Args:
        experts: replace its expert kernels of the backends "vllm" and "torch" by `fused_moe` too, wherever that serves: squared
            ReLU and SwiGLU in bfloat16 on CUDA. Elsewhere, and in its batch-invariant mode, Megatron's own go on. The log says
            which, and why; `Installation.experts.decisions` holds it. Layers of all models on a device share one scratch, so
            models that run at the same time, on two streams of one process, must leave it off.
        allow_unknown_version: go on with a megatron-core that is not known, or whose names or parameters differ. Constructors
            must agree in any case.
        settings: fields of `Settings`, as `configure` takes them; undoing brings the former ones back, unless `configure` has
            changed them since.

    Returns:
        A callable that undoes it, also a context manager.

    Raises:
        ConfigError: no megatron-core; one that is not known, or differs (every name that does is listed); a bad setting.
        StateError: it is installed already.
        TypeError: a setting that there is not.
    """
    if InferenceAllGatherDispatcherBase.__bases__ != (StandaloneBase,):
        raise StateError("install: the dispatchers are installed already; undo that first")
    names = {**known_versions.NAMES, **(known_versions.EXPERT_NAMES if experts else {})}
    modules = {name: _import(name) for name in names}
    version = _version()
    differences = known_versions.differences(modules, names, CLASSES)
    _check_version(version, differences, allow_unknown_version)
    _check_constructors(modules, version)
    found = _expert_entries(modules, version) if experts else {}
    registry = InferenceAllGatherDispatcherBase._registry
    before = registry.settings
    registry.configure(dataclasses.replace(before, **settings))
    installed = registry.settings

    def undo_settings() -> None:
        now = registry.settings
        former = {name: getattr(before, name) for name in settings if getattr(now, name) == getattr(installed, name)}
        registry.settings = dataclasses.replace(now, **former)  # what configure() has changed since stays

    originals: dict[str, Any] = {name: getattr(modules[known_versions.DISPATCHERS], name) for name in CLASSES}
    replacements: dict[str, Any] = dict(CLASSES)
    entries = None
    if experts:
        entries = ExpertEntries(found, _batch_invariant_mode(), installed.expert_scratch_bytes)
        originals |= found
        replacements |= entries.replacements
    registry.installed_experts = entries
    InferenceAllGatherDispatcherBase.__bases__ = (getattr(modules[known_versions.BASE], BASE_NAME),)
    engine_hook = place_engine_hook()  # before the search: it imports modules that hold the names
    patches = _patches(originals, replacements)
    for patch in patches:
        setattr(patch.module, patch.name, patch.replacement)
    return Installation(
        version, patches, engine_hook, differences=tuple(differences), experts=entries, undo_settings=undo_settings
    )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"install: {name} cannot be imported ({error}); install megatron-core {KNOWN_VERSIONS[0]}.x, "
            "or use tokenferry.integrations.megatron without it"
        ) from error


def _version() -> str:
    text = str(getattr(_import("megatron.core.package_info"), "__version__", "unknown"))
    release = re.match(r"\d+(\.\d+)*", text)
    return release.group() if release else text


def _check_constructors(modules: Mapping[str, ModuleType], version: str) -> None:
    for name, ours in CLASSES.items():
        original = getattr(modules[known_versions.DISPATCHERS], name, None)
        if original is None:
            raise ConfigError(f"megatron-core {version} has no {name} in {known_versions.DISPATCHERS}")
        theirs, own = (known_versions.parameters_of(cls) for cls in (original, ours))
        if theirs != own:
            raise ConfigError(f"{name} of megatron-core {version} is constructed with ({theirs}), ours with ({own})")


def _expert_entries(modules: Mapping[str, ModuleType], version: str) -> dict[str, Any]:
    found = {name: getattr(modules[known_versions.EXPERT_ENTRIES], name, None) for name in ENTRIES}
    for name, entry in found.items():
        if entry is None:
            raise ConfigError(f"install(experts=True) needs {name}, which megatron-core {version} has not; leave it off")
    return found


def _check_version(version: str, differences: list[str], allow_unknown_version: bool) -> None:
    """Refuses what is not known or differs, unless allowed; says in the log what was not tried."""
    series = known_versions.series_of(version)
    listed = "".join(f"\n  - {text}" for text in differences)
    if series is None or differences:
        knows = f"tokenferry knows {', '.join(f'{known}.x' for known in KNOWN_VERSIONS)} ({TRIED_VERSIONS[0]} was tried)"
        text = f"megatron-core {version} is not known; {knows}" if series is None else f"megatron-core {version} is not as known"
        text += f". Names that differ:{listed}" if differences else ". All names and parameters that ours relies on agree"
        if not allow_unknown_version:
            raise ConfigError(f"{text}\ninstall(allow_unknown_version=True) goes on with it")
        _log.warning("install: %s", text)
    elif version not in TRIED_VERSIONS:
        remark = known_versions.REMARKS.get(series, "its names and parameters agree with those of the release that was")
        _log.warning("install: megatron-core %s was not tried; %s", version, remark)


def _batch_invariant_mode() -> Callable[[], bool]:
    """Megatron's own question, or a constant no where it has no such mode."""
    try:
        module = importlib.import_module(BATCH_INVARIANT_MODULE)
    except ModuleNotFoundError:
        return lambda: False
    return getattr(module, "is_batch_invariant_mode_enabled", lambda: False)


def _patches(originals: Mapping[str, Any], replacements: Mapping[str, Any]) -> list[_Patch]:
    """Every place that imported one of the originals. Outside Megatron only under its own name: who keeps the original under
    another one, to compare with, means the original."""
    found = []
    for module, inside in _modules():
        for name, value in list(vars(module).items()):
            for own, original in originals.items():
                if value is original and (inside or name == own):
                    found.append(_Patch(module, name, value, replacements[own]))
    return found


def _modules() -> Iterator[tuple[ModuleType, bool]]:
    """All modules once, and whether each is Megatron's."""
    unique = {id(module): module for module in list(sys.modules.values()) if isinstance(module, ModuleType)}
    for module in unique.values():
        yield module, module.__name__.partition(".")[0] == "megatron"


def _names_inside_megatron() -> Iterator[tuple[ModuleType, str, Any]]:
    for module, inside in _modules():
        if inside:
            yield from ((module, name, value) for name, value in list(vars(module).items()))
