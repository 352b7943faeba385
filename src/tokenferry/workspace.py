"""A workspace: one group, one transport, the buffers and counts of one shape of MoE layer."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NoReturn, SupportsIndex

import torch

from tokenferry import env
from tokenferry.ambient import plain_torch
from tokenferry.config import MoEConfig
from tokenferry.dispatcher import Dispatcher
from tokenferry.errors import (
    CapacityError,
    ConfigError,
    DeviceError,
    DtypeError,
    PeerError,
    PeerFailedError,
    Phase,
    ShapeError,
    StateError,
    UsageError,
    refuse_pickling,
)
from tokenferry.groups import EPGroup
from tokenferry.kernels.control_block import MAX_LAYERS
from tokenferry.lifecycle import Lease, Lifecycle, Stage, WrongCallerError, logged
from tokenferry.operators import Operators, take_number
from tokenferry.step import Announced, Step, StepRequest, StepTensors
from tokenferry.transports import selection
from tokenferry.transports.base import CombineOrder, Counts, Transport, TransportFactory, TransportSettings
from tokenferry.transports.collective.transport import CollectiveTransport
from tokenferry.transports.opening import open_together, required_bytes
from tokenferry.transports.settings import check_dtypes, check_kinds, check_positive_ints, check_reset, check_settings
from tokenferry.waiting import Position

_log = logging.getLogger(__name__)


class Workspace:
    """Moves rows for all MoE layers of one shape. Opened by all ranks of the group together; a context manager.

    Args:
        config: shape of the layer.
        group: the expert-parallel group.
        max_tokens_per_rank: C, the most rows a rank may bring to a step, padding included.
        transport: "auto", one of `transports.selection.TRANSPORTS`, or an object that opens a transport of your own, of the same
            name on every rank: see `transports.base.TransportFactory`.
        combine_dtype: of the partial rows on the wire. Default: `config.dtype`.
        index_dtype: of `Dispatched.topk_idx`: int32, or int64 for expert kernels that want it; written so, without a pass.
        combine_order: "rank": terms are summed in rank order, the same bits on every transport. "any": the library's or the
            hardware's own order where that is faster, outside every promise of equal bits.
        counts: "uneven": ranks bring different numbers of rows. "equal": all ranks promise the same number in every step, and
            the collective transport exchanges no counts. Symmetric transports exchange them either way.
        timeout_s: how long a peer may be late before it is given up; on symmetric transports 1800 at most.
        open_timeout_s: the same while opening, when ranks still load models and compile.
        max_ctas: bound on the thread blocks of a kernel, for workspaces that share a GPU; None: chosen from shape and group.

    Raises:
        ConfigError: a setting is wrong, differs between ranks, or there are fewer experts than ranks.
        TransportUnavailableError: no transport fits, or none could be opened; `.decisions` has the reason for each.
        PeerTimeoutError: a rank did not come to open within `open_timeout_s`.
        PeerFailedError: a rank failed before its workspace was open.
    """

    def __init__(
        self,
        config: MoEConfig,
        group: EPGroup,
        *,
        max_tokens_per_rank: int,
        transport: str | TransportFactory = "auto",
        combine_dtype: torch.dtype | None = None,
        index_dtype: torch.dtype = torch.int32,
        combine_order: CombineOrder = "rank",
        counts: Counts = "uneven",
        timeout_s: float = 30.0,
        open_timeout_s: float = 300.0,
        max_ctas: int | None = None,
    ) -> None:
        check_kinds(config, group)
        self._settings = TransportSettings(
            config=config,
            group=group,
            max_tokens_per_rank=max_tokens_per_rank,
            combine_dtype=config.dtype if combine_dtype is None else combine_dtype,
            index_dtype=index_dtype,
            combine_order=combine_order,
            counts=counts,
            timeout_s=timeout_s,
            open_timeout_s=open_timeout_s,
            max_ctas=max_ctas,
            name="",
            generation=0,
            debug=env.read(env.DebugSettings).enabled,
        )
        check_settings(self._settings, transport)
        # After the checks: a call that is refused on one rank must not shift that rank's names against its peers'.
        self._base_name = group.unique_name("workspace")
        self._settings = dataclasses.replace(self._settings, name=self._base_name)
        self.number = take_number(group)
        """Its place in the order of opening, by which compiled code finds it; it stays through `reset()`."""
        self._requested = transport
        self.lifecycle = Lifecycle()
        self.attached: dict[str, Any] = {}
        """What the layers of this workspace share beside it, by name: the experts' scratch."""
        self._num_layers = 0
        self._step: Step | None = None
        self._num_step_writes: int | None = 0
        self.num_tokens_traced = 0
        self._step_index = 0
        self._promised_equal = False
        self._says_done = False
        self._stand_in: Transport | None = None
        self._open("open")

    def _open(self, phase: Phase) -> None:
        settings = self._settings
        start = time.monotonic()
        group = settings.group
        with plain_torch(group.device):
            self._step_tensors = StepTensors(group.rank, group.size, group.device)
            opened = open_together(self._requested, settings, self._step_tensors, phase)
        self._settings = settings = opened.settings
        self._lease, self.transport, self.decisions = Lease(opened.transport), opened.name, opened.decisions
        try:
            self.operators = _register(self)
            settings.group.waiting.join(settings.name, _position_of(self), settings.timeout_s)
        except BaseException:
            self._lease.end()
            raise
        self.opened_s = time.monotonic() - start  # compiling and loading kernels included, the wait for peers too
        _log.info("workspace %s: transport %s, opened in %.2f s", settings.name, self.transport, self.opened_s)
        for decision in self.decisions:
            _log.debug("workspace %s: %s", settings.name, decision)

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def config(self) -> MoEConfig:
        """The configuration it was opened with."""
        return self._settings.config

    @property
    def group(self) -> EPGroup:
        """The group that it serves now; `reset(group=...)` may have made it smaller."""
        return self._settings.group

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""
        return self._settings.group.device

    @property
    def max_tokens_per_rank(self) -> int:
        """C."""
        return self._settings.max_tokens_per_rank

    @property
    def combine_dtype(self) -> torch.dtype:
        """Of the partial rows on the wire."""
        return self._settings.combine_dtype

    @property
    def index_dtype(self) -> torch.dtype:
        """Of `Dispatched.topk_idx`."""
        return self._settings.index_dtype

    @property
    def timeout_s(self) -> float:
        """How long a peer may be late."""
        return self._settings.timeout_s

    @property
    def counts(self) -> Counts:
        """Whether ranks bring different numbers of rows."""
        return self._settings.counts

    @property
    def generation(self) -> int:
        """Number of resets."""
        return self._settings.generation

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds while the workspace is open; on `local` and `collective` the rows of a call are extra."""
        return self._transport.nbytes

    @staticmethod
    def required_bytes(
        config: MoEConfig,
        ep_size: int,
        max_tokens_per_rank: int,
        *,
        transport: str,
        combine_dtype: torch.dtype | None = None,
        index_dtype: torch.dtype = torch.int32,
    ) -> int:
        """What `nbytes` would be, without opening anything. `transport` is a name, not "auto"."""
        if not isinstance(transport, str) or transport not in selection.TRANSPORTS:
            raise ConfigError(f"transport must be one of {', '.join(selection.TRANSPORTS)}, got {transport!r}")
        if not isinstance(config, MoEConfig):
            raise ConfigError(f"config must be a MoEConfig, got {type(config).__name__}")
        check_positive_ints(ep_size=ep_size, max_tokens_per_rank=max_tokens_per_rank)
        check_dtypes(combine_dtype or config.dtype, index_dtype)
        return required_bytes(transport, config, ep_size, max_tokens_per_rank, combine_dtype or config.dtype, index_dtype)

    # --- step -------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> Step:
        """The step that was begun last; none after a reset, nor after `solo()`, whose own counts stand there now."""
        if self._step is None or self.lifecycle.stage is Stage.NO_STEP:
            raise StateError("no step has begun; call begin_step() once per model forward, first")
        return self._step

    def begin_step(self, num_tokens: int, num_real_tokens: int | torch.Tensor | None = None, *, done: bool = False) -> Step:
        """Publishes all ranks' counts, once per model forward. Every rank calls it, with 0 tokens too.

        Args:
            num_tokens: T, this rank's rows, padding included; 0 <= T <= C.
            num_real_tokens: rows that carry real tokens: an int <= T, or an int32[1] tensor on the workspace's device, read when
                the kernels run. The rows after them get id -1 everywhere. Default: T.
            done: this rank has no work of its own left. `Step.all_done()` tells when every rank says so.

        Raises:
            CapacityError: T > C, or num_real_tokens > T.
            StateError: a dispatch waits for its combine, or the workspace is closed; with TOKENFERRY_DEBUG=1 also if the last
                step's tensors were written.
            PeerTimeoutError, PeerFailedError: another rank is the cause.
        """
        if torch.compiler.is_compiling():
            self.num_tokens_traced = num_tokens
            self.operators.begin_step(num_tokens, num_real_tokens, done)
            return self._step_tensors.traced(num_tokens, num_real_tokens)
        lifecycle = self.lifecycle
        lifecycle.enter("begin_step")
        try:
            return self._begin_step(num_tokens, num_real_tokens, done)
        except BaseException as error:
            self.settle_failure("begin_step", error)
            raise
        finally:
            lifecycle.leave()

    def _begin_step(self, num_tokens: int, num_real_tokens: int | torch.Tensor | None, done: bool) -> Step:
        transport = self.active_transport
        transport.launched = False
        self.lifecycle.begin_step("begin_step")
        self._check_step_unwritten()
        real = self._check_counts(num_tokens, num_real_tokens)
        if not isinstance(done, bool):
            raise UsageError(f"done must be a bool, got {done!r}")
        request = StepRequest(self._step_index + 1, num_tokens, real, done or self._says_done, self._promised_equal)
        had_gradient = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # `torch.no_grad()` takes two microseconds
        self.lifecycle.stage = Stage.NO_STEP  # if the transport raises, the last step's counts may be half overwritten
        try:
            transport.begin_step(request, -1)
        finally:
            torch._C._set_grad_enabled(had_gradient)
        self._step_index = request.index
        self._step, self.num_tokens_traced = self._step_tensors.view(request), num_tokens
        self._num_step_writes = self._step_tensors.num_writes
        self.lifecycle.enter_ready()
        return self._step

    def forget_step_writes(self) -> None:
        """Compiled code counts as a write to the counts where it begins a step; debug mode does not look at such a step."""
        self._num_step_writes = None

    def _check_step_unwritten(self) -> None:
        step, before = self._step, self._num_step_writes  # read once: `check` may come while another thread begins a step
        if self._settings.debug and self.lifecycle.stage is Stage.READY and before is not None and step is not None:
            num_writes = self._step_tensors.num_writes - before
            if num_writes:
                raise StateError(f"the tensors of step {step.index} were written {num_writes} times; read or clone them only")

    def _check_counts(self, num_tokens: int, num_real_tokens: int | torch.Tensor | None) -> int | torch.Tensor:
        if not isinstance(num_tokens, int) or isinstance(num_tokens, bool):
            raise UsageError(f"num_tokens must be an int, got {num_tokens!r}")
        if num_tokens < 0:
            raise ShapeError(f"num_tokens must be an int >= 0, got {num_tokens}")
        if num_tokens > self.max_tokens_per_rank:
            raise CapacityError(
                f"num_tokens is {num_tokens} but the workspace was opened for {self.max_tokens_per_rank}; "
                f"open it with max_tokens_per_rank={num_tokens} or split the step"
            )
        if num_real_tokens is None:
            return num_tokens
        if isinstance(num_real_tokens, torch.Tensor):
            if num_real_tokens.dtype != torch.int32:
                raise DtypeError(f"num_real_tokens must be an int or torch.int32, got {num_real_tokens.dtype}")
            if num_real_tokens.numel() != 1:
                raise ShapeError(f"num_real_tokens must have one element, got {num_real_tokens.numel()}")
            if num_real_tokens.device != self.device:
                raise DeviceError(f"num_real_tokens is on {num_real_tokens.device} but the workspace is on {self.device}")
            return num_real_tokens
        if not isinstance(num_real_tokens, int) or isinstance(num_real_tokens, bool):
            raise UsageError(f"num_real_tokens must be an int or an int32 tensor, got {num_real_tokens!r}")
        if not 0 <= num_real_tokens <= num_tokens:
            raise CapacityError(f"num_real_tokens must lie between 0 and num_tokens, {num_tokens}; got {num_real_tokens!r}")
        return num_real_tokens

    def announce(self, num_tokens: int, *, done: bool = False) -> Announced | None:
        """Tells the host what all ranks will bring to the next step, so that they can agree on a graph. Every rank calls it.

        Returns:
            On the collective transport the counts: one exchange, which saves `begin_step` its own. None on the others, where
            each rank chooses alone; nothing is sent.

        Raises:
            As `begin_step`.
        """
        lifecycle = self.lifecycle
        lifecycle.enter("announce")
        try:
            transport = self.active_transport
            transport.launched = False
            lifecycle.begin_step("announce")
            self._check_counts(num_tokens, None)
            if not isinstance(transport, CollectiveTransport):
                return None
            return transport.announce(StepRequest(self._step_index + 1, num_tokens, num_tokens, done))
        except BaseException as error:
            self.settle_failure("announce", error)
            raise
        finally:
            lifecycle.leave()

    @contextlib.contextmanager
    def equal_counts(self) -> Iterator[None]:
        """Steps begun within it have the same num_tokens on every rank, which is not checked: the collective transport then
        exchanges no counts, so that a graph may capture the step. Other transports exchange them as ever."""
        before, self._promised_equal = self._promised_equal, True
        try:
            yield
        finally:
            self._promised_equal = before

    @contextlib.contextmanager
    def saying_done(self, done: bool) -> Iterator[None]:
        """Steps begun within it say `done`, if it is True: the last step of a forward carries the answer of the whole."""
        before, self._says_done = self._says_done, done
        try:
            yield
        finally:
            self._says_done = before

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Callable[[], int]]:
        """Within it, calls are recorded in a CUDA graph and nothing runs: steps begun inside are not counted, and whatever was
        under way when the block ends, by an exception too, is forgotten. The number of steps begun is in what it yields."""
        before, index = self._enter_other("capturing")
        num_steps = 0
        try:
            yield lambda: num_steps
        finally:
            num_steps = self._step_index - index
            self._step, self._step_index = before, index
            self._leave_other()

    @contextlib.contextmanager
    def replaying(self, num_steps: int = 1) -> Iterator[None]:
        """Around the launch of a graph that holds `num_steps` steps. Afterwards the workspace is without a step.

        Raises:
            As `begin_step`; call `check()` after your own synchronisation.
        """
        lifecycle = self.lifecycle
        lifecycle.enter("replaying")
        try:
            transport = self._transport
            transport.launched = False
            lifecycle.begin_step("replaying")
            if self._stand_in is not None:
                raise StateError("replaying: inside solo(), but a graph runs with the peers; leave it first")
            with transport.watching_replay() if isinstance(transport, CollectiveTransport) else contextlib.nullcontext():
                transport.launched = True
                yield
            self._step_index += num_steps
            lifecycle.leave_step()
        except BaseException as error:
            self.settle_failure("replaying", error)
            raise
        finally:
            lifecycle.leave()

    def dispatcher(self) -> Dispatcher:
        """A dispatcher for the next MoE layer. All ranks ask in the same order; the number names the layer in errors.

        Raises:
            StateError: the workspace is closed, or has given out 65535 dispatchers: make one a layer, once, not one a call.
        """
        self.lifecycle.require_open("dispatcher")
        if self._num_layers >= MAX_LAYERS:
            raise StateError(
                f"dispatcher: the workspace has given out {self._num_layers} dispatchers, and {MAX_LAYERS} is the most; make one "
                "for each layer of the model, once, and keep it"
            )
        layer, self._num_layers = self._num_layers, self._num_layers + 1
        return self.dispatcher_at(layer)

    def dispatcher_at(self, layer: int) -> Dispatcher:
        """The same as the dispatcher numbered `layer`: compiled code knows a layer by its number."""
        return Dispatcher(self, layer)

    # --- peers ------------------------------------------------------------------------------------------------------

    @property
    def _transport(self) -> Transport:
        return self._lease.held

    @_transport.setter
    def _transport(self, transport: Transport) -> None:
        self._lease.held = transport

    @property
    def active_transport(self) -> Transport:
        """What dispatchers use: the transport, or its stand-in under `solo()`."""
        return self._lease.held if self._stand_in is None else self._stand_in

    def check(self) -> None:
        """Raises what a peer, or this rank, has failed with. Call it after your own synchronisation, before trusting results.
        From any thread, also while another one is inside a call."""
        self.lifecycle.require_usable("check")
        with self._lease as transport:
            self._check_step_unwritten()
            try:
                transport.check()
            except PeerError as error:
                if transport is self._transport:  # another thread may have reset the workspace meanwhile
                    self.record_failure(error)
                raise

    def fail(self, reason: str) -> None:
        """Tells the peers that this rank gives up: they, and from now on this rank, raise `PeerFailedError(rank, reason)`.
        From any thread, also while another one is inside a call, which then raises it too."""
        self.lifecycle.require_at_home("fail")
        if self.lifecycle.closed or self.lifecycle.error is not None:
            return
        with self._lease as transport:
            try:
                transport.fail(reason)
            finally:
                self.record_failure(PeerFailedError(self.group.rank, reason, self._step_index))

    def tell_peers(self, error: BaseException) -> None:
        """`fail` for an exception that is on its way to the caller: never raises one of its own in its place. A peer's error is
        known to the peers, and the misuse by a second thread or a forked child is none of their business."""
        if isinstance(error, PeerError | WrongCallerError) or not self.lifecycle.is_at_home:
            return
        with logged("the peers could not be told why this rank gives up"):
            self.fail(f"{type(error).__name__}: {error}")

    def record_failure(self, error: PeerError) -> None:
        """Breaks the workspace: every later call raises `error`, until a reset."""
        self.lifecycle.fail(error)

    def settle_failure(self, operation: str, error: BaseException) -> None:
        """Called as `error` leaves `operation`. Where nothing was launched, the workspace stands where it stood (after
        `begin_step` without a step). Else it is broken, and the peers, who wait for what will not come, are told."""
        self.lifecycle.settle(
            operation, error, self._lease, lambda: self.active_transport.launched and not _is_capturing(self.device)
        )

    def reset(self, group: EPGroup | None = None, timeout_s: float | None = None) -> None:
        """Starts anew after a failure, collectively over the ranks that go on: new communicator, new buffers, no step.

        Args:
            group: the ranks that go on, e.g. `ws.group.subset([0, 2])`. Default: the same group.
            timeout_s: how long to wait for them. Default: `open_timeout_s`.

        Graphs captured before a reset must not be replayed. Dispatchers stay valid.

        Raises:
            ConfigError, DeviceError: an argument is wrong; nothing has changed.
            PeerTimeoutError: a rank did not come; phase "reset". Call it again with the ranks that are left.
        """
        lifecycle = self.lifecycle
        lifecycle.enter("reset")
        try:
            lifecycle.require_open("reset")
            if self._stand_in is not None:
                raise StateError("reset: inside solo(); leave it first")
            check_reset(self.group, group, timeout_s)
            self._reset(group, timeout_s)
            lifecycle.require_open("reset")
        finally:
            lifecycle.leave()

    def _reset(self, group: EPGroup | None, timeout_s: float | None) -> None:
        old, generation = self._settings, self._settings.generation + 1
        old.group.waiting.leave(old.name)
        # Counted up before the ranks meet: a rank that comes too late finds a generation that the others have left.
        self._settings = dataclasses.replace(
            old,
            group=group if group is not None else old.group,
            generation=generation,
            name=f"{self._base_name}/{generation}",
            open_timeout_s=timeout_s if timeout_s is not None else old.open_timeout_s,
        )
        settings = self._settings
        self._step, self._step_index = None, 0
        self.lifecycle.restart()
        try:
            self.operators.release()
            self._lease.end()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            settings.group.channel.barrier(f"{settings.name}/reset", settings.open_timeout_s, phase="reset")
            self._open("reset")
        except BaseException as error:  # whatever it is: the old transport is closed, and there is no new one
            if not isinstance(error, PeerError):
                with logged("the other ranks could not be told that reset failed"):
                    settings.group.channel.give_up(f"{settings.name}/reset", f"{type(error).__name__}: {error}")
            self.lifecycle.error = None
            self.lifecycle.break_off("reset", error)
            raise
        finally:
            self._settings = dataclasses.replace(self._settings, open_timeout_s=old.open_timeout_s)

    @contextlib.contextmanager
    def solo(self) -> Iterator[None]:
        """Within it, steps involve this rank alone: the same calls and shapes without communication, for warm-up and capture.

        Counts outside are not disturbed: a step begun inside is over when the block ends.
        """
        before, index = self._enter_other("solo")
        self._stand_in = self._transport.solo()
        try:
            yield
        finally:
            self._stand_in, self._step, self._step_index = None, before, index
            self._leave_other()

    def _enter_other(self, what: str) -> tuple[Step | None, int]:
        self.lifecycle.enter(what)  # another thread's call would find another step under it
        try:
            self.lifecycle.begin_step(what)
            if self._stand_in is not None:
                raise StateError(f"{what}: already inside solo()")
            return self._step, self._step_index
        finally:
            self.lifecycle.leave()

    def _leave_other(self) -> None:
        self.lifecycle.leave_step()

    def close(self) -> None:
        """Releases everything. Never waits for a peer; calling it again does nothing, nor does it in a forked child.

        From any thread. A call that another thread is inside of ends, by StateError where it waited for a peer, and what it
        uses is released as it ends; the peers get PeerFailedError then.
        """
        self.lifecycle.close(self._lease, self._give_back)

    def _give_back(self) -> None:
        self.group.waiting.leave(self._settings.name)
        try:
            self.operators.release()
        finally:
            self.attached.clear()
            self._lease.end()

    def __enter__(self) -> Workspace:
        self.lifecycle.require_open("with")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            self.tell_peers(error)
        finally:
            with logged("the workspace could not be closed"):
                self.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        refuse_pickling(self, "it stands on memory and connections of this process: open one in the process of each rank")

    def __repr__(self) -> str:
        return f"Workspace(transport={self.transport!r}, {self.group!r}, max_tokens_per_rank={self.max_tokens_per_rank})"


def _is_capturing(device: torch.device) -> bool:
    with contextlib.suppress(RuntimeError):  # of a device whose last kernel failed: that one was no captured one
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return False


def _position_of(workspace: Workspace) -> Callable[[], Position | None]:
    """Tells where the workspace stands, without keeping it alive."""
    reference = weakref.ref(workspace)

    def look() -> Position | None:
        workspace = reference()
        if workspace is None or workspace.lifecycle.closed:
            return None
        lifecycle = workspace.lifecycle
        return Position(workspace._step_index, lifecycle.layer, lifecycle.stage.value, lifecycle.is_occupied)

    return look


def _register(workspace: Workspace) -> Operators:
    """The operators of what is open now. Symmetric transports have their rows at fixed addresses."""
    settings, transport = workspace._settings, workspace._transport
    per_token = {"local": 1, "collective": settings.group.size if settings.counts == "equal" else None}
    operators = Operators(
        workspace.number,
        dtype=settings.config.dtype,
        index_dtype=settings.index_dtype,
        rows_per_token=per_token.get(workspace.transport),
        counts=workspace._step_tensors.packed,
        fixed=transport.fixed_rows,
    )
    operators.serve(workspace)
    return operators
