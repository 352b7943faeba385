"""One MoE layer's view of a workspace: checks arguments, keeps the order, and hands rows to the transport."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol, SupportsIndex

import torch

from tokenferry.config import MoEConfig
from tokenferry.dispatched import Dispatched, HiddenRows, PartialRows, QuantizedRows, RowFormat
from tokenferry.errors import CapacityError, DtypeError, LayoutError, ShapeError, StateError, UsageError, refuse_pickling
from tokenferry.lifecycle import Lifecycle, Stage
from tokenferry.operators import Operators
from tokenferry.step import Step
from tokenferry.tensor_checks import (
    check_partial,
    check_quantized,
    check_tensor,
    fitting_partial,
    fitting_quantized,
    fitting_rows,
    ids_out_of_range,
    made_contiguous,
    overlap,
)
from tokenferry.transports.base import Gathered, Transport

INDEX_DTYPES = (torch.int32, torch.int64)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class WorkspaceView(Protocol):
    """What a dispatcher sees of its workspace."""

    lifecycle: Lifecycle
    operators: Operators
    num_tokens_traced: int
    max_expert_rows_traced: int | None

    @property
    def config(self) -> MoEConfig: ...
    @property
    def dispatch_format(self) -> RowFormat: ...
    @property
    def combine_dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def result_dtype(self) -> torch.dtype: ...
    @property
    def step(self) -> Step: ...
    @property
    def active_transport(self) -> Transport: ...
    def settle_failure(self, operation: str, error: BaseException) -> None: ...


class Dispatcher:
    """Dispatch and combine for one MoE layer. Cheap: it holds no buffers. Get it from `Workspace.dispatcher()`.

    Every rank calls the same layers in the same order, with zero rows too. Inference only: results carry no gradient.
    """

    def __init__(self, workspace: WorkspaceView, layer: int) -> None:
        self._workspace, self.layer = workspace, layer
        self._num_supplied = 0
        self._sent: PartialRows | None = None
        config, row_format = workspace.config, workspace.dispatch_format
        self._columns, self._hidden_dtypes = row_format.columns(config), (row_format.dtype(config),)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        refuse_pickling(self, "it belongs to its workspace: ask that for another with dispatcher()")

    def dispatch(self, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Dispatched:
        """Sends this rank's rows to every rank and returns everybody's.

        Args:
            hidden: [T', H] in the configuration's dtype, contiguous. T' <= T of the step: rows [T', T) travel as zeros with
                id -1. With dispatch_format "fp8_block128" the rows are quantized on their way, or come as `QuantizedRows` of
                [T', H]; with "bytes" they are [T', row_bytes] uint8.
            topk_idx: [T', K] int32 or int64 global expert numbers, -1 = no expert, contiguous. On CUDA nobody looks at the
                values, but in debug mode: one beyond the experts is nobody's, and arrives as -1 if no int32 holds it.
            topk_weights: [T', K] float32, bfloat16 or float16. Copied first where it is not contiguous.

        Returns:
            See `Dispatched` for how long its tensors are valid. On `local` some of them are the arguments themselves: who writes
            to them writes to the arguments. With TOKENFERRY_DEBUG=1 they are copies.

        Raises:
            ShapeError, DtypeError, DeviceError, LayoutError, CapacityError, UsageError: before anything is launched.
            StateError: no step, a dispatch whose combine has not come, or a closed workspace.
            PeerTimeoutError, PeerFailedError: another rank is the cause.
        """
        if torch.compiler.is_compiling():
            self._num_supplied = hidden.shape[0]
            traced = self._workspace
            step = traced.num_tokens_traced, traced.max_expert_rows_traced
            return traced.operators.dispatch(self.layer, hidden, topk_idx, topk_weights, *step)
        workspace, layer = self._workspace, self.layer
        lifecycle = workspace.lifecycle
        if lifecycle.try_enter():
            had_gradient = torch.is_grad_enabled()
            if had_gradient:
                torch._C._set_grad_enabled(False)
            transport = workspace.active_transport
            transport.launched = False
            try:
                if lifecycle.allows(Stage.READY) and self._rows_fit(hidden, topk_idx, topk_weights):
                    self._num_supplied = hidden.shape[0]
                    gathered = transport.dispatch(layer, hidden, topk_idx, topk_weights)
                    lifecycle.advance("dispatch_begin", layer)
                    lifecycle.advance("dispatch_end", layer)
                    return self._dispatched(gathered)
            except BaseException as error:
                workspace.settle_failure("dispatch", error)
                raise
            finally:
                if had_gradient:
                    torch._C._set_grad_enabled(True)
                lifecycle.leave()
        weights = made_contiguous(topk_weights)
        if weights is not topk_weights:
            return self.dispatch(hidden, topk_idx, weights)
        self._begin_dispatch("dispatch", hidden, topk_idx, topk_weights)  # the long way: it says what is wrong
        return self.dispatch_end()

    def dispatch_begin(self, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """The sending half of `dispatch`: returns at once, so that other work can overlap.

        The three tensors belong to the call until `dispatch_end` has returned, on every transport: leave them as they are. They
        are kept alive, and may be dropped. With TOKENFERRY_DEBUG=1 a change is a StateError there, on CUDA in the next
        `begin_step` or `check`.
        """
        self._begin_dispatch("dispatch_begin", hidden, topk_idx, made_contiguous(topk_weights))

    def _begin_dispatch(self, called: str, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """`called`: what the caller called, for messages."""
        workspace = self._workspace
        with _Guarded(workspace, called):
            workspace.lifecycle.require("dispatch_begin", self.layer, called)
            self._check_rows(hidden, topk_idx, topk_weights)
            self._num_supplied = hidden.shape[0]
            workspace.active_transport.dispatch_begin(self.layer, hidden, topk_idx, topk_weights)
            workspace.lifecycle.advance("dispatch_begin", self.layer)

    def dispatch_end(self) -> Dispatched:
        """The receiving half of `dispatch`."""
        workspace = self._workspace
        with _Guarded(workspace, "dispatch_end"):
            workspace.lifecycle.require("dispatch_end", self.layer)
            gathered = workspace.active_transport.dispatch_end()
            workspace.lifecycle.advance("dispatch_end", self.layer)
        return self._dispatched(gathered)

    def _dispatched(self, gathered: Gathered) -> Dispatched:
        workspace = self._workspace
        workspace.lifecycle.gathered_rows = gathered.hidden_RH.shape[0]
        dispatched = object.__new__(Dispatched)  # as its constructor does, which takes two microseconds for a frozen class
        dispatched.__dict__.update(
            hidden=gathered.hidden_RH,
            topk_idx=gathered.topk_idx_RK,
            topk_weights=gathered.topk_weights_RK,
            valid_tokens=workspace.step.valid_tokens,
            max_expert_rows=workspace.step.max_expert_rows,
            handle=workspace.lifecycle.handle,
            loads=gathered.loads,
        )
        return dispatched

    def combine_input(self) -> Any:
        """[R, H] in `combine_dtype`, a tensor, or `QuantizedRows` if that is float8: experts that write their partial rows here
        save a copy, also where they write only its first rows and give those to `combine`. Valid until `combine_begin`."""
        self._workspace.lifecycle.require("combine_input", self.layer)
        return self._workspace.active_transport.combine_input()

    def combine(
        self, partial: PartialRows, dispatched: Dispatched | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sums every rank's partial rows at the rank that owns the token.

        Args:
            partial: [V to R, H] bfloat16, float16 or float32, contiguous: for each gathered row the weighted sum over this rank's
                experts. Rows >= V are not read, and need not be there. May be `combine_input()`, or its first rows. With
                combine_dtype float8_e4m3fn it is quantized on its way, or comes as `QuantizedRows` of [V to R, H].
            dispatched: the dispatch that this answers, to have the pairing checked.
            out: [T', H] in `result_dtype`, contiguous, gets the result. It must overlap neither `partial` nor what belongs to the
                workspace: the gathered rows, and `combine_input()`, from which peers may still fetch.

        Returns:
            [T', H] in the workspace's `result_dtype`, the configuration's unless asked for: `out`, or the caller's own.

        Raises:
            As `dispatch`; StateError also if `dispatched` is another dispatch's, or was combined already. Fewer rows than V are
            a ShapeError where the host knows V. Else the device finds them and sends nothing: `check()` and later calls raise
            PeerFailedError for this rank, on every rank.
        """
        if torch.compiler.is_compiling():
            combined = self._workspace.operators.combine(self.layer, partial, self._num_supplied)
            if out is None:
                return combined
            if out.shape != combined.shape:  # a copy would repeat a single row
                raise ShapeError(f"out has shape {list(out.shape)} but the result has {list(combined.shape)}; they must be equal")
            if out.dtype != combined.dtype:
                raise DtypeError(f"out must be {combined.dtype}, got {out.dtype}; convert it with .to()")
            return out.copy_(combined)
        workspace, layer = self._workspace, self.layer
        lifecycle = workspace.lifecycle
        if lifecycle.try_enter():
            had_gradient = torch.is_grad_enabled()
            if had_gradient:
                torch._C._set_grad_enabled(False)
            transport = workspace.active_transport
            transport.launched = False
            try:
                if lifecycle.allows(Stage.DISPATCHED) and lifecycle.layer == layer and self._partial_fits(partial, dispatched):
                    if out is None:
                        combined = transport.combine(partial)
                    else:
                        combined = transport.combine(partial, self._checked_out(out, partial))
                    lifecycle.advance("combine_begin", layer)
                    lifecycle.advance("combine_end", layer)
                    return combined
            except BaseException as error:
                workspace.settle_failure("combine", error)
                raise
            finally:
                if had_gradient:
                    torch._C._set_grad_enabled(True)
                lifecycle.leave()
        self._begin_combine("combine", partial, dispatched, out)  # the long way: it says what is wrong
        return self.combine_end(out)

    def combine_begin(self, partial: PartialRows, dispatched: Dispatched | None = None) -> None:
        """The sending half of `combine`: returns at once.

        `partial` belongs to the call until `combine_end` has returned, on every transport: leave it as it is. It is kept alive,
        and may be dropped. With TOKENFERRY_DEBUG=1 a change is a StateError there, on CUDA in the next `begin_step` or `check`.
        """
        self._begin_combine("combine_begin", partial, dispatched)

    def _begin_combine(
        self, called: str, partial: PartialRows, dispatched: Dispatched | None, out: torch.Tensor | None = None
    ) -> None:
        """`called`: what the caller called, for messages. `out` is looked at here, before anything has left."""
        workspace = self._workspace
        with _Guarded(workspace, called):
            self._check_pairing(called, dispatched)
            workspace.lifecycle.require("combine_begin", self.layer, called)
            self._check_partial(partial)
            if out is not None:
                self._checked_out(out, partial)
            workspace.active_transport.combine_begin(partial)
            self._sent = partial
            workspace.lifecycle.advance("combine_begin", self.layer)

    def combine_end(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The receiving half of `combine`, which has `out`."""
        workspace = self._workspace
        with _Guarded(workspace, "combine_end"):
            workspace.lifecycle.require("combine_end", self.layer)
            transport = workspace.active_transport
            combined = transport.combine_end() if out is None else transport.combine_end(self._checked_out(out, self._sent))
            self._sent = None
            workspace.lifecycle.advance("combine_end", self.layer)
        return combined

    def _rows_fit(self, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> bool:
        """What `_check_rows` checks, in one go and without a word."""
        workspace = self._workspace
        config, device = workspace.config, workspace.device
        num_rows = self._fitting_hidden(hidden, device)
        return (
            0 <= num_rows <= workspace.step.num_tokens
            and fitting_rows(topk_idx, config.topk, INDEX_DTYPES, device) == num_rows
            and fitting_rows(topk_weights, config.topk, WEIGHT_DTYPES, device) == num_rows
            and (device.type != "cpu" or not num_rows or ids_out_of_range(topk_idx, config.num_experts) is None)
        )

    def _fitting_hidden(self, hidden: HiddenRows, device: torch.device) -> int:
        if type(hidden) is not QuantizedRows:
            return fitting_rows(hidden, self._columns, self._hidden_dtypes, device)  # type: ignore[arg-type]
        return fitting_quantized(hidden, self._columns, device) if self._workspace.dispatch_format.is_quantized else -1

    def _partial_fits(self, partial: PartialRows, dispatched: Dispatched | None) -> bool:
        """What `_check_pairing` and `_check_partial` check, in one go and without a word."""
        workspace = self._workspace
        if dispatched is not None and not (type(dispatched) is Dispatched and dispatched.handle is workspace.lifecycle.handle):
            return False
        num_rows = fitting_partial(partial, workspace.config.hidden_size, workspace.combine_dtype, workspace.device)
        return num_rows == workspace.lifecycle.gathered_rows or self._may_be_all(num_rows)

    def _may_be_all(self, num_rows: int) -> bool:
        """Whether so many partial rows, fewer than R, may be V or more, for all that the host knows."""
        workspace = self._workspace
        if workspace.active_transport.fixed_rows is None:  # R is V itself
            return False
        return workspace.step.num_tokens <= num_rows < workspace.lifecycle.gathered_rows

    def _check_rows(self, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        config, step, device = self._workspace.config, self._workspace.step, self._workspace.device
        self._check_hidden(hidden)
        check_tensor("topk_idx", topk_idx, config.topk, INDEX_DTYPES, device)
        check_tensor("topk_weights", topk_weights, config.topk, WEIGHT_DTYPES, device)
        num_rows = hidden.shape[0]
        for name, tensor in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
            if tensor.shape[0] != num_rows:
                raise ShapeError(f"{name} has {tensor.shape[0]} rows but hidden has {num_rows}; they must be equal")
        if num_rows > step.num_tokens:
            raise CapacityError(
                f"hidden has {num_rows} rows but begin_step announced {step.num_tokens}; begin a step with at least {num_rows}"
            )
        if topk_idx.device.type == "cpu" and topk_idx.numel():  # on CUDA a look at the values would wait for the device
            wrong = ids_out_of_range(topk_idx, config.num_experts)
            if wrong is not None:
                raise UsageError(
                    f"topk_idx holds {wrong}, but expert numbers are -1 (none) "
                    f"to {config.num_experts - 1} (num_experts is {config.num_experts})"
                )

    def _check_hidden(self, hidden: HiddenRows) -> None:
        row_format, device = self._workspace.dispatch_format, self._workspace.device
        if not isinstance(hidden, QuantizedRows):
            check_tensor("hidden", hidden, self._columns, self._hidden_dtypes, device)
            return
        if not row_format.is_quantized:
            raise UsageError(
                f"hidden is QuantizedRows but the workspace was opened with dispatch_format={row_format.name!r}; open it with "
                "'fp8_block128', or give hidden.dequantize()"
            )
        check_quantized("hidden", hidden, self._columns, device)

    def _check_pairing(self, called: str, dispatched: Dispatched | None) -> None:
        if dispatched is None:
            return
        if not isinstance(dispatched, Dispatched):
            raise UsageError(f"dispatched must be what dispatch returned, or None; got {type(dispatched).__name__}")
        lifecycle = self._workspace.lifecycle
        if dispatched.handle is not lifecycle.handle and dispatched.handle is not self._workspace.operators.handle:
            lifecycle.require_usable(called)
            raise StateError(
                f"{called}: `dispatched` was combined already, or belongs to another dispatch or workspace; "
                "pass what this layer's last dispatch returned"
            )

    def _check_partial(self, partial: PartialRows) -> None:
        workspace = self._workspace
        check_partial(partial, workspace.config.hidden_size, workspace.combine_dtype, workspace.device)
        num_rows, gathered_rows = partial.shape[0], workspace.lifecycle.gathered_rows
        if num_rows == gathered_rows or self._may_be_all(num_rows):
            return
        raise ShapeError(
            f"partial has {num_rows} rows but dispatch returned {gathered_rows}; give one partial row for each gathered row, or "
            f"for each token of all ranks at least, of which this one brings {self._workspace.step.num_tokens}"
        )

    def _checked_out(self, out: torch.Tensor, partial: PartialRows | None) -> torch.Tensor:
        workspace = self._workspace
        check_tensor("out", out, workspace.config.hidden_size, (workspace.result_dtype,), workspace.device)
        if out.shape[0] != self._num_supplied:
            raise ShapeError(f"out has {out.shape[0]} rows but hidden had {self._num_supplied}; they must be equal")
        fixed, memory = workspace.active_transport.fixed_rows, workspace.active_transport.memory
        for name, read in (
            ("partial", partial),
            ("the gathered rows", fixed.hidden_RH if fixed else None),
            ("the workspace's buffer, combine_input() say,", memory.buffer if memory else None),
        ):
            if read is not None and overlap(out, read):
                raise LayoutError(f"out overlaps {name}, which are read while it is written; give memory of its own")
        return out


class _Guarded:
    """One thread and no gradient inside; the workspace settles what an exception leaves behind (`settle_failure`).

    By hand, since `torch.no_grad()` alone takes two microseconds, four times a round trip.
    """

    __slots__ = ("_had_gradient", "_lifecycle", "_operation", "_workspace")

    def __init__(self, workspace: WorkspaceView, operation: str) -> None:
        self._workspace, self._lifecycle, self._operation = workspace, workspace.lifecycle, operation

    def __enter__(self) -> None:
        self._lifecycle.enter(self._operation)
        self._workspace.active_transport.launched = False
        self._had_gradient = torch.is_grad_enabled()
        if self._had_gradient:
            torch._C._set_grad_enabled(False)

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if self._had_gradient:
            torch._C._set_grad_enabled(True)
        try:
            if error is not None:
                self._workspace.settle_failure(self._operation, error)
        finally:
            self._lifecycle.leave()
