"""The table of wrong calls, and the scenes in which they are made. See test_bad_input.py."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import tokenferry as tf
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig, route
from tokenferry.shared_experts import SharedExperts, SharedExpertsConfig
from tokenferry.testing.data import RankInputs
from tokenferry.testing.numeric import first_difference
from tokenferry.transports.base import Transport

H, E, K, C, T = 8, 6, 2, 5, 3
CONFIG = tf.MoEConfig(hidden_size=H, num_experts=E, topk=K, dtype=torch.float32)

CapacityError, ConfigError, DeviceError, DtypeError = tf.CapacityError, tf.ConfigError, tf.DeviceError, tf.DtypeError
LayoutError, ShapeError, StateError, UsageError = tf.LayoutError, tf.ShapeError, tf.StateError, tf.UsageError

STAGES = ("opened", "stepped", "dispatching", "dispatched", "combining", "combined", "closed")
"""Where a workspace stands when the wrong call comes."""


class Counted:
    """A transport that counts what it is asked to launch."""

    LAUNCHES = (
        "begin_step",
        "dispatch",
        "dispatch_begin",
        "dispatch_end",
        "combine",
        "combine_begin",
        "combine_end",
        "close",
        "fail",
    )

    def __init__(self, transport: Transport) -> None:
        self._transport, self.launches = transport, 0

    def __getattr__(self, name: str) -> Any:
        if name in self.LAUNCHES:
            self.launches += 1
        return getattr(self._transport, name)


@dataclass
class Scene:
    """A workspace at some stage, and all that a call may take."""

    ws: tf.Workspace
    dispatcher: tf.Dispatcher
    other: tf.Dispatcher
    inputs: RankInputs
    got: tf.Dispatched | None = None
    used: tf.Dispatched | None = None
    foreign: tf.Workspace | None = None
    foreign_got: tf.Dispatched | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[torch.Tensor]:
        return [self.inputs.hidden, self.inputs.topk_idx, self.inputs.topk_weights]

    def dispatch_with(self, **changed: Any) -> None:
        names = ("hidden", "topk_idx", "topk_weights")
        self.dispatcher.dispatch_begin(*(changed.get(name, row) for name, row in zip(names, self.rows, strict=True)))


def open_workspace(transport: str, **changed: Any) -> tf.Workspace:
    """On p2p for T rows: its gathered rows are as many as there may be, and the table's partial rows are T."""
    settings = {"max_tokens_per_rank": T if transport == "p2p" else C, "transport": transport, **changed}
    return tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), **settings)


