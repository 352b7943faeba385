"""Calls in any order do what the model in `fuzz_machine` says."""

import pytest

from fuzz_machine import run


@pytest.fixture(params=["local", "collective"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


def test_any_sequence_of_calls_does_what_the_model_says(transport: str) -> None:
    tally = run(transport, 60)
    assert tally["right"] >= 500, tally
    assert tally["wrong"] >= 250, tally


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_thousands_of_sequences_do_what_the_model_says(transport: str) -> None:
    assert run(transport, 3000)["sequences"] >= 3000
