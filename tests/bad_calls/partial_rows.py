"""Wrong rows for a combine."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bad_calls.arguments import more_rows
from bad_calls.scene import DeviceError, DtypeError, H, K, LayoutError, Scene, ShapeError, T, Table, UsageError, open_workspace

TABLE = Table()
add = TABLE.add

# --- partial rows ---------------------------------------------------------------------------------------------------

PARTIALS: dict[str, tuple[Any, type[Exception], str]] = {
    "None": (None, UsageError, "partial must be a torch.Tensor, got NoneType"),
    "a-list": ([[1.0]], UsageError, "partial must be a torch.Tensor, got list"),
    "an-ndarray": (np.zeros((T, H)), UsageError, "partial must be a torch.Tensor, got ndarray"),
    "a-float": (0.0, UsageError, "partial must be a torch.Tensor, got float"),
    "a-string": ("rows", UsageError, "partial must be a torch.Tensor, got str"),
    "0-d": (torch.tensor(1.0), ShapeError, r"partial must have shape \[rows, 8\], got \[\]"),
    "1-d": (torch.zeros(H), ShapeError, r"partial must have shape \[rows, 8\], got \[8\]"),
    "3-d": (torch.zeros(1, T, H), ShapeError, r"partial must have shape \[rows, 8\], got \[1, 3, 8\]"),
    "one-column-less": (torch.zeros(T, H - 1), ShapeError, r"got \[3, 7\]"),
    "transposed-shape": (torch.zeros(H, T), ShapeError, r"got \[8, 3\]"),
    "one-row-less": (torch.zeros(T - 1, H), ShapeError, "2 rows but dispatch returned 3; give one partial row for each gathered"),
    "one-row-more": (torch.zeros(T + 1, H), ShapeError, "4 rows but dispatch returned 3"),
    "no-rows": (torch.zeros(0, H), ShapeError, "0 rows but dispatch returned 3"),
    "a-row-for-each-choice": (torch.zeros(T * K, H), ShapeError, "6 rows but dispatch returned 3"),
    "float64": (torch.zeros(T, H, dtype=torch.float64), DtypeError, "got torch.float64; convert it with"),
    "int32": (torch.zeros(T, H, dtype=torch.int32), DtypeError, "got torch.int32"),
    "complex64": (torch.zeros(T, H, dtype=torch.complex64), DtypeError, "got torch.complex64"),
    "float8": (torch.zeros(T, H).to(torch.float8_e4m3fn), DtypeError, "got torch.float8_e4m3fn"),
    "on-meta": (torch.zeros(T, H, device="meta"), DeviceError, "partial is on meta but the workspace is on cpu"),
    "transposed": (torch.zeros(H, T).t(), LayoutError, r"contiguous, got strides \[1, 3\]"),
    "wide-rows": (torch.zeros(T, 2 * H)[:, :H], LayoutError, r"contiguous, got strides \[16, 1\]"),
    "every-second-row": (torch.zeros(2 * T, H)[::2], LayoutError, r"contiguous, got strides \[16, 1\]"),
    "expanded": (torch.zeros(1, H).expand(T, H), LayoutError, r"contiguous, got strides \[0, 1\]"),
    "sparse": (torch.eye(T, H).to_sparse(), LayoutError, "partial must be a dense tensor, got torch.sparse_coo"),
    "sparse-csr": (torch.eye(T, H), LayoutError, "partial must be a dense tensor, got torch.sparse_csr"),
    "negated-view": (torch._neg_view(torch.zeros(T, H)), LayoutError, "partial is a negated view"),
}  # fmt: skip


def csr(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta
        return tensor.to_sparse_csr()


for label, (value, error, said) in PARTIALS.items():
    add(
        f"partial-{label}",
        "dispatched",
        error,
        said,
        lambda s, v=value, is_csr=label == "sparse-csr": s.dispatcher.combine(csr(v) if is_csr else v, s.got),
    )


# --- where the sums go ------------------------------------------------------------------------------------------------

OUTS: dict[str, tuple[Callable[[Scene], Any], type[Exception], str]] = {
    "a-list": (lambda s: [1.0], UsageError, "out must be a torch.Tensor, got list"),
    "1-d": (lambda s: torch.zeros(H), ShapeError, r"out must have shape \[rows, 8\], got \[8\]"),
    "one-column-more": (lambda s: torch.zeros(T, H + 1), ShapeError, r"out must have shape \[rows, 8\], got \[3, 9\]"),
    "one-row-more": (lambda s: torch.zeros(T + 1, H), ShapeError, "out has 4 rows but hidden had 3; they must be equal"),
    "no-rows": (lambda s: torch.zeros(0, H), ShapeError, "out has 0 rows but hidden had 3"),
    "bfloat16": (lambda s: torch.zeros(T, H, dtype=torch.bfloat16), DtypeError, "out must be torch.float32, got torch.bfloat16"),
    "on-meta": (lambda s: torch.zeros(T, H, device="meta"), DeviceError, "out is on meta but the workspace is on cpu"),
    "transposed": (lambda s: torch.zeros(H, T).t(), LayoutError, "out must be contiguous"),
    "sparse": (lambda s: torch.eye(T, H).to_sparse(), LayoutError, "out must be a dense tensor"),
    "the-partial-rows": (lambda s: s.inputs.partial, LayoutError, "out overlaps partial, which are read while it is written"),
}  # fmt: skip
for label, (make, error, said) in OUTS.items():
    add(f"out-{label}", "dispatched", error, said, lambda s, m=make: s.dispatcher.combine(s.inputs.partial, s.got, m(s)))
    add(f"out-{label}-in-the-end", "combining", error, said, lambda s, m=make: s.dispatcher.combine_end(m(s)))

add(
    "out-one-row-more-beside-a-parameter",  # no plain tensor, so that it is checked the long way
    "dispatched",
    ShapeError,
    "out has 4 rows but hidden had 3",
    lambda s: s.dispatcher.combine(torch.nn.Parameter(s.inputs.partial), s.got, torch.zeros(T + 1, H)),
)


def another_workspaces_buffer(scene: Scene) -> None:
    with open_workspace("local") as other:
        dispatcher = other.dispatcher()
        other.begin_step(T + 2)
        dispatcher.dispatch(*more_rows(T + 2))
        scene.dispatcher.combine(dispatcher.combine_input())


add("another-workspaces-combine_input", "dispatched", ShapeError, "5 rows but dispatch returned 3", another_workspaces_buffer)