def same(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    difference = first_difference(got, want)
    assert not difference, f"{name}: {difference}"


def finish(scene: Scene, stage: str) -> None:
    """The right calls from `stage` on, with the reference's bits."""
    ws, dispatcher, inputs = scene.ws, scene.dispatcher, scene.inputs
    wanted = tf.reference.dispatch([inputs.hidden], [inputs.topk_idx], [inputs.topk_weights])
    if stage in ("opened", "combined"):
        ws.begin_step(T)
    if stage in ("opened", "stepped", "combined"):
        dispatcher.dispatch_begin(*scene.rows)
    if stage in ("opened", "stepped", "combined", "dispatching"):
        scene.got = dispatcher.dispatch_end()
    if stage != "combining":
        assert scene.got is not None
        same("hidden", scene.got.hidden, wanted.hidden)
        same("topk_idx", scene.got.topk_idx, wanted.topk_idx)
        same("topk_weights", scene.got.topk_weights, wanted.topk_weights)
        dispatcher.combine_begin(inputs.partial, scene.got)
    (combined,) = tf.reference.combine([inputs.partial], [T], CONFIG.dtype, CONFIG.dtype)
    same("combined", dispatcher.combine_end(), combined)


def play(scene: Scene, stage: str) -> None:
    """The right calls up to `stage`."""
    index = STAGES.index(stage)
    if stage == "closed":
        scene.ws.close()
        return
    if index >= 1:
        scene.ws.begin_step(T)
    if index >= 2:
        scene.dispatcher.dispatch_begin(*scene.rows)
    if index >= 3:
        scene.got = scene.used = scene.dispatcher.dispatch_end()
    if index >= 4:
        scene.dispatcher.combine_begin(scene.inputs.partial, scene.got)
    if index >= 5:
        scene.dispatcher.combine_end()


@dataclass(frozen=True)
class Wrong:
    """A wrong call, and what it must say."""

    name: str
    stage: str
    call: Callable[[Scene], Any]
    error: type[Exception]
    said: str


TABLE: list[Wrong] = []


def add(name: str, stage: str, error: type[Exception], said: str, call: Callable[[Scene], Any]) -> None:
    TABLE.append(Wrong(name, stage, call, error, said))


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
    for label, value in {
        "transposed": fresh(name).t().contiguous().t(),
        "every-second-column": fresh(name).repeat(1, 2)[:, ::2],
        "expanded": fresh(name)[:1].expand(T, columns),
    }.items():
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

# --- order of calls -------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[Callable[[Scene], Any], str, str]] = {
    "dispatch": (lambda s: s.dispatcher.dispatch(*s.rows), "dispatch", "stepped"),
    "dispatch_begin": (lambda s: s.dispatcher.dispatch_begin(*s.rows), "dispatch_begin", "stepped"),
    "dispatch_end": (lambda s: s.dispatcher.dispatch_end(), "dispatch_end", "dispatching"),
    "combine": (lambda s: s.dispatcher.combine(s.inputs.partial), "combine", "dispatched"),
    "combine_begin": (lambda s: s.dispatcher.combine_begin(s.inputs.partial), "combine_begin", "dispatched"),
    "combine_input": (lambda s: s.dispatcher.combine_input(), "combine_input", "dispatched"),
    "combine_end": (lambda s: s.dispatcher.combine_end(), "combine_end", "combining"),
}
REMEDY = {
    "opened": "the workspace is without a step; call begin_step",
    "stepped": "the workspace is ready for a dispatch; call dispatch_begin",
    "dispatching": "the workspace is between dispatch_begin and dispatch_end in layer 0; call dispatch_end",
    "dispatched": r"the workspace is between a dispatch and its combine in layer 0; call combine\(\)",
    "combining": "the workspace is between combine_begin and combine_end in layer 0; call combine_end",
}
for name, (call, operation, right_stage) in CALLS.items():
    for stage, remedy in REMEDY.items():
        if stage != right_stage:
            add(f"{name}-when-{stage}", stage, StateError, f"{operation} in layer 0: {remedy}", call)
    add(f"{name}-when-closed", "closed", StateError, f"{operation}: the workspace is closed; open a new Workspace", call)
for name, stage, call in (
    ("dispatch_end", "dispatching", lambda s: s.other.dispatch_end()),
    ("combine_input", "dispatched", lambda s: s.other.combine_input()),
    ("combine_begin", "dispatched", lambda s: s.other.combine_begin(s.inputs.partial)),
    ("combine_end", "combining", lambda s: s.other.combine_end()),
):
    add(f"{name}-of-another-layer", stage, StateError, f"{name} was called on the dispatcher of layer 1, but .* layer 0's", call)
add(
    "two-layers-in-flight",
    "dispatched",
    StateError,
    "dispatch in layer 1: .*between a dispatch and its combine",
    lambda s: s.other.dispatch(*s.rows),
)

# --- handles --------------------------------------------------------------------------------------------------------

PAIRING = "combined already, or belongs to another dispatch or workspace; pass what this layer's last dispatch returned"


def old_handle(scene: Scene) -> None:
    """The handle of an earlier round trip, while a later one is under way."""
    scene.dispatcher.combine_begin(scene.inputs.partial, scene.extra["earlier"])


def foreign_handle(scene: Scene) -> None:
    with open_workspace("local") as other:
        dispatcher = other.dispatcher()
        other.begin_step(T)
        foreign = dispatcher.dispatch(*scene.rows)
        scene.dispatcher.combine_begin(scene.inputs.partial, foreign)


def own_handle_in_foreign_workspace(scene: Scene) -> None:
    with open_workspace("local") as other:
        dispatcher = other.dispatcher()
        other.begin_step(T)
        dispatcher.dispatch(*scene.rows)
        dispatcher.combine(scene.inputs.partial, scene.got)


