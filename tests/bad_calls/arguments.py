"""Wrong arguments of begin_step and of a dispatch."""

from typing import Any

import numpy as np
import torch

from bad_calls.scene import (
    C,
    CapacityError,
    DeviceError,
    DtypeError,
    E,
    H,
    K,
    LayoutError,
    ShapeError,
    StateError,
    T,
    Table,
    UsageError,
)

TABLE = Table()
add = TABLE.add

# --- begin_step -----------------------------------------------------------------------------------------------------

NOT_AN_INT = {"None": None, "a-string": "3", "a-float": 2.0, "a-bool": True, "a-list": [3], "a-tensor": torch.tensor(3)}
for label, value in NOT_AN_INT.items():
    add(f"num_tokens-is-{label}", "stepped", UsageError, "num_tokens must be an int, got", lambda s, v=value: s.ws.begin_step(v))
add("num_tokens-below-zero", "stepped", ShapeError, "got -1", lambda s: s.ws.begin_step(-1))
add(
    "num_tokens-over-capacity",
    "opened",
    CapacityError,
    "num_tokens is 6 but the workspace was opened for 5; open it with max_tok",
    lambda s: s.ws.begin_step(C + 1),
)
for label, value, error, said in (
    ("over-num_tokens", 4, CapacityError, "between 0 and num_tokens, 3; got 4"),
    ("below-zero", -1, CapacityError, "between 0 and num_tokens, 3; got -1"),
    ("a-bool", True, UsageError, "an int or an int32 tensor, got True"),
    ("a-float", 1.0, UsageError, "an int or an int32 tensor, got 1.0"),
    ("a-list", [1], UsageError, r"an int or an int32 tensor, got \[1\]"),
    ("a-string", "1", UsageError, "an int or an int32 tensor, got '1'"),
    ("an-int64-tensor", torch.tensor([1]), DtypeError, "torch.int32, got torch.int64"),
    ("a-float-tensor", torch.tensor([1.0]), DtypeError, "torch.int32, got torch.float32"),
    ("a-bool-tensor", torch.tensor([True]), DtypeError, "torch.int32, got torch.bool"),
    ("two-numbers", torch.zeros(2, dtype=torch.int32), ShapeError, "one element, got 2"),
    ("no-number", torch.zeros(0, dtype=torch.int32), ShapeError, "one element, got 0"),
    ("on-meta", torch.zeros(1, dtype=torch.int32, device="meta"), DeviceError, "on meta but the workspace is on cpu"),
):
    add(f"num_real_tokens-is-{label}", "stepped", error, said, lambda s, v=value: s.ws.begin_step(T, v))
for label, value, error, said in (  # a workspace of p2p has T rows, 3, here and any other one C, 5
    ("below-num_tokens", T - 1, CapacityError, "num_tokens, 3, and the workspace's max_tokens_per_rank, [35]; got 2"),
    ("over-capacity", C + 1, CapacityError, "num_tokens, 3, and the workspace's max_tokens_per_rank, [35]; got 6"),
    ("a-bool", True, UsageError, "an int or None, got True"),
    ("a-float", 3.0, UsageError, "an int or None, got 3.0"),
    ("a-string", "3", UsageError, "an int or None, got '3'"),
    ("a-tensor", torch.tensor(3), UsageError, r"an int or None, got tensor\(3\)"),
):
    add(
        f"max_tokens-is-{label}",
        "opened",
        error,
        f"max_tokens must .*{said}",
        lambda s, v=value: s.ws.begin_step(T, max_tokens=v),
    )
add("done-is-a-number", "stepped", UsageError, "done must be a bool, got 1", lambda s: s.ws.begin_step(T, done=1))
for stage, said in (
    ("dispatching", "between dispatch_begin and dispatch_end in layer 0; call dispatch_end"),
    ("dispatched", r"between a dispatch and its combine in layer 0; call combine\(\)"),
    ("combining", "between combine_begin and combine_end in layer 0; call combine_end"),
):
    add(f"begin_step-while-{stage}", stage, StateError, said, lambda s: s.ws.begin_step(T))
add("step-before-begin_step", "opened", StateError, r"no step has begun; call begin_step\(\)", lambda s: s.ws.step)

# --- arguments of dispatch ------------------------------------------------------------------------------------------


def fresh(name: str, **changed: Any) -> torch.Tensor:
    """An argument as it should be, but for `changed`."""
    if name == "hidden":
        return torch.zeros((T, H), **{"dtype": torch.float32, **changed})
    if name == "topk_idx":
        return torch.zeros((T, K), **{"dtype": torch.int64, **changed})
    return torch.ones((T, K), **{"dtype": torch.float32, **changed})


