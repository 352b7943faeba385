"""What a seeded change is: `mutants.py` has them, `run_mutants.py` makes each in a copy of the tree."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change that must make a test fail.

    Attributes:
        name: what is wrong afterwards.
        path: the file, from the root of the tree.
        find: its text there, exactly once; whole lines where the change is more than a word.
        replace: what stands there instead.
        tests: pytest's names of tests, of which at least one must fail. All pass before the change.
    """

    name: str
    path: str
    find: str
    replace: str
    tests: tuple[str, ...]

    def mutated(self, text: str) -> str:
        """The file's text with the change. Raises LookupError if `find` is not there exactly once, or changes nothing."""
        count = text.count(self.find)
        if count != 1 or self.replace == self.find:
            raise LookupError(f"{self.name}: {self.path} has its text {count} times, not once: {self.find!r}")
        return text.replace(self.find, self.replace)