def made_up(scene: Scene) -> tf.Dispatched:
    assert scene.got is not None
    return tf.Dispatched(
        hidden=scene.got.hidden,
        topk_idx=scene.got.topk_idx,
        topk_weights=scene.got.topk_weights,
        valid_tokens=scene.got.valid_tokens,
    )


add("the-same-handle-twice", "combined", StateError, PAIRING, lambda s: s.dispatcher.combine(s.inputs.partial, s.used))
add(
    "the-same-handle-while-combining",
    "combining",
    StateError,
    PAIRING,
    lambda s: s.dispatcher.combine_begin(s.inputs.partial, s.used),
)
add("an-earlier-handle", "dispatched", StateError, PAIRING, old_handle)
add("a-foreign-handle", "dispatched", StateError, PAIRING, foreign_handle)
add("own-handle-in-another-workspace", "dispatched", StateError, PAIRING, own_handle_in_foreign_workspace)
add("a-made-up-handle", "dispatched", StateError, PAIRING, lambda s: s.dispatcher.combine(s.inputs.partial, made_up(s)))
for label, value in {"a-tensor": torch.zeros(1), "a-tuple": (1, 2), "a-string": "got", "False": False}.items():
    add(
        f"dispatched-is-{label}",
        "dispatched",
        UsageError,
        "dispatched must be what dispatch returned, or None; got",
        lambda s, v=value: s.dispatcher.combine(s.inputs.partial, v),
    )
add(
    "arguments-of-combine-swapped",
    "dispatched",
    UsageError,
    "dispatched must be what dispatch returned, or None; got Tensor",
    lambda s: s.dispatcher.combine(s.got, s.inputs.partial),
)

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


def another_workspaces_buffer(scene: Scene) -> None:
    with open_workspace("local") as other:
        dispatcher = other.dispatcher()
        other.begin_step(T + 2)
        dispatcher.dispatch(*more_rows(T + 2))
        scene.dispatcher.combine(dispatcher.combine_input())


add("another-workspaces-combine_input", "dispatched", ShapeError, "5 rows but dispatch returned 3", another_workspaces_buffer)

# --- the workspace's other calls ------------------------------------------------------------------------------------


def nested_solo(scene: Scene) -> None:
    with scene.ws.solo(), scene.ws.solo():
        pass


def reset_in_solo(scene: Scene) -> None:
    with scene.ws.solo():
        scene.ws.reset()


def enter_solo(scene: Scene) -> None:
    with scene.ws.solo():
        pass


def reenter(scene: Scene) -> None:
    with scene.ws:
        pass


for stage, said in (("dispatching", "call dispatch_end"), ("dispatched", r"call combine\(\)"), ("combining", "call combine_end")):
    add(f"solo-while-{stage}", stage, StateError, said, enter_solo)
add("solo-in-solo", "opened", StateError, r"already inside solo\(\)", nested_solo)
add("reset-in-solo", "opened", StateError, r"inside solo\(\); leave it first", reset_in_solo)
for label, value, said in (
    ("a-string", "all", "group must be an EPGroup, got str; make one with ws.group.subset"),
    ("a-list-of-ranks", [0], "group must be an EPGroup, got list"),
    ("a-number", 0, "group must be an EPGroup, got int"),
):
    add(f"reset-group-is-{label}", "stepped", ConfigError, said, lambda s, v=value: s.ws.reset(v))
for label, value in {
    "zero": 0,
    "below-zero": -1.0,
    "NaN": math.nan,
    "infinite": math.inf,
    "a-string": "1",
    "a-bool": True,
}.items():
    add(
        f"reset-timeout-is-{label}",
        "stepped",
        ConfigError,
        "timeout_s must be positive, got",
        lambda s, v=value: s.ws.reset(None, v),
    )
for name, call in {
    "begin_step": lambda s: s.ws.begin_step(1),
    "check": lambda s: s.ws.check(),
    "reset": lambda s: s.ws.reset(),
    "solo": enter_solo,
    "with": reenter,
    "dispatcher": lambda s: s.ws.dispatcher(),
}.items():
    add(f"{name}-when-closed", "closed", StateError, "the workspace is closed; open a new Workspace", call)

