"""The library's PyTorch operators, with which `torch.compile(fullgraph=True)` passes through a workspace's calls.

Eager calls do not use them. There is one set for all workspaces, defined once when this file is imported: an operator takes its
workspace's number as an argument. So compiled code is the same text in every process that opens the same workspaces in the same
order, and a second process finds it in the compiler's cache. Their implementations are the eager calls: checks, order and errors
are the same.

Whatever the shape or dtype of a result depends on is an argument too, and the functions that describe results to the compiler
look at nothing else. The caches know a piece of code by its text and its inputs: were the dtype found through the number, one
process could be given what another one had compiled for a workspace of the same number and another dtype.

Where rows lie at fixed addresses, the tensors there are arguments that the operators change, and nothing returned aliases them,
for a compiler may write over an operator's result. `combine_fixed` is said to change the gathered rows too, so that all that
reads them comes before it. Shape suffixes: R gathered rows, H hidden, K top-k.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import torch
from torch.utils.dlpack import from_dlpack

from tokenferry.dispatched import FLOAT8, Dispatched, HiddenRows, PartialRows, QuantizedRows, num_scales
from tokenferry.errors import ShapeError, StateError, UsageError
from tokenferry.groups import EPGroup
from tokenferry.lifecycle import Lifecycle
from tokenferry.transports.base import Gathered, Transport, TransportSettings

NAMESPACE: Final = "tokenferry"
_ROWS: Final = "Tensor(b!) out_hidden, Tensor(c!) out_idx, Tensor(d!) out_weights"
_GIVEN: Final = "Tensor hidden, Tensor topk_idx, Tensor topk_weights, Tensor? scales"
_TERMS: Final = "Tensor partial, Tensor? scales"
_BITS_OF_ORDER: Final = 32
"""Of a workspace's number, for its place in the order of opening; those above tell virtual ranks apart."""


