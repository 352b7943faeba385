"""No test sets a limit of its own from above on a time that it has measured: see patience.py."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MEASURED = ("waited_s", "took_s")
PATIENCE = ("SLACK_S", "PATIENT_S")


def is_measured(node: ast.expr) -> bool:
    """`time.monotonic() - start_s`, or what a name or key of ours says to be one."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        return ast.unparse(node.left) in ("time.monotonic()", "time.perf_counter()")
    words = [*(each.id for each in ast.walk(node) if isinstance(each, ast.Name))]
    words += [each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)]
    words += [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return any(word in MEASURED for word in words)


def limits(source: str) -> list[str]:
    """Comparisons of measured times with limits above them in which no constant of patience.py stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for left, sign, right in zip(sides, node.ops, sides[1:], strict=False):
                is_limit = isinstance(sign, ast.Lt | ast.LtE) and is_measured(left)
                if is_limit and not any(word in ast.unparse(right) for word in PATIENCE):
                    found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


ON_BUSY_MACHINES = [path for path in sorted(TESTS.rglob("*.py")) if "gpu" not in path.relative_to(TESTS).parts]
"""On GPUs a file runs alone."""


@pytest.mark.parametrize("path", ON_BUSY_MACHINES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_limits_from_above_are_those_of_patience(path: Path) -> None:
    assert limits(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("assert time.monotonic() - start < 2", 1),
        ("assert 0.3 <= time.monotonic() - start_s < timeout_s + 2.0", 1),
        ("assert said['waited_s'] < 3", 1),
        ("assert outcome.took_s < 1.5 + SLACK_S", 0),
        ("while time.monotonic() < deadline_s: pass", 0),
        ("assert told.waited_s > 2", 0),
    ],
)
def test_the_search_finds_them(source: str, number: int) -> None:
    assert len(limits(source)) == number