# --- opening ----------------------------------------------------------------------------------------------------------

POSITIVE = "must be a positive int, got"
SECONDS = "must be positive, got .*; give seconds"
OPENING: list[tuple[str, dict[str, Any], str]] = [
    *((f"max_tokens_per_rank-is-{label}", {"max_tokens_per_rank": v}, f"max_tokens_per_rank {POSITIVE}")
      for label, v in {"zero": 0, "below-zero": -4, "a-float": 4.0, "a-string": "4", "None": None, "a-bool": True}.items()),
    *((f"timeout_s-is-{label}", {"timeout_s": v}, f"timeout_s {SECONDS}")
      for label, v in {"zero": 0, "NaN": math.nan, "infinite": math.inf, "a-string": "30", "None": None}.items()),
    *((f"open_timeout_s-is-{label}", {"open_timeout_s": v}, f"open_timeout_s {SECONDS}")
      for label, v in {"below-zero": -1, "a-list": [1], "a-bool": True}.items()),
    *((f"max_ctas-is-{label}", {"max_ctas": v}, "max_ctas must be a positive int or None, got")
      for label, v in {"zero": 0, "a-float": 8.0, "a-string": "8", "a-bool": True}.items()),
    *((f"combine_dtype-is-{label}", {"combine_dtype": v}, "combine_dtype must be one of torch.bfloat16, torch")
      for label, v in {"int8": torch.int8, "float64": torch.float64, "a-string": "bfloat16", "a-number": 2}.items()),
    *((f"index_dtype-is-{label}", {"index_dtype": v}, "index_dtype must be torch.int32 or torch.int64")
      for label, v in {"int16": torch.int16, "None": None, "a-string": "int32"}.items()),
    *((f"combine_order-is-{label}", {"combine_order": v}, "combine_order must be 'rank' or 'any'")
      for label, v in {"unknown": "random", "None": None}.items()),
    *((f"counts-is-{label}", {"counts": v}, "counts must be 'uneven' or 'equal'")
      for label, v in {"unknown": "odd", "None": None}.items()),
    *((f"transport-is-{label}", {"transport": v}, "transport must be 'auto' or one of local, ")
      for label, v in {"unknown": "carrier-pigeon", "upper-case": "P2P", "empty": "", "None": None, "a-list": ["local"]}.items()),
]  # fmt: skip
for label, changed, said in OPENING:
    add(f"open-{label}", "stepped", ConfigError, said, lambda s, c=changed: open_workspace(**{"transport": "local", **c}))


def open_on(config: Any = CONFIG, group: Any = None) -> tf.Workspace:
    return tf.Workspace(config, tf.EPGroup(device="cpu") if group is None else group, max_tokens_per_rank=C)


add("open-config-is-None", "stepped", ConfigError, "config must be a MoEConfig, got NoneType", lambda s: open_on(config=None))
add(
    "open-config-is-a-dict", "stepped", ConfigError, "config must be a MoEConfig, got dict", lambda s: open_on(config={"topk": 2})
)
add("open-group-is-a-number", "stepped", ConfigError, "group must be an EPGroup, got int", lambda s: open_on(group=1))
add(
    "open-group-and-config-swapped",
    "stepped",
    ConfigError,
    "config must be a MoEConfig, got EPGroup",
    lambda s: open_on(config=s.ws.group, group=CONFIG),
)
add("open-p2p-on-a-cpu", "stepped", tf.TransportUnavailableError, "p2p: rejected, ", lambda s: open_workspace("p2p"))

# --- sizes in advance -------------------------------------------------------------------------------------------------


def sizes(config: Any = CONFIG, ep_size: Any = 1, rows: Any = C, **changed: Any) -> int:
    return tf.Workspace.required_bytes(config, ep_size, rows, **{"transport": "local", **changed})


