"""Lets failures of peers reach Megatron's inference engine, whose CUDA graphs replay without a call of ours.

Once a step, when the sampled tokens are on the host, the controller asks whether a peer has failed; the stream is not drained for
it. The engine's own agreement on a batch's shape, which waits without end for a peer that is gone, gets the same limit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from tokenferry.errors import PeerError
from tokenferry.integrations.megatron.base import InferenceAllGatherDispatcherBase
from tokenferry.integrations.megatron.engine_agreement import with_limit
from tokenferry.integrations.megatron.known_versions import parameters_of
from tokenferry.workspace import Workspace

_log = logging.getLogger(__name__)

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def open_workspaces() -> list[Workspace]:
    """All that the dispatcher classes have opened."""
    return InferenceAllGatherDispatcherBase._registry.workspaces()


@contextlib.contextmanager
def engine_step() -> Iterator[None]:
    """`Workspace.engine_step` of all that are open."""
    with contextlib.ExitStack() as steps:
        for workspace in open_workspaces():
            steps.enter_context(workspace.engine_step())
        yield


def _checks_after(original: Callable[..., Any]) -> Callable[..., Any]:
    """For what returns when a step's tokens are on the host: they are refused before the engine puts them into its requests."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        for workspace in open_workspaces():
            workspace.check(wait=False)
        return result

    return wrapped


def _is_step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with engine_step():
            return original(*args, **kwargs)

    return wrapped


def _is_awaited_step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        with engine_step():
            return await original(*args, **kwargs)

    return wrapped


def _agrees_in_time(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(local_batch_dims: Any, ep_group: Any = None, ep_zmq_communicator: Any = None) -> Any:
        workspaces = open_workspaces()
        limited = with_limit(ep_zmq_communicator, ep_group, workspaces) if workspaces else ep_zmq_communicator
        return original(local_batch_dims, ep_group=ep_group, ep_zmq_communicator=limited)

    return wrapped


def _tells_the_cause(original: Callable[..., Any]) -> Callable[..., Any]:
    """Within an event loop the engine runs a step on a thread, and takes every RuntimeError out of it for "there is no loop": it
    then starts the step's coroutine once more, and what that raises hid the peer's failure."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, PeerError):
                cause = cause.__cause__ or cause.__context__
            if cause is None or cause is error:
                raise
            raise cause from None

    return wrapped


_CONTROLLER: Final = "megatron.core.inference.text_generation_controllers.text_generation_controller.TextGenerationController"
_DIMENSIONS: Final = "megatron.core.inference.batch_dimensions_utils.InferenceBatchDimensions"
_ENGINE: Final = "megatron.core.inference.engines.dynamic_engine.DynamicInferenceEngine"
WRAPS: Final = MappingProxyType(
    {
        (_CONTROLLER, "async_generate_output_tokens_dynamic_batch"): _is_awaited_step,
        (_CONTROLLER, "dummy_forward"): _is_step,
        (_CONTROLLER, "_transfer_samples_to_cpu"): _checks_after,
        (_CONTROLLER, "_synchronize_async_sched_event"): _checks_after,
        (_DIMENSIONS, "adjust_batch_dims_for_expert_parallelism"): _agrees_in_time,
        (_ENGINE, "step_modern"): _tells_the_cause,
    }
)
"""What is wrapped, and how. The first two are what counts; a release without one of the others is served without it."""

_TAKES: Final = MappingProxyType({"adjust_batch_dims_for_expert_parallelism": "local_batch_dims, ep_group, ep_zmq_communicator"})
"""Parameters that a wrapper relies on by name; a release whose method has other ones is served without it. Earlier releases than
0.19 agree without `ep_zmq_communicator`."""


@dataclass(frozen=True)
class _Patch:
    owner: type
    name: str
    original: Any


class EngineHook:
    """What `place_engine_hook` has done. Calling it undoes that; twice does nothing.

    Attributes:
        replaced: "module.class.name" for every name that was replaced.
    """

    def __init__(self, patches: Sequence[_Patch]) -> None:
        self._patches = list(patches)
        self.replaced = tuple(f"{each.owner.__module__}.{each.owner.__qualname__}.{each.name}" for each in patches)

    def __call__(self) -> None:
        """Puts everything back. An engine that exists goes on without."""
        patches, self._patches = self._patches, []
        for patch in patches:
            setattr(patch.owner, patch.name, patch.original)


def place_engine_hook() -> EngineHook:
    """Wraps the methods of Megatron's engine that `WRAPS` names, for engines that exist too. Where megatron-core has no such
    engine, or it cannot be imported, nothing is replaced and the log says so: dispatchers raise in their own calls as ever."""
    patches, missing = [], {}
    for (path, name), wrap in WRAPS.items():
        try:
            owner = _class_at(path)
            original = vars(owner)[name]
            _check_parameters(name, original)
        except Exception as problem:  # noqa: BLE001  # importing runs Megatron's code, which may raise anything
            missing[f"{path.rpartition('.')[2]}.{name}"] = f"{type(problem).__name__}: {problem}"
            continue
        patches.append(_Patch(owner, name, original))
        setattr(owner, name, _wrapped(original, wrap))
    if missing:
        names, reason = ", ".join(missing), next(iter(missing.values()))
        _log.warning("a peer's failure is not looked for in these parts of Megatron's engine: %s (%s)", names, reason)
    return EngineHook(patches)


def _class_at(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _check_parameters(name: str, original: Any) -> None:
    found, expected = parameters_of(original), _TAKES.get(name)
    if expected is not None and found != expected:
        raise TypeError(f"it takes ({found}), not ({expected})")


def _wrapped(original: Any, wrap: Wrap) -> Any:
    return staticmethod(wrap(original.__func__)) if isinstance(original, staticmethod) else wrap(original)
