"""Makes each seeded change of `mutants.py` in a copy of the tree and runs its tests there, which must fail: `make mutants`.

    python -m verification.run_mutants [--list] [NAME ...]

The tests are run once without any change first, and must pass: a test that fails anyway, or skips, notices nothing. Ends with 0
if every change was noticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from verification.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", ".hypothesis", "*.egg-info")
TEST_TIMEOUT_S = 120
"""For a mutant that makes a test wait for ever: its time-out counts as a failure."""
ALL_PASSED, SOME_FAILED = 0, 1
"""Exit codes of pytest; others mean that it could not run the tests."""
DOES_NOT_RUN = ("CompilationError", "SyntaxError", "NameError", "ImportError", "InterpreterError")
"""Any test would notice these: such a mutant says nothing about the tests."""


@dataclass(frozen=True)
class Report:
    """What pytest said: its exit code, of each test whether it passed, and its output."""

    code: int
    passed: dict[str, bool]
    output: str

    @property
    def reason(self) -> str:
        """The line of pytest's that says why a test failed; of a rank process, what its own traceback ends with."""
        errors = [line[1:].strip() for line in self.output.splitlines() if line.startswith("E  ") and line[1:].strip()]
        return errors[-1 if "RankFailedError" in errors[0] else 0][:140] if errors else ""


def environment_of(tree: Path) -> dict[str, str]:
    """The copy's package comes before an installed one. No bytecode: it would not know a change of the same length and second."""
    path = os.pathsep.join((str(tree / "src"), str(tree / "tests")))
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def run_tests(tree: Path, names: Iterable[str], *, stop_early: bool) -> Report:
    """Runs tests of the copy, whose package comes before an installed one."""
    results = tree / "results.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--timeout={TEST_TIMEOUT_S}",
        f"--junitxml={results}",
    ]
    done = subprocess.run(
        [*command, *(["-x"] if stop_early else []), *names],
        cwd=tree,
        env=environment_of(tree),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    passed = {}
    if results.exists():
        for case in ElementTree.parse(results).iter("testcase"):
            passed[f"{case.get('classname')}::{case.get('name')}"] = len(case) == 0 or case[0].tag.startswith("system-")
        results.unlink()
    return Report(done.returncode, passed, done.stdout)


def check_unchanged(tree: Path, mutants: Sequence[Mutant]) -> list[str]:
    """Complaints about tests that do not pass as the tree is, and about a copy that is not what runs."""
    where = [sys.executable, "-c", "import tokenferry; print(tokenferry.__file__)"]
    found = subprocess.run(where, cwd=tree, env=environment_of(tree), capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_relative_to(tree):
        return [f"the tests would run {found}, not the copy in {tree}"]
    names = dict.fromkeys(name for mutant in mutants for name in mutant.tests)
    report = run_tests(tree, names, stop_early=False)
    wrong = [f"{name} does not pass without a change" for name, passed in report.passed.items() if not passed]
    if not wrong and (report.code != ALL_PASSED or not report.passed):
        wrong = [f"pytest ended with {report.code} without a change:\n{report.output}"]
    return wrong


def check_mutant(tree: Path, mutant: Mutant) -> tuple[bool, str]:
    """Makes the change, runs the tests, takes it back. Returns whether a test failed as it should, and what it said."""
    path = tree / mutant.path
    before = path.read_text()
    path.write_text(mutant.mutated(before))
    try:
        report = run_tests(tree, mutant.tests, stop_early=True)
    finally:
        path.write_text(before)
    if report.code == ALL_PASSED:
        return False, "NOT NOTICED: all its tests pass"
    if report.code != SOME_FAILED:
        return False, f"pytest ended with {report.code}:\n{report.output}"
    broken = next((name for name in DOES_NOT_RUN if name in report.output), None)
    return (False, f"{broken}: the change does not run:\n{report.output}") if broken else (True, f"noticed: {report.reason}")


def chosen(names: Sequence[str]) -> list[Mutant]:
    """The mutants of these names, or all."""
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise SystemExit(f"no mutant is called {', '.join(sorted(unknown))}; --list shows their names")
    return [mutant for mutant in MUTANTS if not names or mutant.name in names]


def lost_texts(mutants: Sequence[Mutant]) -> list[str]:
    """Complaints about mutants whose text is not in the tree exactly once."""
    lost = []
    for mutant in mutants:
        try:
            mutant.mutated((ROOT / mutant.path).read_text())
        except (LookupError, OSError) as error:
            lost.append(str(error))
    return lost


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the mutants that are named, or all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="show the names alone")
    options = parser.parse_args(arguments)
    mutants = chosen(options.names)
    if options.list:
        print(*(mutant.name for mutant in mutants), sep="\n")
        return 0
    wrong = lost_texts(mutants)
    if wrong:
        print(*wrong, sep="\n")
        return 1
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder).resolve() / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        start = time.monotonic()
        wrong = check_unchanged(tree, mutants)
        print(f"{time.monotonic() - start:6.1f} s  without a change: {'; '.join(wrong) or 'all tests pass'}", flush=True)
        if wrong:
            return 1
        for mutant in mutants:
            start = time.monotonic()
            is_noticed, said = check_mutant(tree, mutant)
            print(f"{time.monotonic() - start:6.1f} s  {mutant.name}: {said}", flush=True)
            wrong += [] if is_noticed else [mutant.name]
    print(f"{len(mutants) - len(wrong)} of {len(mutants)} changes were noticed" + (f"; not: {', '.join(wrong)}" if wrong else ""))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
