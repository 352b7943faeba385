"""The protocol models hold, and find the bugs that are put into them. See verification/."""

import pytest
from verification import run

MISSING = run.missing_tools()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed (Debian: apt-get install spin gcc)")


def cases() -> list:
    """Of the seeded bugs `make test` looks for every fourth, and `make test-long` for all."""
    bugs = [v.name for v in run.VARIANTS if v.finds]
    later = {v.name for v in run.VARIANTS if v.is_long} | set(bugs) - set(bugs[::4])
    return [pytest.param(v, id=v.name, marks=[pytest.mark.long] if v.name in later else []) for v in run.VARIANTS]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", cases())
def test_spin_finds_the_seeded_bugs_and_no_others(variant: run.Variant) -> None:
    result = run.check(variant)
    assert result.is_as_wanted(variant), f"wanted {variant.finds or 'no error'!r}: {result}"


def test_a_search_cut_short_is_no_proof() -> None:
    report = "Warning: Search not completed\n State-vector 92 byte, depth reached 12, errors: 0\n 100 states, stored\n"
    variant = run.Variant("cut-short", "slots")
    assert not run.parse(report, 1.0).is_as_wanted(variant)
    assert not run.parse("error: max search depth too small\n" + report, 1.0).is_as_wanted(variant)
