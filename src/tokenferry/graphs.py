"""Model forwards as CUDA graphs, one for each bucket of token counts: pad to the smallest that fits, replay, check.

On symmetric transports every rank chooses its graph alone, whatever the others do, since a captured step exchanges its counts
on the device. On the collective transport the shapes of a graph are the same on all ranks, so that they agree on a bucket, with
one exchange a step. Where there is no CUDA the padded forward runs as it is: the same choices, the same rows, for tests.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, SupportsIndex

import torch
from torch.utils._pytree import tree_map

from tokenferry.errors import (
    CapacityError,
    ConfigError,
    DeviceError,
    DtypeError,
    PeerError,
    ShapeError,
    StateError,
    UsageError,
    check_kind,
    refuse_pickling,
)
from tokenferry.lifecycle import WrongCallerError
from tokenferry.recording import Recorded, Recorder
from tokenferry.step import Announced, Step
from tokenferry.workspace import Workspace


def choose_bucket(buckets: Sequence[int], num_tokens: int) -> int | None:
    """The smallest of the ascending `buckets` that holds `num_tokens`; None: too many, run eagerly.

    Example:
        choose_bucket((0, 64, 256), 65) == 256; choose_bucket((0, 64, 256), 257) is None
    """
    return next((bucket for bucket in buckets if bucket >= num_tokens), None)


@dataclass(frozen=True, eq=False)
class _Launched:
    """A forward that may still run."""

    outputs: Any
    step: Step
    announced: Announced | None

    def all_done(self) -> bool:
        return self.step.all_done() if self.announced is None else self.announced.all_done


class GraphRunner:
    """Runs `fn` once per model forward, from a graph where one fits. Every rank calls it in every step, idle ones too.

    It begins the step: `fn` finds it begun and calls the layers. `fn` may begin further steps (a draft model's), as long as
    their number is the same on every rank, and on the collective transport their counts too (e.g. a function of the bucket).

    Args:
        workspace: what the layers in `fn` use. Its dispatchers and layers exist before.
        fn: takes as many tensors as there are `inputs`, each with T rows, and returns a tensor, or any pytree with
            tensors in it (tuples, named ones too, lists, dicts, registered dataclasses). T is a
            bucket, or in an eager step the number of tokens; rows after the real ones are padding: their experts' ids become -1,
            and what they give is cut off. T = 0 must be legal. Within a graph it runs once, while
            it is captured: it must not ask the device for a value, and reads what changes from `inputs` or from tensors
            that the caller keeps.
        buckets: token counts to capture, at most the workspace's max_tokens_per_rank; 0 is added for idle steps.
        inputs: one tensor for each argument of `fn`, whose dtype and shape [any, ...] count, and nothing else.
        num_warmups: eager calls of `fn` before each capture, that load kernels and fill caches.

    Ownership: the static inputs (`static_inputs`) and all outputs of a graph are the runner's. Outputs are valid until the
    next `begin`, `idle`, `capture` or `close`, in the order of the stream; clone what must live longer. An eager step's
    outputs are `fn`'s own, but the same rule covers both.

    Capturing: the constructor does it, on CUDA. On symmetric transports the warm-up runs in `workspace.solo()`, and nothing
    is asked of the peers. On the collective transport all ranks capture together. An exception leaves the workspace usable,
    without a step; but one that `fn` raises while it warms up with peers (collective) is told to them, as in an eager step.

    Raises:
        ConfigError: buckets that are no ints, none, or larger than the workspace's capacity.
        PeerTimeoutError: a rank did not come to a capture that needs all ranks.
    """

    def __init__(
        self,
        workspace: Workspace,
        fn: Callable[..., Any],
        buckets: Sequence[int],
        *,
        inputs: Sequence[torch.Tensor],
        num_warmups: int = 1,
    ) -> None:
        check_kind("workspace", workspace, Workspace)
        self.workspace, self.fn = workspace, fn
        self.buckets = _checked_buckets(buckets, workspace.max_tokens_per_rank)
        if isinstance(inputs, torch.Tensor) or not isinstance(inputs, Sequence):
            raise UsageError(f"inputs must be a list of tensors, one for each argument of fn; got {type(inputs).__name__}")
        if not inputs or not all(isinstance(tensor, torch.Tensor) and tensor.dim() for tensor in inputs):
            raise UsageError("inputs must be tensors of at least one dimension, one for each argument of fn")
        if not isinstance(num_warmups, int) or num_warmups < 1:
            raise ConfigError(f"num_warmups must be an int of at least 1, got {num_warmups!r}")
        self._num_warmups = num_warmups
        device = workspace.device
        with torch.inference_mode(False):  # later forwards may write to them outside of the mode
            self._static = tuple(
                torch.zeros((self.buckets[-1], *tensor.shape[1:]), dtype=tensor.dtype, device=device) for tensor in inputs
            )
            self._num_real = torch.zeros(1, dtype=torch.int32, device=device)
        self._captured: dict[tuple[int, bool], Recorded] = {}
        self._launched: _Launched | None = None
        self._inside = threading.Lock()
        self.last_bucket: int | None = None
        """The bucket of the forward that was begun last; None if it ran eagerly."""
        self.capture()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        refuse_pickling(self, "its graphs are of this process: make one on every rank, in the rank's process")

    @property
    def static_inputs(self) -> tuple[torch.Tensor, ...]:
        """What graphs read: [largest bucket, ...] each. A caller who writes the first n rows and passes them as they are saves
        the copy. Rows after the real ones hold what an earlier step left there, at first zeros."""
        return self._static

    @property
    def num_graphs(self) -> int:
        """Graphs held now: one a bucket and one for a done rank; 0 without CUDA."""
        return len(self._captured)

    # --- capture ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def capture(self) -> None:
        """Captures all graphs, anew if there were some: due after a `workspace.reset`, on every rank that goes on."""
        self.workspace.lifecycle.require_usable("capture")
        self.close()
        self._generation = self.workspace.generation
        if self.workspace.device.type != "cuda":
            return
        keys = [(bucket, False) for bucket in reversed(self.buckets)] + [(0, True)]  # the largest first: others reuse its memory
        recorder = Recorder(self.workspace)
        try:
            with self._busy_alone(f"capturing {len(keys)} graphs"):
                for bucket, done in keys:
                    self._captured[bucket, done] = self._capture_one(bucket, done, recorder)
        except BaseException:
            self.close()
            raise

    def _capture_one(self, bucket: int, done: bool, recorder: Recorder) -> Recorded:
        workspace, stream = self.workspace, recorder.stream
        self._num_real.fill_(bucket)
        stream.wait_stream(torch.cuda.current_stream(workspace.device))
        with torch.cuda.stream(stream):
            for _ in range(self._num_warmups):
                self._warm_up(bucket, done)
        stream.synchronize()
        with workspace.busy("capturing a graph"), workspace.equal_counts():
            return recorder.record(lambda: self._forward(bucket, done))

    def _busy_alone(self, reason: str) -> contextlib.AbstractContextManager[None]:
        """`Workspace.busy`, but where the warm-up is with the peers: a wait for a dead one there must end as ever."""
        with_peers = self.workspace.active_transport.counts_pass_through_hosts
        return contextlib.nullcontext() if with_peers else self.workspace.busy(reason)

    def _warm_up(self, bucket: int, done: bool) -> None:
        """Alone on symmetric transports. With the peers on the collective one, whose library connects ranks at first use."""
        if self.workspace.active_transport.counts_pass_through_hosts:
            with self.workspace.equal_counts():
                self._guarded(lambda: self._forward(bucket, done))
        else:
            with self.workspace.solo():
                self._forward(bucket, done)

    def _forward(self, num_rows: int, done: bool) -> tuple[Step, Any]:
        with self.workspace.saying_done(done):
            step = self.workspace.begin_step(num_rows, self._num_real)
            return step, self.fn(*(tensor[:num_rows] for tensor in self._static))

    # --- run --------------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """`begin` and `end`."""
        self.begin(*inputs)
        return self.end()

    def begin(self, *inputs: torch.Tensor) -> None:
        """Starts a forward. Returns at once on symmetric transports: nothing waits for the device when a graph fits.

        Args:
            inputs: [n, ...] each, on the workspace's device; 0 <= n <= max_tokens_per_rank. They are copied in stream order.

        Raises:
            ShapeError, DtypeError, DeviceError, CapacityError: before anything is told to the peers.
            StateError: the workspace was reset after the capture (call `capture()`), or is in the middle of a dispatch.
            PeerTimeoutError, PeerFailedError: another rank is the cause.
            Whatever an eager `fn` raises: the peers, who wait for this rank, get PeerFailedError; then reset, and `capture()`.
        """
        self._begin(self._check_inputs(inputs), inputs, done=False)

    def end(self) -> Any:
        """Waits until the forward is through (here the host waits for the device), checks the peers, and returns the outputs.

        Returns:
            What `fn` returned; of tensors with as many rows as the bucket, the first n.

        Raises:
            StateError: nothing was begun.
            PeerTimeoutError, PeerFailedError: as `Workspace.check`; the outputs are not to be trusted, and are not returned.
        """
        return self._finish().outputs

    def idle(self, *, done: bool = False) -> bool:
        """A forward without tokens, for a rank that has no work while others may have.

        Args:
            done: this rank will bring no tokens any more, and only takes part for the others' sake.

        Returns:
            Whether every rank said done, in this step: all find it in the same one, and stop calling.
        """
        empty = tuple(tensor[:0] for tensor in self._static)
        self._begin(0, empty, done=done)
        return self._finish().all_done()

    def close(self) -> None:
        """Drops the graphs and their memory; `capture()` makes them again. Before `Workspace.close` where NCCL was captured.
        In a forked child it does nothing: they are the parent's."""
        if not self.workspace.lifecycle.is_at_home:
            return
        if self._captured:
            torch.cuda.synchronize(self.workspace.device)
        self._captured.clear()
        self._launched = None
        self._generation = -1

    def _begin(self, num_tokens: int, inputs: tuple[torch.Tensor, ...], *, done: bool) -> None:
        if not self._inside.acquire(blocking=False):  # between two calls on the workspace it would not notice a second forward
            raise WrongCallerError(
                "begin: another thread is inside a forward of this runner; let one thread at a time use it, or make a second "
                "workspace and runner for the other"
            )
        try:
            self._begin_alone(num_tokens, inputs, done=done)
        finally:
            self._inside.release()

    @torch.no_grad()
    def _begin_alone(self, num_tokens: int, inputs: tuple[torch.Tensor, ...], *, done: bool) -> None:
        workspace = self.workspace
        if self._generation != workspace.generation:
            why = "closed" if self._generation < 0 else f"captured in generation {self._generation} of the workspace"
            raise StateError(
                f"the runner was {why}, and now is generation {workspace.generation}; call capture() on every rank that goes on"
            )
        self._launched = None
        announced = workspace.announce(num_tokens, done=done)
        largest = num_tokens if announced is None else max(announced.tokens_per_rank)
        self.last_bucket = bucket = choose_bucket(self.buckets, largest)
        if bucket is None:
            step, outputs = self._run_eagerly(largest, num_tokens, inputs, done)
        else:
            step, outputs = self._run_bucket(bucket, num_tokens, inputs, done and bucket == 0)
        rows = step.num_tokens
        self._launched = _Launched(_cut(outputs, rows, num_tokens) if rows != num_tokens else outputs, step, announced)

    def _run_bucket(self, bucket: int, num_tokens: int, inputs: tuple[torch.Tensor, ...], done: bool) -> tuple[Step, Any]:
        if num_tokens:
            for static, given in zip(self._static, inputs, strict=True):
                _fill(static, given)
        self._num_real.fill_(num_tokens)
        captured = self._captured.get((bucket, done))
        if captured is None:
            agreed = self.workspace.active_transport.counts_pass_through_hosts
            with self.workspace.equal_counts() if agreed else contextlib.nullcontext():
                return self._guarded(lambda: self._forward(bucket, done))
        with self.workspace.replaying(captured.num_steps):
            captured.replay()
        step, outputs = captured.result
        return step, outputs

    def _run_eagerly(self, largest: int, num_tokens: int, inputs: tuple[torch.Tensor, ...], done: bool) -> tuple[Step, Any]:
        rows = largest if self.workspace.counts == "equal" else num_tokens

        def forward() -> tuple[Step, Any]:
            given = inputs
            if rows > num_tokens:
                given = tuple(torch.cat([own, own.new_zeros((rows - num_tokens, *own.shape[1:]))]) for own in inputs)
            with self.workspace.saying_done(done):
                step = self.workspace.begin_step(rows, num_tokens)
                return step, self.fn(*given)

        return self._guarded(forward)

    def _guarded(self, forward: Callable[[], tuple[Step, Any]]) -> tuple[Step, Any]:
        """A forward with the peers: if it fails here, they are told, since they wait for this rank's rows."""
        try:
            return forward()
        except (PeerError, WrongCallerError):  # another thread's forward goes on
            raise
        except BaseException as error:
            if self.workspace.group.size > 1:
                self.workspace.tell_peers(error)
            else:
                self.workspace.lifecycle.leave_step()
            raise

    def _finish(self) -> _Launched:
        launched, self._launched = self._launched, None
        if launched is None:
            raise StateError("end: no forward was begun; call begin() first")
        self.workspace.lifecycle.require_at_home("end")
        if self.workspace.device.type == "cuda":
            torch.cuda.current_stream(self.workspace.device).synchronize()
        self.workspace.check()
        return launched

    def _check_inputs(self, inputs: tuple[torch.Tensor, ...]) -> int:
        if len(inputs) != len(self._static):
            raise UsageError(f"the runner takes {len(self._static)} inputs, got {len(inputs)}")
        for index, (given, static) in enumerate(zip(inputs, self._static, strict=True)):
            check_kind(f"input {index}", given, torch.Tensor)
            if given.dim() != static.dim() or given.shape[1:] != static.shape[1:]:
                raise ShapeError(f"input {index} must be [n, {', '.join(map(str, static.shape[1:]))}], got {list(given.shape)}")
            if given.dtype != static.dtype:
                raise DtypeError(f"input {index} must be {static.dtype}, got {given.dtype}; convert it with .to()")
            if given.device != static.device:
                raise DeviceError(f"input {index} is on {given.device} but the workspace is on {static.device}; move it there")
            if given.shape[0] != inputs[0].shape[0]:
                raise ShapeError(f"input {index} has {given.shape[0]} rows but input 0 has {inputs[0].shape[0]}")
        num_tokens, capacity = inputs[0].shape[0], self.workspace.max_tokens_per_rank
        if num_tokens > capacity:
            raise CapacityError(f"{num_tokens} tokens but the workspace was opened for {capacity}; split the step")
        return num_tokens


def _checked_buckets(buckets: Sequence[int], capacity: int) -> tuple[int, ...]:
    if isinstance(buckets, str) or not isinstance(buckets, Sequence) or not buckets:
        raise ConfigError(f"buckets must be a list of token counts, got {buckets!r}")
    for bucket in buckets:
        if not isinstance(bucket, int) or isinstance(bucket, bool) or not 0 <= bucket <= capacity:
            raise ConfigError(f"a bucket must be an int between 0 and max_tokens_per_rank, {capacity}; got {bucket!r}")
    return tuple(sorted({0, *buckets}))


def _fill(static: torch.Tensor, given: torch.Tensor) -> None:
    """Copies rows into the head of a static input, unless they are its head."""
    if given.data_ptr() == static.data_ptr() and given.stride() == static.stride():
        return
    if given.untyped_storage().data_ptr() == static.untyped_storage().data_ptr():
        given = given.clone()  # other rows of the static input: they may lie where the copy goes
    static[: given.shape[0]].copy_(given)


def _cut(outputs: Any, num_rows: int, num_tokens: int) -> Any:
    """The first `num_tokens` rows of every tensor in `outputs` that has `num_rows`."""

    def cut(output: Any) -> Any:
        is_cut = isinstance(output, torch.Tensor) and output.dim() and output.shape[0] == num_rows
        return output[:num_tokens] if is_cut else output

    return tree_map(cut, outputs)
