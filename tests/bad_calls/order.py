"""Calls in a wrong order, and handles of other dispatches."""

from collections.abc import Callable
from typing import Any

import torch

import tokenferry as tf
from bad_calls.scene import Scene, StateError, T, Table, UsageError, open_workspace

TABLE = Table()
add = TABLE.add

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
