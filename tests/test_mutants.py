"""The seeded changes of `make mutants` still fit the tree: each text is there once, and each named test exists."""

import ast
from pathlib import Path

import pytest
from verification.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
EACH = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


@EACH
def test_its_text_is_there_exactly_once(mutant: Mutant) -> None:
    before = (ROOT / mutant.path).read_text()
    assert mutant.mutated(before) != before


@EACH
def test_what_it_leaves_is_still_python(mutant: Mutant) -> None:
    ast.parse(mutant.mutated((ROOT / mutant.path).read_text()))


@EACH
def test_its_tests_exist(mutant: Mutant) -> None:
    for name in mutant.tests:
        path, function = name.partition("[")[0].split("::")
        defined = [node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
        assert function in defined


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("text", ["nothing", "twice twice", "same"], ids=["gone", "there-twice", "changes-nothing"])
def test_a_mutant_that_does_not_fit_is_named(text: str) -> None:
    mutant = Mutant("lost", "a.py", "same" if text == "same" else "twice", "same", ())
    with pytest.raises(LookupError, match=r"lost: a\.py"):
        mutant.mutated(text)
