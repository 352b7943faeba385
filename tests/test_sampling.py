"""The sample of the long tests that CI runs: the same for a commit, at least one item of each function, all of them in time."""

from fractions import Fraction

import pytest

from sampling import Choice, choice_of, kept

ITEMS = [choice_of("file::f", f"f[{number}]", "file", {}) for number in range(10)]


def test_a_seed_gives_the_same_sample_again_and_another_gives_another() -> None:
    assert kept(ITEMS, "a1b2") == kept(ITEMS, "a1b2")
    assert len({tuple(kept(ITEMS, str(seed))) for seed in range(10)}) > 5


@pytest.mark.parametrize(("count", "wanted"), [(1, 1), (2, 1), (3, 1), (4, 2), (10, 4)])
def test_a_third_of_the_items_and_at_least_one(count: int, wanted: int) -> None:
    assert sum(kept(ITEMS[:count], "seed", Fraction(1, 3))) == wanted


def test_every_item_is_in_some_sample() -> None:
    assert all(map(any, zip(*(kept(ITEMS, str(seed)) for seed in range(40)), strict=True)))


def test_what_else_is_collected_changes_nothing() -> None:
    others = [Choice("file::g", f"g[{number}]") for number in range(7)]
    assert kept([*others, *ITEMS], "seed")[7:] == kept(ITEMS, "seed")


def test_items_of_one_parameter_of_a_shared_fixture_stay_together() -> None:
    items = [choice_of(f"file::{f}", f"{f}[{run}-{n}]", "file", {"run": run}) for f in "fg" for run in range(3) for n in range(4)]
    chosen = {choice.one for choice, keep in zip(items, kept(items, "seed"), strict=True) if keep}
    assert len(chosen) == 1
    assert sum(kept(items, "seed")) == 8