COLUMNS = {"hidden": H, "topk_idx": K, "topk_weights": K}
NOT_A_TENSOR = {
    "None": (None, "NoneType"),
    "a-list": ([[0.0]], "list"),
    "a-string": ("rows", "str"),
    "a-float": (1.5, "float"),
    "an-ndarray": (np.zeros((T, K)), "ndarray"),
}
WRONG_DTYPES = {
    "hidden": (torch.bfloat16, torch.float64, torch.int32, torch.complex64),
    "topk_idx": (torch.float32, torch.int16, torch.bool, torch.uint8),
    "topk_weights": (torch.float64, torch.int64, torch.bool),
}
for name, columns in COLUMNS.items():
    for label, (value, kind) in NOT_A_TENSOR.items():
        add(
            f"{name}-is-{label}",
            "stepped",
            UsageError,
            f"{name} must be a torch.Tensor, got {kind}",
            lambda s, n=name, v=value: s.dispatch_with(**{n: v}),
        )
    for label, value in {
        "0-d": fresh(name)[0, 0],
        "1-d": fresh(name)[0],
        "3-d": fresh(name)[None],
        "one-column-more": torch.cat([fresh(name), fresh(name)[:, :1]], 1),
        "no-columns": fresh(name)[:, :0],
    }.items():
        add(
            f"{name}-{label}",
            "stepped",
            ShapeError,
            rf"{name} must have shape \[rows, {columns}\]",
            lambda s, n=name, v=value: s.dispatch_with(**{n: v}),
        )
    for dtype in WRONG_DTYPES[name]:
        add(
            f"{name}-{str(dtype).removeprefix('torch.')}",
            "stepped",
            DtypeError,
            rf"{name} must be .*, got {dtype}; convert it with",
            lambda s, n=name, d=dtype: s.dispatch_with(**{n: fresh(n).to(d)}),
        )
    add(
        f"{name}-on-meta",
        "stepped",
        DeviceError,
        f"{name} is on meta but the workspace is on cpu; move it there",
        lambda s, n=name: s.dispatch_with(**{n: fresh(n, device="meta")}),
    )
    strided = {
        "transposed": fresh(name).t().contiguous().t(),
        "every-second-column": fresh(name).repeat(1, 2)[:, ::2],
        "expanded": fresh(name)[:1].expand(T, columns),
    }
    for label, value in strided.items() if name != "topk_weights" else ():  # weights are copied
        add(
            f"{name}-{label}",
            "stepped",
            LayoutError,
            rf"{name} must be contiguous, got strides .*call .contiguous\(\)",
            lambda s, n=name, v=value: s.dispatch_with(**{n: v}),
        )
    add(
        f"{name}-sparse",
        "stepped",
        LayoutError,
        rf"{name} must be a dense tensor, got torch.sparse_coo; call .to_dense\(\)",
        lambda s, n=name: s.dispatch_with(**{n: fresh(n).to_sparse()}),
    )
    if name != "topk_idx":
        add(
            f"{name}-negated-view",
            "stepped",
            LayoutError,
            rf"{name} is a negated view; call .resolve_neg\(\)",
            lambda s, n=name: s.dispatch_with(**{n: torch._neg_view(fresh(n))}),
        )
    if name != "hidden":
        add(
            f"{name}-one-row-less",
            "stepped",
            ShapeError,
            f"{name} has 2 rows but hidden has 3; they must be equal",
            lambda s, n=name: s.dispatch_with(**{n: fresh(n)[:-1]}),
        )
        add(
            f"{name}-no-rows",
            "stepped",
            ShapeError,
            f"{name} has 0 rows but hidden has 3",
            lambda s, n=name: s.dispatch_with(**{n: fresh(n)[:0]}),
        )
add(
    "hidden-no-rows-others-three",
    "stepped",
    ShapeError,
    "topk_idx has 3 rows but hidden has 0",
    lambda s: s.dispatch_with(hidden=fresh("hidden")[:0]),
)
for label, value, said in (
    ("one-too-large", E, "topk_idx holds 6, but expert numbers are -1 .* to 5 .num_experts is 6"),
    ("below-minus-one", -2, "topk_idx holds -2"),
    ("over-32-bits", 2**40, "topk_idx holds 1099511627776"),
    ("minus-one-in-32-bits", 2**32 - 1, "topk_idx holds 4294967295"),
):
    add(f"topk_idx-{label}", "stepped", UsageError, said, lambda s, v=value: s.dispatch_with(topk_idx=torch.full((T, K), v)))
add(
    "arguments-swapped",
    "stepped",
    ShapeError,
    "hidden must have shape",
    lambda s: s.dispatcher.dispatch_begin(s.inputs.topk_idx, s.inputs.hidden, s.inputs.topk_weights),
)
add(
    "ids-and-weights-swapped",
    "stepped",
    DtypeError,
    "topk_idx must be torch.int32 or torch.int64, got torch.float32",
    lambda s: s.dispatcher.dispatch_begin(s.inputs.hidden, s.inputs.topk_weights, s.inputs.topk_idx),
)


def more_rows(count: int) -> list[torch.Tensor]:
    return [torch.zeros(count, H), torch.zeros(count, K, dtype=torch.int64), torch.ones(count, K)]


add(
    "more-rows-than-announced",
    "stepped",
    CapacityError,
    "hidden has 4 rows but begin_step announced 3; begin a step with at least 4",
    lambda s: s.dispatcher.dispatch(*more_rows(4)),
)
add("more-rows-than-capacity", "stepped", CapacityError, "hidden has 9 rows", lambda s: s.dispatcher.dispatch(*more_rows(9)))
