"""Decode steps of `generate()` as CUDA graphs: a forward of one new token for each sequence is recorded once and then replayed.

What is replayed is right for one cache, one shape of each argument, and one phase of the cache (`cache_state.py`). The first such
forward is not recorded: it loads, or compiles, what a recording must not. The second is, unless the first has compiled
something; what the compiler takes for a number of this step, it may take for any number in the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
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
from tokenferry.integrations.transformers.compiled_forwards import CompiledBySize
from tokenferry.integrations.transformers.compiled_layers import CompiledByLayers, layers_alike
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
_MOST_COMPILED: Final = 64
"""Times that the compiler may take up the forward: it starts with a few special sizes, in each phase of a cache."""
_THE_CACHE: Final = object()
"""Stands in a recorded result where the cache stood."""
_LONGEST: Final = 500
"""Of a reason in the log. A compiler's may have pages."""


class MakesRecorder(Protocol):
    """`Recorder`, or what stands in for it in tests."""

    def __call__(self, workspace: Workspace) -> Recorder: ...


@dataclasses.dataclass(eq=False)
class _Graph:
    """It does not keep its cache alive: one that nobody else keeps goes, and the graph with it."""

    recorded: Recorded
    fixed: FixedInputs
    cache: weakref.ref[StaticCache]
    state: ReplayedState
    is_counted: bool = True
    """Recording it has counted the tokens of its first replay."""

    def fits(self, cache: StaticCache) -> bool:
        return self.cache() is cache and self.state.holds(cache)


class Forward(NamedTuple):
    """A way to compute a model's forward.

    Attributes:
        name: distinguishes it from the model's others, in the log too.
        is_one_graph: it is compiled as one graph, so that where compiling fails, nothing of it has run.
    """

    name: str
    call: Callable[..., Any]
    is_one_graph: bool = False


