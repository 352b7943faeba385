"""What ranks are asked to generate, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Request:
    """A random prompt, the number of tokens to generate, and the step of the engine at which it arrives."""

    prompt_tokens: int
    new_tokens: int
    arrives_at_step: int = 0

    def prompt(self, rank: int, number: int, vocab_size: int) -> list[int]:
        """The same for the same rank and number, whatever the dispatcher."""
        generator = torch.Generator().manual_seed(1000 * rank + number)
        return torch.randint(0, vocab_size, (self.prompt_tokens,), generator=generator).tolist()


Load = Sequence[Sequence[Request]]
"""The requests of each rank."""


def even(requests: int, new_tokens: int = 24, prompt_tokens: int = 48, ranks: int = 2) -> Load:
    """As many requests on every rank, of nearly the same lengths."""
    return [[Request(prompt_tokens + 8 * (number % 3), new_tokens) for number in range(requests)]] * ranks


@dataclass(frozen=True)
class Step:
    """One step of the engine on this rank.

    Attributes:
        kind: "prefill", "decode", or "dummy" if this rank had nothing to do while a peer had.
        padded_tokens: rows of this rank's forward, padding included; -1 for a dummy.
        in_graph: whether a CUDA graph was replayed.
        wall_ms: host time of the step.
        forward_ms: GPU time of the forward; None on CPUs.
    """

    kind: str
    padded_tokens: int
    in_graph: bool
    wall_ms: float
    forward_ms: float | None = None


@dataclass(frozen=True)
class Outcome:
    """Generated tokens by this rank's requests, its steps, and the seconds from the first request to the last token."""

    tokens: Mapping[int, list[int]]
    steps: Sequence[Step] = field(repr=False)
    wall_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))

    def kinds(self) -> dict[str, int]:
        """Number of steps of each kind, those in graphs apart."""
        names = [f"{step.kind} in graph" if step.in_graph else step.kind for step in self.steps]
        return {name: names.count(name) for name in sorted(set(names))}


def first_differences(wanted: Mapping[int, list[int]], got: Mapping[int, list[int]]) -> dict[int, int]:
    """For each request whose tokens differ, the place of the first that does (-1: one of the two has no such request)."""
    places = {}
    for number in sorted({*wanted, *got}):
        a, b = wanted.get(number), got.get(number)
        if a is None or b is None:
            places[number] = -1
        elif a != b:
            unequal = [place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
            places[number] = unequal[0] if unequal else min(len(a), len(b))
    return places


def other_choices(wanted: Mapping[int, list[int]], got: Mapping[int, list[int]]) -> tuple[int, int]:
    """(requests whose tokens differ, tokens that were chosen behind the same tokens in both, the first other one included).

    A random model's best two tokens are often close, so that another rounding makes another choice now and then, and all that
    follows differs. The first number's share of the second is how often that happened; experts that compute something else make
    other choices nearly always.
    """
    places = first_differences(wanted, got)
    alike = sum(places[number] + 1 if number in places else len(tokens) for number, tokens in wanted.items())
    return len(places), alike
