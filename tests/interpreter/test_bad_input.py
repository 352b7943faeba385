"""The table of wrong calls on symmetric memory: interpreted kernels of one rank. Two processes take every other call each.

`make test` makes every eighth call of the table, and `make test-long` the others.
"""

import pytest

import test_bad_input as plain
import tokenferry as tf
from bad_calls import NUMBERS, TABLE
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}
NOT_HERE = frozenset({"num_tokens-over-capacity", "open-p2p-on-a-cpu"})
"""The message has the table's capacity, which is larger than that of the workspace here; and here p2p opens on CPUs."""


CALLS = [wrong for wrong in (*TABLE, *NUMBERS) if wrong.name not in NOT_HERE]
PARTS = [pytest.param(first, id=f"from-{first}", marks=pytest.mark.long if first else ()) for first in range(8)]


def wrong_calls(group: tf.EPGroup, first: int) -> tuple[int, dict[str, str]]:
    """How many calls this process made, and what was not as it should be."""
    found, mine = {}, CALLS[first :: len(PARTS)][group.rank :: group.size]
    for wrong in mine:
        try:
            plain.test_a_wrong_call_is_named_and_changes_nothing(wrong, "p2p")
        except BaseException as error:
            found[wrong.name] = f"{type(error).__name__}: {error}"
    return len(mine), found


@pytest.mark.parametrize("first", PARTS)
def test_every_wrong_call_is_named_launches_nothing_and_leaves_the_workspace_usable(first: int) -> None:
    outcomes = run_ranks(wrong_calls, 2, first, env=INTERPRETER, timeout_s=240)
    assert [found for _, found in outcomes] == [{}, {}]
    assert sum(tried for tried, _ in outcomes) == len(CALLS[first :: len(PARTS)])


def test_only_calls_of_the_table_are_left_out() -> None:
    assert len(CALLS) == len(TABLE) + len(NUMBERS) - len(NOT_HERE)
