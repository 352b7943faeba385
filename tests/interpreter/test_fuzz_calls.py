"""Calls in any order on symmetric memory do what the model in `fuzz_machine` says: one rank of interpreted kernels."""

from collections import Counter

import pytest

import tokenferry as tf
from fuzz_machine import run
from interpreter.test_bad_input import INTERPRETER, NOT_HERE
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter


def sequences(group: tf.EPGroup, max_examples: int) -> Counter[str]:
    return run("p2p", max_examples, NOT_HERE, shrinks=False)


def test_any_sequence_of_calls_does_what_the_model_says() -> None:
    tally = run_ranks(sequences, 1, 10, env=INTERPRETER, timeout_s=200)[0]
    assert tally["right"] >= 125, tally
    assert tally["wrong"] >= 60, tally


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_hundred_sequences_do_what_the_model_says() -> None:
    assert run_ranks(sequences, 1, 100, env=INTERPRETER, timeout_s=300)[0]["sequences"] >= 100
