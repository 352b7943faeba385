"""The routing kernel, interpreted, against the chain of PyTorch operators that says what it means."""

import pytest

import tokenferry as tf
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}


def everything(group: tf.EPGroup) -> tuple:
    import routes  # here: it imports the kernel, and whether that is interpreted is settled by then

    return (
        {str(case): case.error("cpu") for case in routes.CASES},
        routes.hostile("cpu"),
        routes.example("cpu"),
        routes.switched_off_example("cpu"),
    )


@pytest.fixture(scope="module")
def said() -> tuple:
    return run_ranks(everything, 1, env=INTERPRETER)[0]


def test_it_chooses_and_weighs_as_the_operators_do(said) -> None:
    errors = said[0]
    assert len(errors) >= 15
    assert {name: error for name, error in errors.items() if error} == {}


def test_hostile_rows_get_valid_experts_each_once(said) -> None:
    assert [name for name, held in said[1].items() if not held] == []


def test_the_worked_example(said) -> None:
    weights, idx, renormalised = said[2]
    assert idx == [[1, 3]]
    assert weights == [pytest.approx([0.5, 0.25])]
    assert renormalised == [pytest.approx([2 / 3, 1 / 3])]


def test_where_too_few_experts_are_on_the_rest_of_the_row_is_none(said) -> None:
    assert said[3] == ([[pytest.approx(0.5), 0.0]], [[1, -1]])
