"""One MoE layer's view of a workspace: checks arguments, keeps the order, and hands rows to the transport."""

from __future__ import annotations

from typing import NoReturn, Protocol, SupportsIndex

import torch

from tokenferry.config import HIDDEN_DTYPES, MoEConfig
from tokenferry.dispatched import FLOAT8, Dispatched, HiddenRows, QuantizedRows, RowFormat, num_scales
from tokenferry.errors import (
    CapacityError,
    DeviceError,
    DtypeError,
    LayoutError,
    ShapeError,
    StateError,
    UsageError,
    refuse_pickling,
)
from tokenferry.lifecycle import Lifecycle, Stage
from tokenferry.operators import Operators
from tokenferry.step import Step
from tokenferry.transports.base import Gathered, Transport

INDEX_DTYPES = (torch.int32, torch.int64)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class WorkspaceView(Protocol):
    """What a dispatcher sees of its workspace."""

    lifecycle: Lifecycle
    operators: Operators
    num_tokens_traced: int

    @property
    def config(self) -> MoEConfig: ...
    @property
    def dispatch_format(self) -> RowFormat: ...
    @property
    def device(self) -> torch.device: ...
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
            topk_weights: [T', K] float32, bfloat16 or float16, contiguous.

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
            operators, num_tokens = self._workspace.operators, self._workspace.num_tokens_traced
            return operators.dispatch(self.layer, hidden, topk_idx, topk_weights, num_tokens)
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
        self._begin_dispatch("dispatch", hidden, topk_idx, topk_weights)  # the long way: it says what is wrong
        return self.dispatch_end()

    def dispatch_begin(self, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """The sending half of `dispatch`: returns at once, so that other work can overlap.

        The three tensors belong to the call until `dispatch_end` has returned, on every transport: leave them as they are. They
        are kept alive, and may be dropped. With TOKENFERRY_DEBUG=1 a change is a StateError there, on CUDA in the next
        `begin_step` or `check`.
        """
        self._begin_dispatch("dispatch_begin", hidden, topk_idx, topk_weights)

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
            handle=workspace.lifecycle.handle,
        )
        return dispatched

    def combine_input(self) -> torch.Tensor:
        """[R, H] in `combine_dtype`: experts that write their partial rows here save a copy. Valid until `combine_begin`."""
        self._workspace.lifecycle.require("combine_input", self.layer)
        return self._workspace.active_transport.combine_input()

    def combine(self, partial: torch.Tensor, dispatched: Dispatched | None = None) -> torch.Tensor:
        """Sums every rank's partial rows at the rank that owns the token.

        Args:
            partial: [R, H] bfloat16, float16 or float32, contiguous: for each gathered row the weighted sum over this rank's
                experts. Rows >= V are not read. May be `combine_input()`.
            dispatched: the dispatch that this answers, to have the pairing checked.

        Returns:
            [T', H] in the workspace's `result_dtype`, the configuration's unless asked for; the caller's own.

        Raises:
            As `dispatch`; StateError also if `dispatched` is another dispatch's, or was combined already.
        """
        if torch.compiler.is_compiling():
            return self._workspace.operators.combine(self.layer, partial, self._num_supplied)
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
                    combined = transport.combine(partial)
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
        self._begin_combine("combine", partial, dispatched)  # the long way: it says what is wrong
        return self.combine_end()

    def combine_begin(self, partial: torch.Tensor, dispatched: Dispatched | None = None) -> None:
        """The sending half of `combine`: returns at once.

        `partial` belongs to the call until `combine_end` has returned, on every transport: leave it as it is. It is kept alive,
        and may be dropped. With TOKENFERRY_DEBUG=1 a change is a StateError there, on CUDA in the next `begin_step` or `check`.
        """
        self._begin_combine("combine_begin", partial, dispatched)

    def _begin_combine(self, called: str, partial: torch.Tensor, dispatched: Dispatched | None) -> None:
        """`called`: what the caller called, for messages."""
        workspace = self._workspace
        with _Guarded(workspace, called):
            self._check_pairing(called, dispatched)
            workspace.lifecycle.require("combine_begin", self.layer, called)
            self._check_partial(partial)
            workspace.active_transport.combine_begin(partial)
            workspace.lifecycle.advance("combine_begin", self.layer)

    def combine_end(self) -> torch.Tensor:
        """The receiving half of `combine`."""
        workspace = self._workspace
        with _Guarded(workspace, "combine_end"):
            workspace.lifecycle.require("combine_end", self.layer)
            combined = workspace.active_transport.combine_end()
            workspace.lifecycle.advance("combine_end", self.layer)
        return combined

    def _rows_fit(self, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> bool:
        """What `_check_rows` checks, in one go and without a word."""
        workspace = self._workspace
        config, device = workspace.config, workspace.device
        num_rows = self._fitting_hidden(hidden, device)
        return (
            0 <= num_rows <= workspace.step.num_tokens
            and _fitting_rows(topk_idx, config.topk, INDEX_DTYPES, device) == num_rows
            and _fitting_rows(topk_weights, config.topk, WEIGHT_DTYPES, device) == num_rows
            and (device.type != "cpu" or not num_rows or _ids_out_of_range(topk_idx, config.num_experts) is None)
        )

    def _fitting_hidden(self, hidden: HiddenRows, device: torch.device) -> int:
        if type(hidden) is not QuantizedRows:
            return _fitting_rows(hidden, self._columns, self._hidden_dtypes, device)  # type: ignore[arg-type]
        if not self._workspace.dispatch_format.is_quantized:
            return -1
        num_rows = _fitting_rows(hidden.values, self._columns, (FLOAT8,), device)
        scaled_rows = _fitting_rows(hidden.scales, num_scales(self._columns), (torch.float32,), device)
        return num_rows if num_rows == scaled_rows else -1

    def _partial_fits(self, partial: torch.Tensor, dispatched: Dispatched | None) -> bool:
        """What `_check_pairing` and `_check_partial` check, in one go and without a word."""
        workspace = self._workspace
        if dispatched is not None and not (type(dispatched) is Dispatched and dispatched.handle is workspace.lifecycle.handle):
            return False
        num_rows = _fitting_rows(partial, workspace.config.hidden_size, HIDDEN_DTYPES, workspace.device)
        return num_rows == workspace.lifecycle.gathered_rows

    def _check_rows(self, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        config, step = self._workspace.config, self._workspace.step
        self._check_hidden(hidden)
        _check_tensor("topk_idx", topk_idx, config.topk, INDEX_DTYPES, self._workspace.device)
        _check_tensor("topk_weights", topk_weights, config.topk, WEIGHT_DTYPES, self._workspace.device)
        num_rows = hidden.shape[0]
        for name, tensor in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
            if tensor.shape[0] != num_rows:
                raise ShapeError(f"{name} has {tensor.shape[0]} rows but hidden has {num_rows}; they must be equal")
        if num_rows > step.num_tokens:
            raise CapacityError(
                f"hidden has {num_rows} rows but begin_step announced {step.num_tokens}; begin a step with at least {num_rows}"
            )
        if topk_idx.device.type == "cpu" and topk_idx.numel():  # on CUDA a look at the values would wait for the device
            wrong = _ids_out_of_range(topk_idx, config.num_experts)
            if wrong is not None:
                raise UsageError(
                    f"topk_idx holds {wrong}, but expert numbers are -1 (none) "
                    f"to {config.num_experts - 1} (num_experts is {config.num_experts})"
                )

    def _check_hidden(self, hidden: HiddenRows) -> None:
        row_format, device = self._workspace.dispatch_format, self._workspace.device
        if not isinstance(hidden, QuantizedRows):
            _check_tensor("hidden", hidden, self._columns, self._hidden_dtypes, device)
            return
        if not row_format.is_quantized:
            raise UsageError(
                f"hidden is QuantizedRows but the workspace was opened with dispatch_format={row_format.name!r}; open it with "
                "'fp8_block128', or give hidden.dequantize()"
            )
        _check_tensor("hidden.values", hidden.values, self._columns, (FLOAT8,), device)
        _check_tensor("hidden.scales", hidden.scales, num_scales(self._columns), (torch.float32,), device)
        if hidden.scales.shape[0] != hidden.shape[0]:
            raise ShapeError(
                f"hidden.scales has {hidden.scales.shape[0]} rows but hidden.values has {hidden.shape[0]}; they must be equal"
            )

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

    def _check_partial(self, partial: torch.Tensor) -> None:
        _check_tensor("partial", partial, self._workspace.config.hidden_size, HIDDEN_DTYPES, self._workspace.device)
        gathered_rows = self._workspace.lifecycle.gathered_rows
        if partial.shape[0] != gathered_rows:
            raise ShapeError(
                f"partial has {partial.shape[0]} rows but dispatch returned {gathered_rows}; "
                "give one partial row for each gathered row"
            )


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


def _fitting_rows(tensor: torch.Tensor, columns: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> int:
    """The rows of a tensor in which `_check_tensor` finds nothing wrong; -1 if it must look."""
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.dim() != 2:
        return -1
    num_rows, num_columns = tensor.shape
    if num_columns != columns or tensor.dtype not in dtypes or tensor.device != device:
        return -1
    return num_rows if tensor.is_contiguous() and not tensor.is_neg() else -1


def _ids_out_of_range(topk_idx: torch.Tensor, num_experts: int) -> int | None:
    """An expert number that there is not, if any. Waits for the device."""
    low, high = int(topk_idx.min()), int(topk_idx.max())
    if low < -1:
        return low
    return high if high >= num_experts else None


def _check_tensor(name: str, tensor: torch.Tensor, columns: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != 2 or tensor.shape[1] != columns:
        raise ShapeError(f"{name} must have shape [rows, {columns}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise DtypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}; convert it with .to()")
    if tensor.device != device:
        raise DeviceError(f"{name} is on {tensor.device} but the workspace is on {device}; move it there")
    if tensor.layout is not torch.strided:
        raise LayoutError(f"{name} must be a dense tensor, got {tensor.layout}; call .to_dense()")
    if tensor.is_neg():  # its memory holds the values with the other sign
        raise LayoutError(f"{name} is a negated view; call .resolve_neg()")
    if not tensor.is_contiguous():
        raise LayoutError(f"{name} must be contiguous, got strides {list(tensor.stride())}; call .contiguous()")
