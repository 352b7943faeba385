"""Continuous batching of transformers under expert parallelism: its graphs hold steps, its errors surface, and while it has no
request it takes part in the other ranks' steps.

transformers' manager runs a thread. In it a batch processor makes batches, a model runner computes them, eagerly or by CUDA
graphs that it captures itself. What these need of a workspace is put into a manager that transformers has made (`adopt`):

- a batch is padded to a size that a graph has; rows of padding go to no expert;
- warming up and capturing concern this rank alone: such forwards are no steps of the group;
- a replay is told to the workspace, and a peer's failure is raised as soon as the step's tokens are on the host;
- waiting for requests is taking part without tokens.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from tokenferry.errors import CapacityError, ConfigError, PeerError
from tokenferry.graph_capture import captured
from tokenferry.integrations.transformers.capturable import why_not_captured
from tokenferry.integrations.transformers.expert_parallel import ExpertParallel

_PAUSES_S: Final = (0.001, 0.01)
"""Between two steps in which no rank has tokens: the first, and the longest. A new request waits for the other ranks' pauses."""
_EVENTS: Final = ("_wake_up_loop", "_has_new_requests")
"""Where the manager keeps the event that it waits for; the first since transformers 5.23."""
_NOT_CAPTURED: Final = (
    "continuous batching was capturing this model's forward in a CUDA graph, which the other ranks know nothing of; with "
    "use_cuda_graph=False it runs eagerly"
)


def limit(config: Any, parallel: ExpertParallel) -> None:
    """Fits a configuration of continuous batching to the model, before anything is started.

    Raises:
        CapacityError: it asks for larger batches than `max_tokens_per_rank`.
        ConfigError: it asks for CUDA graphs of a forward that cannot be captured.
    """
    capacity = parallel.options.max_tokens_per_rank
    if config.max_batch_tokens is None:
        config.max_batch_tokens = capacity
    elif config.max_batch_tokens > capacity:
        raise CapacityError(
            f"max_batch_tokens is {config.max_batch_tokens} but max_tokens_per_rank is {capacity}; "
            f"set max_batch_tokens to {capacity} or less, or load the model with a larger max_tokens_per_rank"
        )
    if parallel.group.device.type != "cuda":
        return
    reason = why_not_captured(parallel)
    if reason is None:
        return
    if config.use_cuda_graph is None:
        config.use_cuda_graph = False
    elif config.use_cuda_graph not in (False, (False, False)):
        raise ConfigError(f"use_cuda_graph is {config.use_cuda_graph}, but {reason}, or leave use_cuda_graph out")


def adopt(manager: Any, parallel: ExpertParallel) -> Any:
    """Puts expert parallelism into a manager. Returns it. Again changes nothing."""
    name = next(name for name in _EVENTS if hasattr(manager, name))
    if isinstance(getattr(manager, name), WaitingInSteps):
        return manager
    setattr(manager, name, WaitingInSteps(parallel, lambda: _compute_stream(manager)))
    create, warm_up = manager._create_batch_processor, manager.warmup

    def create_batch_processor() -> Any:
        processor = create()
        if getattr(processor.model_runner, "tokenferry", None) is None:
            processor.model_runner.tokenferry = Steps(processor, parallel)
        return processor

    def warmup() -> None:
        parallel.note_swallowed(None)
        try:
            warm_up()
            parallel.raise_swallowed()  # transformers logs what a warm-up raises, and goes on
        except BaseException:
            _put_attention_back(manager)
            raise

    manager._create_batch_processor, manager.warmup = create_batch_processor, warmup
    return manager


class WaitingInSteps(threading.Event):
    """The event of a manager that has no request: it waits for one, and meanwhile takes part in the other ranks' steps.

    While another thread uses the model, that one takes part: `generate_batch` hosts its manager's thread.

    Args:
        compute_stream: on which the manager's forwards run; None on CPUs.
    """

    def __init__(self, parallel: ExpertParallel, compute_stream: Callable[[], torch.cuda.Stream | None]) -> None:
        super().__init__()
        self._parallel, self._compute_stream = parallel, compute_stream
        self._pause_s = _PAUSES_S[0]

    def wait(self, timeout: float | None = None) -> bool:
        """As that of `threading.Event`; a step may take longer."""
        end_s = float("inf") if timeout is None else time.monotonic() + timeout
        while not self.is_set() and (left_s := end_s - time.monotonic()) > 0:
            self._take_part(left_s)
        return self.is_set()

    def _take_part(self, left_s: float) -> None:
        parallel = self._parallel
        if not parallel.thread.try_enter():
            super().wait(min(left_s, _PAUSES_S[1]))
            return
        try:
            with _on_stream(self._compute_stream()):
                _, num_tokens = parallel.take_part(done=False)
        except PeerError as error:
            parallel.note_swallowed(error)
            raise
        finally:
            parallel.thread.leave()
        if num_tokens:
            self._pause_s = _PAUSES_S[0]
        else:
            super().wait(min(left_s, self._pause_s))
            self._pause_s = min(2 * self._pause_s, _PAUSES_S[1])


