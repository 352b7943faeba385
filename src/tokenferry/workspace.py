"""A workspace: one group, one transport, the buffers and counts of one shape of MoE layer."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import NoReturn, SupportsIndex

import torch

from tokenferry import env
from tokenferry.ambient import plain_torch
from tokenferry.capture import GraphCalls
from tokenferry.config import MoEConfig
from tokenferry.dispatched import RowFormat
from tokenferry.dispatcher import Dispatcher
from tokenferry.errors import ConfigError, PeerError, Phase, StateError, UsageError, refuse_pickling
from tokenferry.groups import EPGroup
from tokenferry.kernels.control_block import MAX_LAYERS
from tokenferry.lifecycle import Lease, Lifecycle, Stage, logged
from tokenferry.operators import Operators, take_number
from tokenferry.peers import COUNTED_IN, position_of
from tokenferry.step import Step, StepRequest, StepTensors, check_promise, checked_counts
from tokenferry.telemetry.control import Telemetry
from tokenferry.transports import selection
from tokenferry.transports.base import CombineOrder, Counts, TransportFactory, TransportSettings
from tokenferry.transports.counting import new_recorder, wants_telemetry
from tokenferry.transports.opening import open_together, required_bytes
from tokenferry.transports.settings import check_dtypes, check_kinds, check_positive_ints, check_reset, check_settings

_log = logging.getLogger(__name__)


class Workspace(GraphCalls):
    """Moves rows for all MoE layers of one shape. Opened by all ranks of the group together; a context manager.

    It holds a transport, the step's counts, and the order of calls (`lifecycle`). A model begins a step and calls one dispatcher
    a layer; the calls that graphs need come from `GraphCalls`, those for checks, failures and closing from `PeerCalls`.

    Args:
        config: shape of the layer.
        group: the expert-parallel group.
        max_tokens_per_rank: C, the most rows a rank may bring to a step, padding included.
        transport: "auto", one of `transports.selection.TRANSPORTS`, or an object that opens a transport of your own, of the same
            name on every rank: see `transports.base.TransportFactory`.
        dispatch_format: what rows are on their way to the experts: "same", "fp8_block128", "bytes", or a `RowFormat`.
        combine_dtype: of the partial rows on the wire. Default: `config.dtype`. float8_e4m3fn: quantized by the sending kernel or
            by the experts, with a scale for every 128 columns.
        index_dtype: of `Dispatched.topk_idx`: int32, or int64 for expert kernels that want it; written so, without a pass.
        combine_order: "rank": terms are summed in rank order, the same bits on every transport. "any": the library's or the
            hardware's own order where that is faster, outside every promise of equal bits.
        counts: "uneven": ranks bring different numbers of rows. "equal": all ranks promise the same number in every step, and
            the collective transport exchanges no counts. Symmetric transports exchange them either way.
        timeout_s: how long a peer may be late before it is given up; on symmetric transports 1800 at most.
        open_timeout_s: the same while opening, when ranks still load models and compile.
        max_ctas: bound on the thread blocks of a kernel, for workspaces that share a GPU; None: chosen from shape and group.
        result_dtype: of combined rows. Default: `config.dtype`; float32 leaves the sums as they are, for a caller who adds to
            them before they are rounded.
        telemetry: whether waits, rows and loads are counted: see `telemetry`. None: as TOKENFERRY_TELEMETRY says.
            Without it the kernels have none of it compiled in.

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
        dispatch_format: str | RowFormat = "same",
        combine_dtype: torch.dtype | None = None,
        index_dtype: torch.dtype = torch.int32,
        combine_order: CombineOrder = "rank",
        counts: Counts = "uneven",
        timeout_s: float = 30.0,
        open_timeout_s: float = 300.0,
        max_ctas: int | None = None,
        result_dtype: torch.dtype | None = None,
        telemetry: bool | None = None,
    ) -> None:
        check_kinds(config, group)
        self._with_telemetry = wants_telemetry(telemetry)
        super().__init__()
        self._settings = TransportSettings(
            config=config,
            group=group,
            max_tokens_per_rank=max_tokens_per_rank,
            combine_dtype=config.dtype if combine_dtype is None else combine_dtype,
            index_dtype=index_dtype,
            result_dtype=config.dtype if result_dtype is None else result_dtype,
            dispatch_format=RowFormat.of(dispatch_format),
            combine_order=combine_order,
            counts=counts,
            timeout_s=timeout_s,
            open_timeout_s=open_timeout_s,
            longest_wait_s=open_timeout_s,
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
        self.telemetry = Telemetry()
        """What it counts: `snapshot()`, `trace(path)` and more, if it was opened so."""
        self.lifecycle = Lifecycle()
        self.attached = {}
        self._num_layers = 0
        self._step, self._step_index, self._num_step_writes = None, 0, 0
        self.num_tokens_traced = 0
        self.max_expert_rows_traced: int | None = None
        self._stand_in = None
        self._open("open")

    def _open(self, phase: Phase) -> None:
        settings = self._settings
        start = time.monotonic()
        group = settings.group
        if self._with_telemetry:
            settings = dataclasses.replace(settings, recorder=new_recorder(settings))
        with plain_torch(group.device):
            self._step_tensors = StepTensors(group.rank, group.size, group.device)
            opened = open_together(self._requested, settings, self._step_tensors, phase)
        with self._telling:
            settings, timeout_s = opened.settings, self._settings.timeout_s
            self._settings, self._lease = settings, Lease(opened.transport)
        self.transport, self.decisions = opened.name, opened.decisions
        self.telemetry.follow(settings.recorder, group)
        try:
            with plain_torch(group.device):
                self.operators = Operators(self.number, settings, self._transport, self._step_tensors.packed)
            self.operators.serve(self)
            if timeout_s != settings.timeout_s:  # another thread has set it meanwhile
                with logged("the time-out that was set while the workspace opened does not hold"):
                    self.set_timeout(timeout_s)
            settings.group.waiting.join(settings.name, position_of(self), settings.timeout_s)
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
    def dispatch_format(self) -> RowFormat:
        """Of rows on their way to the experts."""
        return self._settings.dispatch_format

    @property
    def combine_dtype(self) -> torch.dtype:
        """Of the partial rows on the wire."""
        return self._settings.combine_dtype

    @property
    def combine_order(self) -> CombineOrder:
        """In which order terms are summed."""
        return self._settings.combine_order

    @property
    def result_dtype(self) -> torch.dtype:
        """Of combined rows."""
        return self._settings.result_dtype

    @property
    def index_dtype(self) -> torch.dtype:
        """Of `Dispatched.topk_idx`."""
        return self._settings.index_dtype

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
        """Bytes that this rank holds while the workspace is open, those of `count_in` included; on `local` and `collective` the
        rows of a call are extra."""
        counted: list[torch.Tensor] = self.attached.get(COUNTED_IN, [])
        return self._transport.nbytes + sum(buffer.nbytes for buffer in counted)

    @staticmethod
    def required_bytes(
        config: MoEConfig,
        ep_size: int,
        max_tokens_per_rank: int,
        *,
        transport: str,
        dispatch_format: str | RowFormat = "same",
        combine_dtype: torch.dtype | None = None,
        index_dtype: torch.dtype = torch.int32,
    ) -> int:
        """What `nbytes` would be, without opening anything, and without what is counted in. `transport` is a name, not "auto"."""
        if not isinstance(transport, str) or transport not in selection.TRANSPORTS:
            raise ConfigError(f"transport must be one of {', '.join(selection.TRANSPORTS)}, got {transport!r}")
        if not isinstance(config, MoEConfig):
            raise ConfigError(f"config must be a MoEConfig, got {type(config).__name__}")
        check_positive_ints(ep_size=ep_size, max_tokens_per_rank=max_tokens_per_rank)
        combine_dtype, row_format = combine_dtype or config.dtype, RowFormat.of(dispatch_format)
        check_dtypes(combine_dtype, index_dtype, config)
        row_format.check(config)
        return required_bytes(transport, config, ep_size, max_tokens_per_rank, combine_dtype, index_dtype, row_format)

    # --- step -------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> Step:
        """The step that was begun last; none after a reset, nor after `solo()`, whose own counts stand there now."""
        if self._step is None or self.lifecycle.stage is Stage.NO_STEP:
            raise StateError("no step has begun; call begin_step() once per model forward, first")
        return self._step

    def begin_step(
        self, num_tokens: int, num_real_tokens: int | torch.Tensor | None = None, *, done: bool = False,
        max_tokens: int | None = None,
    ) -> Step:  # fmt: skip
        """Publishes all ranks' counts, once per model forward. Every rank calls it, with 0 tokens too.

        Args:
            num_tokens: T, this rank's rows, padding included; 0 <= T <= C.
            num_real_tokens: rows that carry real tokens: an int <= T, or an int32[1] tensor on the workspace's device, read when
                the kernels run. The rows after them get id -1 everywhere. Default: T.
            done: this rank has no work of its own left. `Step.all_done()` tells when every rank says so.
            max_tokens: a promise of this host: no rank brings more tokens to this step, padding included; T <= max_tokens <= C.
                An engine that knows the step's largest batch gives it, and our experts make no launches for rows that cannot
                come. Ranks need not give the same, or any. A captured step's promise is one for all replays. Where it is broken,
                results are right and slower; with TOKENFERRY_DEBUG=1 the next `begin_step` or `check` raises UsageError.

        Raises:
            CapacityError: T > C, num_real_tokens > T, or max_tokens outside of T to C.
            StateError: a dispatch waits for its combine, or the workspace is closed; with TOKENFERRY_DEBUG=1 also if the last
                step's tensors were written.
            PeerTimeoutError, PeerFailedError: another rank is the cause.
        """
        if torch.compiler.is_compiling():
            self.operators.begin_step(num_tokens, num_real_tokens, done, max_tokens)
            traced = self._step_tensors.traced(num_tokens, num_real_tokens, max_tokens)
            self.num_tokens_traced, self.max_expert_rows_traced = num_tokens, traced.max_expert_rows
            return traced
        lifecycle = self.lifecycle
        lifecycle.enter("begin_step")
        try:
            return self._begin_step(num_tokens, num_real_tokens, done, max_tokens)
        except BaseException as error:
            self.settle_failure("begin_step", error)
            raise
        finally:
            lifecycle.leave()

    def _begin_step(
        self, num_tokens: int, num_real_tokens: int | torch.Tensor | None, done: bool, max_tokens: int | None
    ) -> Step:
        transport, settings, lifecycle = self.active_transport, self._settings, self.lifecycle
        transport.launched = False
        lifecycle.begin_step("begin_step")
        if settings.debug:
            self._check_step_unwritten()
        real = checked_counts(num_tokens, num_real_tokens, settings.max_tokens_per_rank, settings.group.device)
        if not isinstance(done, bool):
            raise UsageError(f"done must be a bool, got {done!r}")
        check_promise(max_tokens, num_tokens, settings.max_tokens_per_rank)
        request = StepRequest(self._step_index + 1, num_tokens, real, done or self._says_done, self._promised_equal, max_tokens)
        had_gradient = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # `torch.no_grad()` takes two microseconds
        lifecycle.stage = Stage.NO_STEP  # if the transport raises, the last step's counts may be half overwritten
        try:
            transport.begin_step(request, -1)
        finally:
            torch._C._set_grad_enabled(had_gradient)
        self._step_index = request.index
        self._step = step = self._step_tensors.view(request)
        self.num_tokens_traced, self.max_expert_rows_traced = num_tokens, step.max_expert_rows
        self._num_step_writes = self._step_tensors.num_writes
        lifecycle.enter_ready()
        return step

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

    # --- starting anew ----------------------------------------------------------------------------------------------

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
        with self._telling:
            self._settings = settings = dataclasses.replace(
                self._settings,
                group=group if group is not None else old.group,
                generation=generation,
                name=f"{self._base_name}/{generation}",
                open_timeout_s=timeout_s if timeout_s is not None else old.open_timeout_s,
            )
        self._step, self._step_index = None, 0
        self.lifecycle.restart()
        self.attached.pop(COUNTED_IN, None)
        try:
            self.operators.release()
            with self._telling:
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
            with self._telling:
                self._settings = dataclasses.replace(self._settings, open_timeout_s=old.open_timeout_s)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        refuse_pickling(self, "it stands on memory and connections of this process: open one in the process of each rank")

    def __repr__(self) -> str:
        return f"Workspace(transport={self.transport!r}, {self.group!r}, max_tokens_per_rank={self.max_tokens_per_rank})"