SIZES: dict[str, tuple[dict[str, Any], str]] = {
    "transport-auto": ({"transport": "auto"}, "transport must be one of local, .*, got 'auto'"),
    "transport-None": ({"transport": None}, "transport must be one of"),
    "transport-a-list": ({"transport": []}, "transport must be one of"),
    "config-None": ({"config": None}, "config must be a MoEConfig"),
    "ep_size-zero": ({"ep_size": 0}, "ep_size must be a positive int, got 0"),
    "ep_size-a-float": ({"ep_size": 2.0}, "ep_size must be a positive int, got 2.0"),
    "ep_size-a-group": ({"ep_size": "8"}, "ep_size must be a positive int, got '8'"),
    "rows-zero": ({"rows": 0}, "max_tokens_per_rank must be a positive int, got 0"),
    "rows-None": ({"rows": None}, "max_tokens_per_rank must be a positive int, got None"),
    "combine_dtype-int": ({"combine_dtype": torch.int32}, "combine_dtype must be one of"),
    "index_dtype-float": ({"index_dtype": torch.float32}, "index_dtype must be torch.int32 or torch.int64"),
}
for label, (changed, said) in SIZES.items():
    add(f"required_bytes-{label}", "stepped", ConfigError, said, lambda s, c=changed: sizes(**c))

# --- configurations and groups ----------------------------------------------------------------------------------------

for name in ("hidden_size", "num_experts", "topk"):
    for label, value in {"zero": 0, "a-float": 4.0, "a-string": "4", "None": None, "a-bool": True}.items():
        add(
            f"config-{name}-is-{label}",
            "stepped",
            ConfigError,
            f"{name} must be a positive int, got",
            lambda s, n=name, v=value: tf.MoEConfig(**{"hidden_size": 8, "num_experts": 6, "topk": 2, n: v}),
        )
add(
    "config-topk-over-experts",
    "stepped",
    ConfigError,
    "topk is 7 but there are only 6 experts; lower topk",
    lambda s: tf.MoEConfig(hidden_size=8, num_experts=6, topk=7),
)
for label, value in {"float64": torch.float64, "int32": torch.int32, "a-string": "bfloat16", "None": None}.items():
    add(
        f"config-dtype-is-{label}",
        "stepped",
        ConfigError,
        "dtype must be one of torch.bfloat16, torch.float16, torch.float32, got",
        lambda s, v=value: tf.MoEConfig(hidden_size=8, num_experts=6, topk=2, dtype=v),
    )

store = torch.distributed.HashStore()
GROUPS: dict[str, tuple[Callable[[Scene], Any], str]] = {
    "process_group-is-a-string": (
        lambda s: tf.EPGroup("nccl"),
        "process_group must be a torch.distributed process group, got str",
    ),
    "process_group-is-a-size": (lambda s: tf.EPGroup(8), "process_group must be a torch.distributed process group, got int"),
    "device-is-nonsense": (lambda s: tf.EPGroup(device="gpu"), "device must be a torch.device or its name, got 'gpu'"),
    "device-is-a-list": (lambda s: tf.EPGroup(device=["cpu"]), "device must be a torch.device or its name"),
    "device-is-meta": (lambda s: tf.EPGroup(device="meta"), "device is 'meta', where no rows can lie"),
    "store-is-a-path": (lambda s: tf.EPGroup.from_store("/tmp/store", 0, 1), "store must be a torch.distributed store, got str"),
    "rank-over-size": (lambda s: tf.EPGroup.from_store(store, 2, 2), r"rank must lie in \[0, 2\), got 2"),
    "rank-below-zero": (lambda s: tf.EPGroup.from_store(store, -1, 2), r"rank must lie in \[0, 2\), got -1"),
    "rank-is-a-string": (lambda s: tf.EPGroup.from_store(store, "0", 2), r"rank must lie in \[0, 2\), got '0'"),
    "size-is-a-float": (lambda s: tf.EPGroup.from_store(store, 0, 2.0), "rank must lie in"),
    "subset-empty": (lambda s: s.ws.group.subset([]), "holds this rank, 0; got"),
    "subset-without-this-rank": (lambda s: s.ws.group.subset([1]), "holds this rank, 0; got"),
    "subset-rank-too-large": (lambda s: s.ws.group.subset([0, 1]), "a part of 0..0 that holds this rank, 0"),
    "subset-rank-below-zero": (lambda s: s.ws.group.subset([-1, 0]), "a part of 0..0"),
    "subset-is-a-string": (lambda s: s.ws.group.subset("0"), "ranks must be a list of ints, got '0'"),
    "subset-is-a-number": (lambda s: s.ws.group.subset(0), "ranks must be a list of ints, got 0"),
    "subset-is-None": (lambda s: s.ws.group.subset(None), "ranks must be a list of ints, got None"),
    "subset-holds-strings": (lambda s: s.ws.group.subset(["0"]), "ranks must be a list of ints"),
    "subset-holds-bools": (lambda s: s.ws.group.subset([False]), "ranks must be a list of ints"),
    "expert_range-none": (lambda s: s.ws.group.expert_range(0), "0 experts cannot be spread over 1 ranks"),
    "expert_range-a-float": (lambda s: s.ws.group.expert_range(6.0), "num_experts must be an int, got 6.0"),
    "expert_range-rank-too-large": (lambda s: s.ws.group.expert_range(6, 1), r"rank must lie in \[0, 1\), got 1"),
    "expert_range-rank-below-zero": (lambda s: s.ws.group.expert_range(6, -1), r"rank must lie in \[0, 1\), got -1"),
}
for label, (call, said) in GROUPS.items():
    add(f"group-{label}", "stepped", ConfigError, said, call)