class Steps:
    """The forwards of one model runner of transformers, as steps of a workspace. It takes the place of some of its methods.

    Args:
        processor: the batch processor, new.
    """

    def __init__(self, processor: Any, parallel: ExpertParallel) -> None:
        self._processor, self._runner, self._parallel = processor, processor.model_runner, parallel
        self._num_real = torch.zeros(1, dtype=torch.int32, device=parallel.group.device)
        self._warms_up = False
        self._to_capture: tuple[Any, ...] | None = None
        runner = self._runner
        self._compute, self._warm_up, self._generate = runner.compute_batch, runner.warmup, processor._generation_step
        runner.compute_batch, runner.warmup, runner._capture_graph = self.compute_batch, self.warmup, self.capture
        processor._generation_step = self.generation_step

    def generation_step(self, model: Any) -> None:
        """One batch. Where its tokens are on the host by now, a peer's failure is raised, instead of handing them out."""
        try:
            self._generate(model)
            self._parallel.workspace.check(wait=False)
        except Exception as error:
            self._parallel.note_swallowed(error)
            raise

    def warmup(self, model: Any) -> None:
        """Forwards of this rank alone, and the graphs that are captured after them."""
        self._warms_up = True
        try:
            with self._parallel.workspace.busy("warming up continuous batching"):
                self._warm_up(model)
        finally:
            self._warms_up = False

    def compute_batch(self, model: Any, batch_data: dict[str, Any]) -> None:
        """A forward: eagerly, captured and run, or replayed."""
        parallel = self._parallel
        try:
            with self._padding():
                if not self._warms_up:
                    self._compute(model, batch_data)
                    return
                with parallel.thread.inside("warmup"), parallel.workspace.solo():
                    self._compute(model, batch_data)
                arguments, self._to_capture = self._to_capture, None
                if arguments is not None:
                    self._capture(*arguments)
        except Exception as error:
            parallel.note_swallowed(error)
            raise

    def capture(self, forward: Callable[..., None], stream: torch.cuda.Stream, *args: Any) -> None:
        """A forward for which there is no graph yet: it is run, then captured for the next time."""
        with torch.cuda.stream(stream), torch.cuda.use_mem_pool(self._runner.mem_pool):
            forward(*args)
        if self._warms_up:
            self._to_capture = (forward, stream, *args)  # once the workspace is no longer this rank's alone
        else:
            self._capture(forward, stream, *args)

    def _capture(self, forward: Callable[..., None], stream: torch.cuda.Stream, *args: Any) -> None:
        graph, workspace, runner = torch.cuda.CUDAGraph(), self._parallel.workspace, self._runner
        try:
            with (
                workspace.busy("capturing a forward of continuous batching"),
                workspace.capturing() as num_steps,
                captured(graph, stream=stream, pool=runner.graph_pool_id),
            ):
                forward(*args)
        except BaseException as error:
            runner.mem_pool = torch.cuda.MemPool()
            runner.graph_pool_id = runner.mem_pool.id
            error.add_note(_NOT_CAPTURED)
            raise
        runner.inputs_and_outputs.set_graph(
            StepGraph(self, graph, num_steps(), workspace.generation, lambda: self.capture(forward, stream, *args))
        )

    def replay(self, graph: torch.cuda.CUDAGraph, num_steps: int) -> None:
        """A step, or `num_steps` of them, on the current stream. While warming up nothing: there are no peers then."""
        parallel = self._parallel
        if self._warms_up:
            return
        parallel.thread.enter("forward", as_guest=True)
        try:
            with parallel.workspace.replaying(num_steps):
                graph.replay()
        finally:
            parallel.thread.leave()

    @property
    def generation(self) -> int:
        """Of the workspace now."""
        return self._parallel.workspace.generation

    @contextlib.contextmanager
    def _padding(self) -> Iterator[None]:
        """Within it, forwards know how many of their rows are real."""
        parallel, runner = self._parallel, self._runner
        if not runner.pad_inputs:
            yield
            return
        ios = runner.inputs_and_outputs
        inputs = ios.io_pairs[ios.current_pair].host_io if hasattr(ios, "io_pairs") else ios
        with _on_stream(ios.compute_stream):
            self._num_real.fill_(inputs.total_seqlen_q)
        parallel.num_real_tokens = self._num_real
        try:
            yield
        finally:
            parallel.num_real_tokens = None


class StepGraph:
    """A captured forward, in the place of the `torch.cuda.CUDAGraph` that transformers would keep.

    Args:
        generation: of the workspace when it was captured.
        again: runs the forward and captures it anew.
    """

    def __init__(
        self, steps: Steps, graph: torch.cuda.CUDAGraph, num_steps: int, generation: int, again: Callable[[], None]
    ) -> None:
        self._steps, self._graph, self._num_steps = steps, graph, num_steps
        self._generation, self._again = generation, again

    def replay(self) -> None:
        """On the current stream. After a reset of the workspace, whose buffers are others, the forward is captured anew."""
        if self._generation == self._steps.generation:
            self._steps.replay(self._graph, self._num_steps)
        else:
            self._again()

    def reset(self) -> None:
        """Lets go of the graph."""
        self._graph.reset()


def _put_attention_back(manager: Any) -> None:
    """What `manager.stop()` does of a manager that was started: with paged attention `generate()` would fail."""
    if manager._original_attn_impl is not None:
        manager.model.set_attn_implementation(manager._original_attn_impl)
        manager._original_attn_impl = None


def _compute_stream(manager: Any) -> torch.cuda.Stream | None:
    processor = manager.batch_processor
    return None if processor is None else processor.inputs_and_outputs.compute_stream


def _on_stream(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