class Layer(Protocol):
    """One layer's eager calls."""

    def dispatch(self, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Dispatched: ...
    def combine(self, partial: PartialRows) -> torch.Tensor: ...


class Callee(Protocol):
    """What the operators see of a workspace: its eager calls."""

    lifecycle: Lifecycle
    operators: Operators
    attached: dict[str, Any]

    def begin_step(
        self, num_tokens: int, num_real_tokens: int | torch.Tensor, *, done: bool, max_tokens: int | None
    ) -> object: ...
    def forget_step_writes(self) -> None: ...
    def dispatcher_at(self, layer: int) -> Layer: ...


# --- which workspace ----------------------------------------------------------------------------------------------------


class _Workspaces:
    """The open workspaces of this process by their numbers, without keeping them alive."""

    def __init__(self) -> None:
        self._by_number: weakref.WeakValueDictionary[int, Callee] = weakref.WeakValueDictionary()
        self._num_opened: dict[int, int] = {}
        self._lock = threading.Lock()  # virtual ranks open side by side

    def take_number(self, group: EPGroup) -> int:
        counter = 0 if group.threads is None else 1 + group.rank
        with self._lock:
            order = self._num_opened.get(counter, 0)
            self._num_opened[counter] = order + 1
        return (counter << _BITS_OF_ORDER) + order

    def enter(self, number: int, workspace: Callee) -> None:
        self._by_number[number] = workspace

    def find(self, number: int) -> Callee:
        workspace = self._by_number.get(number)
        if workspace is None:
            raise StateError("compiled code outlived its workspace; compile it again for an open one")
        return workspace


_WORKSPACES: Final = _Workspaces()
"""The one table that a module of this library keeps. An operator is a function of the process, and its arguments can only be
tensors and numbers: somewhere a number has to lead to a workspace. The table is weak, so that nothing stays when a workspace
goes, and numbers are not given twice."""


def take_number(group: EPGroup) -> int:
    """The next workspace's number: its place in the order of opening, which it keeps through `reset()`.

    The same in every process that opens the same workspaces in the same order. Virtual ranks are threads that open in any
    order, so each rank counts its own; two groups of virtual ranks at once in a process share the counts of a rank, and their
    numbers are distinct, but no longer the same from run to run.
    """
    return _WORKSPACES.take_number(group)


def find_workspace(number: int) -> Callee:
    """The open workspace with this number. Raises StateError if it is gone."""
    return _WORKSPACES.find(number)


# --- as compiled code calls them ----------------------------------------------------------------------------------------


class Operators:
    """The operators of one workspace while it has one transport. Its methods are traced by the compiler, which takes the
    tensors here for inputs of the compiled code: other tensors, as after `reset()`, are passed to the same code.

    Args:
        number: the workspace's, from `take_number`.
        counts: the step's counts.
    """

    def __init__(self, number: int, settings: TransportSettings, transport: Transport, counts: torch.Tensor) -> None:
        self._number, self._rows_per_token = number, transport.rows_per_token
        self._dtype, self._index_dtype = settings.result_dtype, settings.index_dtype
        self._is_quantized = settings.dispatch_format.is_quantized
        # All operators of a workspace change it, so that none overtakes another.
        self.order = torch.zeros(1, dtype=torch.int32, device="cpu")
        self.counts, self.counts_address = counts, counts.data_ptr()
        self.handle = object()
        """Stands for the handle of a dispatch that is made in compiled code."""
        fixed = transport.fixed_rows
        self._copied_rows: int | None = None
        """R, where dispatches in compiled code return copies of what lies at fixed addresses: quantized rows, since inductor
        gives an operator copies of buffers that are read as float8."""
        if fixed is not None and self._is_quantized:
            self._copied_rows, fixed = fixed.hidden_RH.shape[0], None
        self.fixed = None if fixed is None else _fixed_tensors(fixed)
        self.fixed_addresses = [tensor.data_ptr() for tensor in self.fixed] if self.fixed is not None else None

    def serve(self, workspace: Callee) -> None:
        """Lets the operators find `workspace` by its number, for as long as it is alive."""
        _WORKSPACES.enter(self._number, workspace)

    def release(self) -> None:
        """Lets go of the workspace's buffers. Compiled code finds other tensors then, and its operators raise."""
        if self.fixed is not None:
            empty = torch.empty(0, dtype=torch.uint8, device="cpu")
            self.fixed = (empty, empty, empty)

    def begin_step(self, num_tokens: int, num_real_tokens: int | torch.Tensor | None, done: bool, max_tokens: int | None) -> None:
        """Begins a step."""
        if isinstance(num_real_tokens, torch.Tensor):
            _BEGIN_STEP(self.order, self.counts, num_real_tokens, self._number, num_tokens, 0, done, max_tokens)
            return
        real = num_tokens if num_real_tokens is None else num_real_tokens
        _BEGIN_STEP(self.order, self.counts, None, self._number, num_tokens, real, done, max_tokens)

    def dispatch(
        self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor, num_tokens: int,
        max_expert_rows: int | None,
    ) -> Dispatched:  # fmt: skip
        """Dispatches. `num_tokens`, `max_expert_rows`: T of the step, and as in it."""
        values, scales = (hidden.values, hidden.scales) if isinstance(hidden, QuantizedRows) else (hidden.detach(), None)
        given = values, topk_idx, topk_weights.detach(), scales
        step: dict[str, Any] = {"valid_tokens": self.counts[:1], "handle": self.handle, "max_expert_rows": max_expert_rows}
        if self.fixed is not None:
            out, idx, weights = self.fixed
            _DISPATCH_FIXED(self.order, out, idx, weights, *given, self._number, layer)
            return Dispatched(hidden=out, topk_idx=idx, topk_weights=weights, **step)
        counted = None if self._rows_per_token is None else num_tokens * self._rows_per_token
        num_rows = counted if self._copied_rows is None else self._copied_rows
        how = self._number, layer, num_rows, self._index_dtype, self._is_quantized
        out, idx, weights, out_scales = _DISPATCH_FRESH(self.order, *given, *how)
        rows = QuantizedRows(out, out_scales) if self._is_quantized else out
        return Dispatched(hidden=rows, topk_idx=idx, topk_weights=weights, **step)

    @property
    def copies(self) -> bool:
        """Whether what a dispatch returns lies in the workspace's buffers, of which compiled code gets copies."""
        return self._copied_rows is not None

    def combine(self, layer: int, partial: PartialRows, num_rows: int) -> torch.Tensor:
        """Combines into `num_rows` rows."""
        terms, scales = (partial.values, partial.scales) if isinstance(partial, QuantizedRows) else (partial.detach(), None)
        given = terms, scales, self._number, layer, num_rows, self._dtype
        if self.fixed is not None:
            return _COMBINE_FIXED(self.order, *self.fixed, *given)  # type: ignore[no-any-return]
        return _COMBINE_FRESH(self.order, *given)  # type: ignore[no-any-return]


# --- what they do -------------------------------------------------------------------------------------------------------


def _begin_step(
    order: torch.Tensor,
    counts: torch.Tensor,
    real: torch.Tensor | None,
    workspace: int,
    num_tokens: int,
    num_real: int,
    done: bool,
    max_tokens: int | None,
) -> None:
    callee = _WORKSPACES.find(workspace)
    operators = callee.operators
    is_copy = counts.data_ptr() != operators.counts_address
    if is_copy and operators.fixed is not None:
        raise _copied(callee)
    callee.forget_step_writes()  # the operator itself counts as one
    callee.begin_step(num_tokens, num_real if real is None else real, done=done, max_tokens=max_tokens)
    callee.forget_step_writes()
    if is_copy:
        counts.copy_(operators.counts)


def _dispatch_fixed(
    order: torch.Tensor,
    out_hidden: torch.Tensor,
    out_idx: torch.Tensor,
    out_weights: torch.Tensor,
    hidden: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    scales: torch.Tensor | None,
    workspace: int,
    layer: int,
) -> None:
    callee = _WORKSPACES.find(workspace)
    _check_in_place(callee, out_hidden, out_idx, out_weights)
    callee.dispatcher_at(layer).dispatch(_rows_of(hidden, scales), topk_idx, topk_weights)


def _combine_fixed(
    order: torch.Tensor, out_hidden: torch.Tensor, out_idx: torch.Tensor, out_weights: torch.Tensor, *given: Any
) -> torch.Tensor:
    _partial, _scales, workspace, *_result = given
    _check_in_place(_WORKSPACES.find(workspace), out_hidden, out_idx, out_weights)
    return _combine_fresh(order, *given)


def _dispatch_fresh(
    order: torch.Tensor,
    hidden: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    scales: torch.Tensor | None,
    workspace: int,
    layer: int,
    num_rows: int | None,
    index_dtype: torch.dtype,
    quantized: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    callee = _WORKSPACES.find(workspace)
    got = callee.dispatcher_at(layer).dispatch(_rows_of(hidden, scales), topk_idx, topk_weights)
    values, scales_got = (got.hidden.values, got.hidden.scales) if quantized else (got.hidden, hidden.new_empty(0))
    if num_rows is not None:
        _with_rows("dispatch", values, num_rows)
    given = [t.untyped_storage().data_ptr() for t in (hidden, topk_idx, topk_weights, scales) if t is not None]
    fresh = [
        tensor.clone(memory_format=torch.contiguous_format)
        if callee.operators.copies or tensor.untyped_storage().data_ptr() in given
        else tensor
        for tensor in (values, got.topk_idx, got.topk_weights, scales_got)
    ]
    return fresh[0], fresh[1], fresh[2], fresh[3]


def _combine_fresh(
    order: torch.Tensor, partial: torch.Tensor, scales: torch.Tensor | None, workspace: int, layer: int, *result: Any
) -> torch.Tensor:
    num_rows, _dtype = result
    combined = _WORKSPACES.find(workspace).dispatcher_at(layer).combine(_rows_of(partial, scales))
    return _with_rows("combine", combined, num_rows)


# --- what they return, for the compiler ---------------------------------------------------------------------------------


def _returns_nothing(*given: object) -> None:
    return


def _dispatch_fresh_shapes(
    order: torch.Tensor,
    hidden: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    scales: torch.Tensor | None,
    workspace: int,
    layer: int,
    num_rows: int | None,
    index_dtype: torch.dtype,
    quantized: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size() if num_rows is None else num_rows
    topk, size = topk_idx.shape[1], hidden.shape[1]
    scale = hidden.new_empty((rows, num_scales(size)), dtype=torch.float32)
    return (
        hidden.new_empty((rows, size), dtype=FLOAT8 if quantized else hidden.dtype),
        topk_idx.new_empty((rows, topk), dtype=index_dtype),
        topk_weights.new_empty((rows, topk), dtype=torch.float32),
        scale if quantized else hidden.new_empty(0),
    )


def _combine_fresh_shapes(
    order: torch.Tensor, partial: torch.Tensor, scales: torch.Tensor | None, workspace: int, layer: int, *result: Any
) -> torch.Tensor:
    num_rows, dtype = result
    return partial.new_empty((num_rows, partial.shape[1]), dtype=dtype)


def _combine_fixed_shapes(order: torch.Tensor, *rows_and_given: Any) -> torch.Tensor:
    return _combine_fresh_shapes(order, *rows_and_given[3:])


# --- copies, views and numbers of rows ----------------------------------------------------------------------------------


def _check_in_place(callee: Callee, *rows: torch.Tensor) -> None:
    if [tensor.data_ptr() for tensor in rows] != callee.operators.fixed_addresses:
        raise _copied(callee)


def _copied(callee: Callee) -> UsageError:
    """A compiler that works on copies would write them back at the end, over what peers have stored there by then."""
    callee.lifecycle.require_usable("compiled code")
    return UsageError(
        "the compiler's backend gave the operator a copy of the workspace's buffers; use backend='inductor' or 'eager'"
    )


def _fixed_tensors(gathered: Gathered) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = gathered.hidden_RH
    return _alone(hidden), _alone(gathered.topk_idx_RK), _alone(gathered.topk_weights_RK)


def _rows_of(hidden: torch.Tensor, scales: torch.Tensor | None) -> HiddenRows:
    return hidden if scales is None else QuantizedRows(hidden, scales)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own: a compiler that sees views of different dtypes of one storage copies it all."""
    return from_dlpack(tensor.detach())


def _with_rows(operation: str, tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    if tensor.shape[0] != num_rows:
        raise ShapeError(
            f"{operation}: compiled code expected {num_rows} rows and {tensor.shape[0]} came; call it outside of "
            "solo(), and dispatch and combine in the compiled code that began the step"
        )
    return tensor


# --- registration -------------------------------------------------------------------------------------------------------

_LIBRARY: Final = torch.library.Library(NAMESPACE, "DEF")  # its operators are there for as long as it is


def define(schema: str, implementation: Callable[..., Any], shapes: Callable[..., Any], tags: Sequence[torch.Tag] = ()) -> Any:
    """Not by `torch.library.custom_op`, which takes 21 microseconds a call."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tuple(tags))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


_BEGIN_STEP: Final = define(
    "begin_step(Tensor(a!) order, Tensor(b!) counts, Tensor? real, SymInt workspace, SymInt num_tokens, SymInt num_real, "
    "bool done, SymInt? max_tokens) -> ()",
    _begin_step,
    _returns_nothing,
)
_DISPATCH_FIXED: Final = define(
    f"dispatch_fixed(Tensor(a!) order, {_ROWS}, {_GIVEN}, SymInt workspace, SymInt layer) -> ()",
    _dispatch_fixed,
    _returns_nothing,
)
_DISPATCH_FRESH: Final = define(
    f"dispatch_fresh(Tensor(a!) order, {_GIVEN}, SymInt workspace, SymInt layer, SymInt? num_rows, ScalarType index_dtype, "
    "bool quantized) -> (Tensor, Tensor, Tensor, Tensor)",
    _dispatch_fresh,
    _dispatch_fresh_shapes,
)
_COMBINE_FIXED: Final = define(
    f"combine_fixed(Tensor(a!) order, {_ROWS}, {_TERMS}, SymInt workspace, SymInt layer, SymInt num_rows, "
    "ScalarType dtype) -> Tensor",
    _combine_fixed,
    _combine_fixed_shapes,
)
_COMBINE_FRESH: Final = define(
    f"combine_fresh(Tensor(a!) order, {_TERMS}, SymInt workspace, SymInt layer, SymInt num_rows, ScalarType dtype) -> Tensor",
    _combine_fresh,
    _combine_fresh_shapes,
)
