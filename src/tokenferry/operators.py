"""The PyTorch operators of one workspace, with which `torch.compile(fullgraph=True)` passes through its calls.

Eager calls do not use them. Each workspace registers its own, so that an operator finds its workspace without a table on a
module; they go when the workspace does. Their implementations are the eager calls: checks, order and errors are the same.

Where rows lie at fixed addresses, the tensors there are arguments that the operators change, and nothing returned aliases them,
for a compiler may write over an operator's result. `combine` is said to change the gathered rows too, so that all that reads
them comes before it. Shape suffixes: R gathered rows, H hidden, K top-k.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.dlpack import from_dlpack

from tokenferry.dispatched import Dispatched
from tokenferry.errors import ShapeError, UsageError
from tokenferry.transports.base import Gathered

BEGIN_STEP = "begin_step(Tensor(a!) order, Tensor(b!) counts, Tensor? real, SymInt num_tokens, SymInt num_real, bool done) -> ()"
DISPATCH_FIXED = (
    "dispatch(Tensor(a!) order, Tensor(b!) out_hidden, Tensor(c!) out_idx, Tensor(d!) out_weights, "
    "Tensor hidden, Tensor topk_idx, Tensor topk_weights, SymInt layer) -> ()"
)
DISPATCH_FRESH = (
    "dispatch(Tensor(a!) order, Tensor hidden, Tensor topk_idx, Tensor topk_weights, SymInt num_rows, SymInt layer) "
    "-> (Tensor, Tensor, Tensor)"
)
COMBINE_FIXED = (
    "combine(Tensor(a!) order, Tensor(b!) out_hidden, Tensor(c!) out_idx, Tensor(d!) out_weights, "
    "Tensor partial, SymInt num_rows, SymInt layer) -> Tensor"
)
COMBINE_FRESH = "combine(Tensor(a!) order, Tensor partial, SymInt num_rows, SymInt layer) -> Tensor"


class Calls(Protocol):
    """The eager calls of a workspace."""

    def require_usable(self) -> None: ...
    def begin_step(self, num_tokens: int, num_real_tokens: int | torch.Tensor, done: bool) -> None: ...
    def dispatch(self, layer: int, hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Dispatched: ...
    def combine(self, layer: int, partial: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a compiler must know of results before they are there.

    Attributes:
        rows_per_token: R is this times T; None: R is known to the host only when the rows are.
    """

    dtype: torch.dtype
    index_dtype: torch.dtype
    rows_per_token: int | None


