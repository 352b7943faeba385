"""Crosses of parameters, of which `make test` runs a part that has every value of each, and `make test-long` all."""

from collections.abc import Iterable
from typing import Any

import pytest


def crossed(*axes: Iterable[Any]) -> list[Any]:
    """Parameters for each combination of the axes' values. Those that repeat only what others have are marked `long`.

    Kept in `make test` are the first value of every axis together, and then as many combinations as the longest axis has values,
    each with another value of it while the other axes go round.
    """
    values = [list(axis) for axis in axes]
    longest = max(map(len, values))
    kept = {tuple(axis[number % len(axis)] for axis in values) for number in range(longest)}
    combinations = [()]
    for axis in values:
        combinations = [(*combination, value) for combination in combinations for value in axis]
    return [pytest.param(*each, marks=() if each in kept else pytest.mark.long) for each in combinations]