class DecodeGraphs:
    """The graphs of one model, and the caches that they are of.

    Attributes:
        caches: for calls that name none.
        lends_caches: whether the call under way may have one of them.
        wants_compiled: whether the call under way may compile.
        stopped: whether no forward of the model can be recorded, so that nothing is tried any more.
        by_layers: whether layers that are alike are compiled one by one. Read when the first one is compiled.

    Args:
        forget_step: called where a recording failed, which may have begun a step in vain.
    """

    def __init__(self, workspace: Workspace, forget_step: Callable[[], None], make_recorder: MakesRecorder = Recorder) -> None:
        self.caches = StaticCaches()
        self.lends_caches = self.wants_compiled = False
        self.stopped = self.by_layers = False
        self._workspace = workspace
        self._forget_step, self._make_recorder = forget_step, make_recorder
        self._recorder: Recorder | None = None
        self._inputs: OrderedDict[Hashable, FixedInputs] = OrderedDict()
        self._warm: dict[tuple[Any, ...], weakref.ref[StaticCache]] = {}
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._given_up: set[str] = set()
        self._said: set[str] = set()
        self._model_facts: Hashable = None
        self._compiled: Forward | None = None
        self._depth = 0
        self._busy = contextlib.ExitStack()

    @property
    def num_graphs(self) -> int:
        """Graphs that are kept now."""
        return len(self._graphs)

    def takes(self, cache: object) -> bool:
        """Whether decode forwards on this cache come here."""
        return not self.stopped and type(cache) is StaticCache

    def say_once(self, text: str, *, level: int = logging.WARNING) -> None:
        """Logs a line that has not been logged for this model."""
        if text not in self._said:
            self._said.add(text)
            _log.log(level, "%s", text)

    def compiled(self, model: Any) -> Forward:
        """The model's forward, compiled where the call says nothing about it."""
        if self._compiled is None:
            parallel = model.expert_parallel
            layers = layers_alike(model, parallel.layers) if self.by_layers else None
            call = CompiledBySize(model) if layers is None else CompiledByLayers(model, layers, parallel)
            self._compiled = Forward("compiled", call, is_one_graph=True)
        return self._compiled

    def run(self, forwards: Sequence[Forward], otherwise: Callable[..., Any], **inputs: Any) -> Any:
        """One forward, from a graph where it can be recorded.

        Args:
            forwards: the first one is recorded; where it cannot be, from then on the next one.
            otherwise: what runs where none can be, and in their place for what is no decode forward, such as parts of a prompt.

        Returns:
            As the forwards. Its logits are overwritten by the next call.

        Raises:
            As the forwards; PeerTimeoutError, PeerFailedError also for an earlier step.
        """
        if not _is_decode(inputs):
            return otherwise(**inputs)
        try:
            cache = check_kind(inputs["past_key_values"])
            key = _ambient_of(self._workspace.device), shape_key(inputs)
            phase = phase_of(cache)
            for forward in forwards:
                outputs = self._run_form(forward, (forward.name, key, id(cache), phase), cache, inputs)
                if outputs is not None:
                    return outputs
            self.stopped = True
        except NotRecordable as reason:
            self.say_once(f"generate() runs decode steps eagerly: {reason}")
        return otherwise(**inputs)

    def _run_form(self, forward: Forward, name: tuple[Any, ...], cache: StaticCache, inputs: Mapping[str, Any]) -> Any:
        """One forward: replayed; recorded and replayed; or to warm up. None: it is given up, and nothing of it has run."""
        graph = self._graphs.get(name)
        if graph is not None and graph.fits(cache):
            self._graphs.move_to_end(name)
            graph.fixed.fill(inputs)
            return self._replay(graph, cache)
        if forward.name in self._given_up:
            return None
        before, fixed = HostState(cache), self._fixed_inputs(name[1], inputs)
        warm = self._warm.get(name)
        if warm is None or warm() is not cache:
            return self._warm_up(forward, name, cache, before, fixed.arguments(inputs))
        graph = self._record(forward, cache, before, fixed, inputs)
        if graph is None:
            return None
        self._drop_dead()
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        self._graphs[name] = graph
        return self._replay(graph, cache)

    @contextlib.contextmanager
    def call(self, model: Any) -> Iterator[None]:
        """Around a `generate()` of the model; another one may be inside. Where the model is not what it was (`model_facts.py`),
        graphs are of one that is no more, and go."""
        if not self._depth:
            facts = model_facts(model)
            if facts != self._model_facts:
                self._compiled = None
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
        """Lets go of all graphs and of their memory; they are recorded anew when they are needed. Raises the error of a device
        that has failed, afterwards."""
        try:
            if self._graphs and self._workspace.device.type == "cuda":
                torch.cuda.synchronize(self._workspace.device)  # the last replay may still run, on whichever stream it was
        finally:
            self._graphs.clear()
            self._warm.clear()
            self._recorder = None

    def close(self) -> None:
        """Lets go of graphs, fixed inputs and caches, for good."""
        self.stopped = True
        try:
            self.drop()
        finally:
            self._inputs.clear()
            self.caches.clear()
            self._compiled = None

    def _fixed_inputs(self, key: Hashable, inputs: Mapping[str, Any]) -> FixedInputs:
        fixed = self._inputs.get(key)
        if fixed is not None:
            self._inputs.move_to_end(key)
            fixed.fill(inputs)
            return fixed
        if len(self._inputs) >= _MOST_SHAPES:  # graphs read them, so that these go too
            self.drop()
            self._inputs.clear()
        fixed = self._inputs[key] = FixedInputs(inputs, self._workspace.device)
        return fixed

    def _warm_up(
        self, forward: Forward, name: tuple[Any, ...], cache: StaticCache, before: HostState, arguments: Mapping[str, Any]
    ) -> Any:
        """The forward itself, until it meets nothing that is new to it."""
        num_compiled = _num_compiled()
        try:
            with self._compiling(), torch._dynamo.config.patch(recompile_limit=_MOST_COMPILED):
                outputs = forward.call(**arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            if not forward.is_one_graph:
                raise
            before.restore()
            self._give_up(forward, error)
            return None
        if _num_compiled() == num_compiled:
            self._warm[name] = weakref.ref(cache)
        return outputs

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """The peers wait longer within it, until `step_begins`: in the step itself they would wait longer for a dead rank too."""
        with contextlib.ExitStack() as self._busy:
            self._busy.enter_context(self._workspace.busy("compiling a decode step"))
            yield

    def step_begins(self) -> None:
        """Called before a step is begun eagerly, or by compiled code: it is compiled by now."""
        self._busy.close()

    def _record(
        self, forward: Forward, cache: StaticCache, before: HostState, fixed: FixedInputs, inputs: Mapping[str, Any]
    ) -> _Graph | None:
        if self._recorder is None:
            self._recorder = self._make_recorder(self._workspace)
        arguments = fixed.arguments(inputs)
        try:
            with self._workspace.busy("recording a decode step"):
                recorded = self._recorder.record(lambda: forward.call(**arguments))
            recorded = dataclasses.replace(recorded, result=_without_cache(recorded.result))
            return _Graph(recorded, fixed, weakref.ref(cache), before.replays(HostState(cache)))
        except BaseException as error:
            self._forget_step()
            before.restore()
            if isinstance(error, PeerError | WrongCallerError) or not isinstance(error, Exception):
                raise
            self._give_up(forward, error)
            return None

    def _replay(self, graph: _Graph, cache: StaticCache) -> Any:
        with self._workspace.replaying(graph.recorded.num_steps):
            graph.recorded.replay()
        if graph.is_counted:
            graph.is_counted = False
        else:
            graph.state.advance(cache)
        self._workspace.check(wait=False)  # of earlier steps, with which generate() has synchronised
        return _handed_out(graph.recorded.result, cache)

    def _give_up(self, forward: Forward, error: Exception) -> None:
        """It is not tried any more: what fails for one shape would fail for the next, and each failure costs memory."""
        self._given_up.add(forward.name)
        reason = " ".join((str(error) if isinstance(error, NotRecordable) else f"{type(error).__name__}: {error}").split())
        self.say_once(f"decode steps of generate() go on without CUDA graphs of the {forward.name} forward: {reason[:_LONGEST]}")

    def _drop_dead(self) -> None:
        for name in [name for name, graph in self._graphs.items() if graph.cache() is None]:
            del self._graphs[name]
        self._warm = {name: cache for name, cache in self._warm.items() if cache() is not None}


def _is_decode(inputs: Mapping[str, Any]) -> bool:
    """One new token for each sequence, and a cache that holds what came before."""
    token_ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    return (
        isinstance(token_ids, torch.Tensor) and token_ids.dim() == 2 and token_ids.shape[1] == 1
        and getattr(cache, "is_initialized", False)
    )  # fmt: skip


def _num_compiled() -> int:
    """Graphs that the compiler has made in this process."""
    return int(counters["stats"]["unique_graphs"])


def _ambient_of(device: torch.device) -> Hashable:
    """What of torch's ambient state becomes part of a recording."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return autocast, torch.is_inference_mode_enabled()


def _without_cache(result: Any) -> Any:
    """A forward's outputs, to be kept: with a stand-in for the cache."""
    return _each(lambda value: _THE_CACHE if isinstance(value, StaticCache) else value, result)


def _handed_out(result: Any, cache: StaticCache) -> Any:
    """A recorded forward's outputs for `generate()`, which copies the logits, but keeps hidden states and the like."""

    def own(value: Any) -> Any:
        if value is _THE_CACHE:
            return cache
        return value.clone() if isinstance(value, torch.Tensor) else value

    if not isinstance(result, ModelOutput):
        return _each(own, result)
    return type(result)(**{name: value if name == "logits" else _each(own, value) for name, value in result.items()})


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` of all that is in a forward's outputs."""
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _each(change, inner) for name, inner in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each(change, inner) for inner in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_each(change, inner) for inner in value)
    return change(value)