class Operators:
    """Registers the operators. `fixed`: the gathered rows at fixed addresses, if the transport has such."""

    def __init__(self, calls: Calls, shapes: Shapes, counts: torch.Tensor, fixed: Gathered | None) -> None:
        self._shapes = shapes
        self.order = torch.zeros(1, dtype=torch.int32)  # what all of them change, so that none overtakes another
        self.counts = counts
        self.ticket = object()
        self.fixed = None if fixed is None else Gathered(*(_alone(tensor) for tensor in _tensors(fixed)))
        namespace = f"tokenferry_{uuid.uuid4().hex}"
        library = torch.library.Library(namespace, "DEF")
        implementation = _FixedRows(calls, counts, self.fixed) if self.fixed is not None else _FreshRows(calls, counts, shapes)
        schemas = (BEGIN_STEP, *((DISPATCH_FIXED, COMBINE_FIXED) if self.fixed is not None else (DISPATCH_FRESH, COMBINE_FRESH)))
        for schema in schemas:
            name = schema.partition("(")[0]
            library.define(schema)
            library.impl(name, getattr(implementation, name), "CompositeExplicitAutograd")
            torch.library.register_fake(f"{namespace}::{name}", getattr(implementation, f"{name}_shapes"), lib=library)
        self._library = library  # unregisters when it is gone
        operators = getattr(torch.ops, namespace)
        self._begin_step = operators.begin_step.default
        self._dispatch, self._combine = operators.dispatch.default, operators.combine.default

    def release(self) -> None:
        """Lets go of the workspace's buffers. Compiled code finds other tensors then, and its operators raise."""
        if self.fixed is not None:
            empty = torch.empty(0)
            self.fixed = Gathered(empty, empty, empty)

    # --- as compiled code calls them; traced ------------------------------------------------------------------------

    def begin_step(self, num_tokens: int, num_real_tokens: int | torch.Tensor | None, done: bool) -> None:
        """Begins a step."""
        if isinstance(num_real_tokens, torch.Tensor):
            self._begin_step(self.order, self.counts, num_real_tokens, num_tokens, 0, done)
        else:
            real = num_tokens if num_real_tokens is None else num_real_tokens
            self._begin_step(self.order, self.counts, None, num_tokens, real, done)

    def dispatch(
        self, layer: int, hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, num_tokens: int
    ) -> Dispatched:
        """Dispatches. `num_tokens`: T of the step."""
        given = hidden.detach(), topk_idx, topk_weights.detach()
        if self.fixed is not None:
            rows = self.fixed.hidden_RH, self.fixed.topk_idx_RK, self.fixed.topk_weights_RK
            self._dispatch(self.order, *rows, *given, layer)
        else:
            rows = self._dispatch(self.order, *given, num_tokens * (self._shapes.rows_per_token or 0), layer)
        valid_tokens = self.counts[:1]
        return Dispatched(hidden=rows[0], topk_idx=rows[1], topk_weights=rows[2], valid_tokens=valid_tokens, ticket=self.ticket)

    def combine(self, layer: int, partial: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Combines into `num_rows` rows."""
        partial = partial.detach()
        if self.fixed is not None:
            rows = self.fixed.hidden_RH, self.fixed.topk_idx_RK, self.fixed.topk_weights_RK
            return self._combine(self.order, *rows, partial, num_rows, layer)  # type: ignore[no-any-return]
        return self._combine(self.order, partial, num_rows, layer)  # type: ignore[no-any-return]


class _Steps:
    """What both kinds share."""

    def __init__(self, calls: Calls, counts: torch.Tensor) -> None:
        self._calls, self._counts_address = calls, counts.data_ptr()
        self._counts = counts

    def begin_step(
        self, order: torch.Tensor, counts: torch.Tensor, real: torch.Tensor | None, num_tokens: int, num_real: int, done: bool
    ) -> None:
        self._calls.begin_step(num_tokens, num_real if real is None else real, done)
        if counts.data_ptr() != self._counts_address:
            counts.copy_(self._counts)

    def begin_step_shapes(self, *given: object) -> None:
        return


class _FixedRows(_Steps):
    def __init__(self, calls: Calls, counts: torch.Tensor, fixed: Gathered) -> None:
        super().__init__(calls, counts)
        self._dtype = fixed.hidden_RH.dtype
        self._addresses = [tensor.data_ptr() for tensor in _tensors(fixed)]

    def _check_in_place(self, counts: torch.Tensor | None, *rows: torch.Tensor) -> None:
        """A compiler that works on copies would write them back at the end, over what peers have stored there by then."""
        addresses = [tensor.data_ptr() for tensor in rows]
        if (rows and addresses != self._addresses) or (counts is not None and counts.data_ptr() != self._counts_address):
            self._calls.require_usable()
            raise UsageError(
                "the compiler's backend gave the operator a copy of the workspace's buffers; use backend='inductor' or 'eager'"
            )

    def begin_step(
        self, order: torch.Tensor, counts: torch.Tensor, real: torch.Tensor | None, num_tokens: int, num_real: int, done: bool
    ) -> None:
        self._check_in_place(counts)
        super().begin_step(order, counts, real, num_tokens, num_real, done)

    def dispatch(
        self,
        order: torch.Tensor,
        out_hidden: torch.Tensor,
        out_idx: torch.Tensor,
        out_weights: torch.Tensor,
        hidden: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        layer: int,
    ) -> None:
        self._check_in_place(None, out_hidden, out_idx, out_weights)
        self._calls.dispatch(layer, hidden, topk_idx, topk_weights)

    def dispatch_shapes(self, *given: object) -> None:
        return

    def combine(
        self,
        order: torch.Tensor,
        out_hidden: torch.Tensor,
        out_idx: torch.Tensor,
        out_weights: torch.Tensor,
        partial: torch.Tensor,
        num_rows: int,
        layer: int,
    ) -> torch.Tensor:
        self._check_in_place(None, out_hidden, out_idx, out_weights)
        return _with_rows("combine", self._calls.combine(layer, partial), num_rows)

    def combine_shapes(
        self,
        order: torch.Tensor,
        out_hidden: torch.Tensor,
        out_idx: torch.Tensor,
        out_weights: torch.Tensor,
        partial: torch.Tensor,
        num_rows: int,
        layer: int,
    ) -> torch.Tensor:
        return partial.new_empty((num_rows, partial.shape[1]), dtype=self._dtype)


class _FreshRows(_Steps):
    def __init__(self, calls: Calls, counts: torch.Tensor, shapes: Shapes) -> None:
        super().__init__(calls, counts)
        self._shapes = shapes

    def dispatch(
        self,
        order: torch.Tensor,
        hidden: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        num_rows: int,
        layer: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        got = self._calls.dispatch(layer, hidden, topk_idx, topk_weights)
        if self._shapes.rows_per_token is not None:
            _with_rows("dispatch", got.hidden, num_rows)
        given = [tensor.untyped_storage().data_ptr() for tensor in (hidden, topk_idx, topk_weights)]
        own = [
            tensor.clone() if tensor.untyped_storage().data_ptr() in given else tensor
            for tensor in (got.hidden, got.topk_idx, got.topk_weights)
        ]
        return own[0], own[1], own[2]

    def dispatch_shapes(
        self,
        order: torch.Tensor,
        hidden: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        num_rows: int,
        layer: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = num_rows if self._shapes.rows_per_token is not None else torch.library.get_ctx().new_dynamic_size()
        topk = topk_idx.shape[1]
        return (
            hidden.new_empty((rows, hidden.shape[1])),
            topk_idx.new_empty((rows, topk), dtype=self._shapes.index_dtype),
            topk_weights.new_empty((rows, topk), dtype=torch.float32),
        )

    def combine(self, order: torch.Tensor, partial: torch.Tensor, num_rows: int, layer: int) -> torch.Tensor:
        return _with_rows("combine", self._calls.combine(layer, partial), num_rows)

    def combine_shapes(self, order: torch.Tensor, partial: torch.Tensor, num_rows: int, layer: int) -> torch.Tensor:
        return partial.new_empty((num_rows, partial.shape[1]), dtype=self._shapes.dtype)


def _tensors(gathered: Gathered) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return gathered.hidden_RH, gathered.topk_idx_RK, gathered.topk_weights_RK


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
