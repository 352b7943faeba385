"""A share of the items of parametrised tests, always the same for the same seed: `make test-long SAMPLE=seed` runs so in CI.

Every test function keeps at least one item. Items that read from one parametrised fixture of their file are kept or left out
together, since the fixture does the work: what is chosen then is which parameters of the fixture run.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

SHARE = Fraction(1, 6)


@dataclass(frozen=True)
class Choice:
    """Where an item may be chosen: among the alternatives of `among`, it belongs to `one`."""

    among: str
    one: str


def choice_of(function: str, item: str, file: str, shared: Mapping[str, int]) -> Choice:
    """`shared` has the index of the parameter of each parametrised fixture that the items of `file` share."""
    if shared:
        return Choice(f"{file} {' '.join(sorted(shared))}", " ".join(f"{name}={shared[name]}" for name in sorted(shared)))
    return Choice(function, item)


def kept(choices: Sequence[Choice], seed: str, share: Fraction = SHARE) -> list[bool]:
    """Which of them belong to the sample of `seed`."""
    alternatives: dict[str, dict[str, None]] = {}  # a set would have another order in every process
    for choice in choices:
        alternatives.setdefault(choice.among, {})[choice.one] = None
    chosen = {among: set(sample(ones, f"{seed} {among}", share)) for among, ones in alternatives.items()}
    return [choice.one in chosen[choice.among] for choice in choices]


def sample(ones: Iterable[str], seed: str, share: Fraction) -> list[str]:
    every = list(ones)
    return random.Random(seed).sample(every, math.ceil(len(every) * share))