# --- the parts of a layer -----------------------------------------------------------------------------------------------

ROUTER = Router(RouterConfig(hidden_size=H, num_experts=E, topk=K), dtype=torch.float32)
EXPERTS = Experts(ExpertsConfig(hidden_size=H, intermediate_size=16, num_experts=E), range(E), dtype=torch.float32)
SHARED = SharedExperts(SharedExpertsConfig(hidden_size=H, intermediate_size=16), dtype=torch.float32)
PART_SIZES = {"a-string": "8", "None": None, "a-float": 8.0, "a-bool": True, "zero": 0}


def layer(scene: Scene, **changed: Any) -> MoELayer:
    parts = {"workspace": scene.ws, "router": ROUTER, "experts": EXPERTS, **changed}
    return MoELayer(parts.pop("workspace"), parts.pop("router"), parts.pop("experts"), **parts)


for label, value in PART_SIZES.items():
    add(
        f"router-topk-is-{label}",
        "stepped",
        ConfigError,
        "topk must be at least 1, got .*; give an int",
        lambda s, v=value: RouterConfig(hidden_size=H, num_experts=E, topk=v),
    )
    add(
        f"experts-intermediate_size-is-{label}",
        "stepped",
        ConfigError,
        "intermediate_size must be at least 1, got .*; give an int",
        lambda s, v=value: ExpertsConfig(hidden_size=H, intermediate_size=v, num_experts=E),
    )
    add(
        f"shared-hidden_size-is-{label}",
        "stepped",
        ConfigError,
        "hidden_size must be at least 1, got .*; give an int",
        lambda s, v=value: SharedExpertsConfig(hidden_size=v, intermediate_size=16),
    )
