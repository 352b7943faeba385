"""Decode steps of `generate()` as CUDA graphs: a forward of one new token for each sequence is recorded once and then replayed.

What is replayed is right for one cache, one shape of each argument, and one phase of the cache (`cache_state.py`). The first such
forward runs eagerly, and loads what a recording must not load; the second is recorded. A later cache of the same shapes is
recorded in its first decode step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Final, Protocol

import torch
from transformers import StaticCache
from transformers.utils.generic import ModelOutput

from tokenferry.errors import PeerError
from tokenferry.integrations.transformers.cache_state import (
    HostState,
    NotRecordable,
    ReplayedState,
    check_kind,
    phase_of,
)
from tokenferry.integrations.transformers.fixed_inputs import FixedInputs, shape_key
from tokenferry.integrations.transformers.model_facts import model_facts
from tokenferry.integrations.transformers.static_caches import StaticCaches
from tokenferry.lifecycle import WrongCallerError
from tokenferry.recording import Recorded, Recorder
from tokenferry.workspace import Workspace

_log = logging.getLogger(__name__)

MOST_GRAPHS: Final = 8
"""Kept for a model: two phases of each cache that `StaticCaches` keeps. Their launches take some kilobytes each, and what
they compute with is shared."""
_MOST_SHAPES: Final = 32
"""Sets of fixed inputs, of kilobytes each."""


class MakesRecorder(Protocol):
    """`Recorder`, or what stands in for it in tests."""

    def __call__(self, workspace: Workspace) -> Recorder: ...


@dataclasses.dataclass(eq=False)
class _Graph:
    recorded: Recorded
    cache: weakref.ref[StaticCache]
    state: ReplayedState
    is_counted: bool = True
    """Recording it has counted the tokens of its first replay."""

    def fits(self, cache: StaticCache) -> bool:
        return self.cache() is cache and self.state.holds()


class DecodeGraphs:
    """The graphs of one model, and the caches that they are of.

    Attributes:
        caches: for calls that name none.
        returns_cache: whether the call under way hands its cache to the caller, who may keep it.
        stopped: why nothing is recorded any more, or None.
    """

    def __init__(self, workspace: Workspace, make_recorder: MakesRecorder = Recorder) -> None:
        self.caches = StaticCaches()
        self.returns_cache = False
        self.stopped: str | None = None
        self._workspace = workspace
        self._make_recorder = make_recorder
        self._recorder: Recorder | None = None
        self._inputs: OrderedDict[Hashable, FixedInputs] = OrderedDict()
        self._warm: set[Hashable] = set()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._said: set[str] = set()
        self._model_facts: Hashable = None
        self._depth = 0

    @property
    def num_graphs(self) -> int:
        """Graphs that are kept now."""
        return len(self._graphs)

    def takes(self, cache: object) -> bool:
        """Whether decode forwards on this cache come here."""
        return self.stopped is None and type(cache) is StaticCache

    def say_once(self, text: str, *, level: int = logging.WARNING) -> None:
        """Logs a line that has not been logged for this model."""
        if text not in self._said:
            self._said.add(text)
            _log.log(level, "%s", text)

    def run(self, form: Hashable, forward: Callable[..., Any], otherwise: Callable[..., Any], **inputs: Any) -> Any:
        """`forward(**inputs)`, from a graph where it can be recorded.

        Args:
            form: what distinguishes this `forward` from others of the same model.
            otherwise: in its place for what is no decode forward, such as parts of a prompt.

        Returns:
            As `forward`. Its logits are overwritten by the next call.

        Raises:
            As `forward`; PeerTimeoutError, PeerFailedError also for an earlier step.
        """
        if not _is_decode(inputs):
            return otherwise(**inputs)
        try:
            cache = check_kind(inputs["past_key_values"])
            key = form, _ambient_of(self._workspace.device), shape_key(inputs)
        except NotRecordable as reason:
            self.say_once(f"generate() runs decode steps eagerly: {reason}")
            return forward(**inputs)
        fixed = self._fixed_inputs(key, inputs)
        arguments = fixed.arguments(inputs)
        graph = self._graph_for(key, cache, lambda: forward(**arguments))
        return forward(**arguments) if graph is None else self._replay(graph)

    @contextlib.contextmanager
    def call(self, model: Any) -> Iterator[None]:
        """Around a `generate()` of the model; another one may be inside. Where the model is not what it was (`model_facts.py`),
        graphs are of one that is no more, and go."""
        if not self._depth:
            facts = model_facts(model)
            if facts != self._model_facts:
                self.drop()
            self._model_facts = facts
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.caches.take_back()
                self._drop_dead()

    def drop(self) -> None:
        """Lets go of all graphs and of their memory; they are recorded anew when they are needed."""
        if self._graphs and self._workspace.device.type == "cuda":
            torch.cuda.current_stream(self._workspace.device).synchronize()  # the last replay may still run
        self._graphs.clear()
        self._warm.clear()
        self._recorder = None

    def close(self) -> None:
        """Lets go of graphs, fixed inputs and caches, for good."""
        self.stopped = "the model was closed"
        self.drop()
        self._inputs.clear()
        self.caches.clear()

    def _fixed_inputs(self, key: Hashable, inputs: Mapping[str, Any]) -> FixedInputs:
        fixed = self._inputs.get(key)
        if fixed is None:
            while len(self._inputs) >= _MOST_SHAPES:
                oldest, _ = self._inputs.popitem(last=False)
                for name in [name for name in self._graphs if name[0] == oldest]:  # type: ignore[index]
                    del self._graphs[name]
            fixed = self._inputs[key] = FixedInputs(inputs, self._workspace.device)
        else:
            fixed.fill(inputs)
        self._inputs.move_to_end(key)
        return fixed

    def _graph_for(self, key: Hashable, cache: StaticCache, call: Callable[[], Any]) -> _Graph | None:
        """The graph of this forward, recorded if it is due. None: it runs eagerly."""
        phase = phase_of(cache)
        name = key, id(cache), phase
        graph = self._graphs.get(name)
        if graph is not None and graph.fits(cache):
            self._graphs.move_to_end(name)
            return graph
        if self.stopped is not None:
            return None
        if (key, phase) not in self._warm:
            self._warm.add((key, phase))
            return None
        self._graphs.pop(name, None)
        self._drop_dead()
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        graph = self._record(cache, call)
        if graph is not None:
            self._graphs[name] = graph
        return graph

    def _record(self, cache: StaticCache, call: Callable[[], Any]) -> _Graph | None:
        before: HostState | None = None
        if self._recorder is None:
            self._recorder = self._make_recorder(self._workspace)
        try:
            before = HostState(cache)
            recorded = self._recorder.record(call)
            return _Graph(recorded, weakref.ref(cache), before.replays(HostState(cache)))
        except BaseException as error:
            if before is not None:
                before.restore()
            if isinstance(error, PeerError | WrongCallerError) or not isinstance(error, Exception):
                raise
            self._stop(str(error) if isinstance(error, NotRecordable) else f"{type(error).__name__}: {error}")
            return None

    def _replay(self, graph: _Graph) -> Any:
        with self._workspace.replaying(graph.recorded.num_steps):
            graph.recorded.replay()
        if graph.is_counted:
            graph.is_counted = False
        else:
            graph.state.advance()
        self._workspace.check(wait=False)  # of earlier steps, with which generate() has synchronised
        return _handed_out(graph.recorded.result)

    def _stop(self, reason: str) -> None:
        """Nothing is recorded any more: what fails for one shape would fail for the next, and each failure costs memory."""
        self.stopped = " ".join(reason.split())
        self.drop()
        self.say_once(f"generate() goes on without CUDA graphs, since a decode step could not be recorded: {self.stopped}")

    def _drop_dead(self) -> None:
        for name in [name for name, graph in self._graphs.items() if graph.cache() is None]:
            del self._graphs[name]


def _is_decode(inputs: Mapping[str, Any]) -> bool:
    """One new token for each sequence, and a cache that holds what came before."""
    token_ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    return (
        isinstance(token_ids, torch.Tensor) and token_ids.dim() == 2 and token_ids.shape[1] == 1
        and getattr(cache, "is_initialized", False)
    )  # fmt: skip


def _ambient_of(device: torch.device) -> Hashable:
    """What of torch's ambient state becomes part of a recording."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return autocast, torch.is_inference_mode_enabled()


def _handed_out(result: Any) -> Any:
    """A forward's outputs for `generate()`, which copies the logits, but keeps hidden states and the like as they are."""
    if not isinstance(result, ModelOutput):
        return _cloned(result)
    extra = [name for name, value in result.items() if name != "logits" and not isinstance(value, StaticCache)]
    if not extra:
        return result
    own = copy.copy(result)
    for name in extra:
        own[name] = _cloned(result[name])
    return own


def _cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_cloned(each) for each in value)
    return value
