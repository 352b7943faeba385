"""The table of wrong calls, by subject, and the scenes in which they are made. See test_bad_input.py."""

from bad_calls import arguments, formats, groups, layer, opening, order, partial_rows
from bad_calls.order import CALLS
from bad_calls.scene import CONFIG, STAGES, C, Counted, Scene, T, Wrong, finish, open_workspace, play, same

__all__ = [
    "ANOTHER_NUMBER",
    "CALLS",
    "CONFIG",
    "NUMBERS",
    "STAGES",
    "TABLE",
    "C",
    "Counted",
    "Scene",
    "T",
    "Wrong",
    "finish",
    "open_workspace",
    "play",
    "same",
]

EVERY: list[Wrong] = [
    *arguments.TABLE,
    *order.TABLE,
    *partial_rows.TABLE,
    *opening.TABLE,
    *formats.TABLE,
    *groups.TABLE,
    *layer.TABLE,
]
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
NUMBERS = [wrong for wrong in EVERY if wrong.name in ANOTHER_NUMBER]
TABLE = [wrong for wrong in EVERY if wrong.name not in ANOTHER_NUMBER]