PARTS: dict[str, tuple[Callable[[Scene], Any], type[Exception], str]] = {
    "experts-activation-is-a-string": (
        lambda s: ExpertsConfig(hidden_size=H, intermediate_size=16, num_experts=E, activation="silu"),
        UsageError, "activation must be of type Activation, got str"),
    "experts-range-is-a-list": (lambda s: Experts(EXPERTS.config, [0, 1]), UsageError, "expert_range must be of type range"),
    "experts-range-too-long": (lambda s: Experts(EXPERTS.config, range(7)), ConfigError, r"a part of range\(0, 6\) without gaps"),
    "experts-range-with-gaps": (lambda s: Experts(EXPERTS.config, range(0, 6, 2)), ConfigError, "without gaps"),
    "experts-config-of-a-router": (lambda s: Experts(ROUTER.config, range(E)), UsageError, "must be of type ExpertsConfig"),
    "experts-dtype-int8": (lambda s: Experts(EXPERTS.config, range(E), dtype=torch.int8), DtypeError, "got torch.int8"),
    "experts-on-rows": (lambda s: EXPERTS(s.inputs.hidden), UsageError, "dispatched must be of type Dispatched, got Tensor"),
    "experts-load-a-list": (lambda s: EXPERTS.load([[1.0]], EXPERTS.down_proj), UsageError, "up_proj must be of type Tensor"),
    "experts-load-nothing": (lambda s: EXPERTS.load(None, None), ShapeError, "up_proj is missing"),
    "experts-load-one-matrix": (lambda s: EXPERTS.load(torch.zeros(H, H), EXPERTS.down_proj), ShapeError, r"up_proj is \[8, 8\]"),
    "router-on-None": (lambda s: ROUTER(None), UsageError, "hidden must be of type Tensor, got NoneType"),
    "router-on-one-row": (lambda s: ROUTER(torch.zeros(H)), ShapeError, r"hidden must be \[T, 8\]"),
    "route-integers": (lambda s: route(torch.zeros(T, E, dtype=torch.int32), ROUTER.config), DtypeError, "floating dtype"),
    "route-without-rules": (lambda s: route(torch.zeros(T, E), None), UsageError, "config must be of type RouterConfig"),
    "shared-experts-on-None": (lambda s: SHARED(None), UsageError, "hidden must be of type Tensor, got NoneType"),
    "layer-without-a-workspace": (lambda s: layer(s, workspace=None), UsageError, "workspace must be of type Workspace"),
    "layer-parts-swapped": (lambda s: layer(s, router=EXPERTS, experts=ROUTER), UsageError, "router must be of type Router"),
    "layer-unknown-overlap": (lambda s: layer(s, shared_overlap="always"), ConfigError, "off, between, stream; got 'always'"),
    "layer-half-a-latent": (lambda s: layer(s, latent_down=torch.nn.Identity()), ConfigError, "belong together; give both"),
    "layer-on-None": (lambda s: layer(s)(None), UsageError, "hidden must be of type Tensor, got NoneType"),
    "layer-on-a-list": (lambda s: layer(s)([[1.0]]), UsageError, "hidden must be of type Tensor, got list"),
    "layer-on-a-number": (lambda s: layer(s)(torch.tensor(1.0)), ShapeError, r"hidden must be \[..., 8\]"),
    "layer-on-meta": (lambda s: layer(s)(torch.zeros(T, H, device="meta")), DeviceError, "hidden is on meta but the work"),
    "layer-on-sparse-rows": (lambda s: layer(s)(torch.zeros(T, H).to_sparse()), LayoutError, r"call .to_dense\(\)"),
    "layer-on-bfloat16": (lambda s: layer(s)(torch.zeros(T, H).bfloat16()), DtypeError, "the workspace moves torch.float32"),
    "layer-on-too-many-rows": (lambda s: layer(s)(torch.zeros(T + 1, H)), CapacityError, "4 rows but begin_step announced 3"),
}  # fmt: skip
for label, (call, error, said) in PARTS.items():
    add(label, "stepped", error, said, call)

ANOTHER_NUMBER = frozenset(
    [
        "topk_idx-below-minus-one",
        "topk_idx-over-32-bits",
        "topk_idx-minus-one-in-32-bits",
        "more-rows-than-capacity",
        "num_real_tokens-is-below-zero",
        "hidden-no-columns",
        "topk_idx-no-columns",
        "topk_weights-no-columns",
        "topk_idx-no-rows",
        "topk_weights-no-rows",
        "partial-one-row-more",
        "partial-no-rows",
        "partial-a-row-for-each-choice",
        "partial-one-column-less",
        "reset-timeout-is-below-zero",
        "reset-timeout-is-NaN",
        "reset-timeout-is-infinite",
        "open-max_tokens_per_rank-is-below-zero",
        "open-timeout_s-is-NaN",
        "open-timeout_s-is-infinite",
        "group-rank-below-zero",
        "group-subset-without-this-rank",
        "group-subset-rank-below-zero",
        "group-expert_range-rank-below-zero",
    ]
)
"""Calls that differ from another one of the table in a number alone: they are tried as well, and not counted."""
NUMBERS = [wrong for wrong in TABLE if wrong.name in ANOTHER_NUMBER]
TABLE = [wrong for wrong in TABLE if wrong.name not in ANOTHER_NUMBER]
