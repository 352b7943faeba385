"""What a verdict says: the options, over all steps and in each kind of steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tokenferry.errors import ConfigError
from tokenferry.placement.layout import Placement


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """Steps with about as many rows.

    Attributes:
        name: in words, as it stands behind "in steps of".
        num_steps: how many there were.
        rows: of all ranks together, in the mean of them; 0 for steps in which no rank had any.
    """

    name: str
    num_steps: float
    rows: float

    def __post_init__(self) -> None:
        if not (self.num_steps > 0 and self.rows >= 0):
            told = f"num_steps is {self.num_steps} and rows are {self.rows}"
            raise ConfigError(f"steps of {self.name}: {told}; give at least one step, and 0 rows or more")


@dataclass(frozen=True, eq=False)
class Option:
    """One thing that could be done.

    Attributes:
        name: "as is", "rearranged", or "rearranged + n replicas".
        placement: what it is.
        step_s: predicted, the mean of all steps.
        gain: the share of the step as it is that it saves; negative if it is slower.
        imbalance: of the fullest layer: rows of the fullest rank over the mean.
        extra_bytes: of weights that each rank holds beyond its share today, all layers, for replicas.
    """

    name: str
    placement: Placement
    step_s: float
    gain: float
    imbalance: float
    extra_bytes: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = {"step_s": self.step_s, "gain": self.gain, "imbalance": self.imbalance, "extra_bytes": self.extra_bytes}
        return {"name": self.name, **figures, "placement": self.placement.to_dict()}


@dataclass(frozen=True, eq=False)
class KindVerdict:
    """The options in steps of one kind.

    Attributes:
        kind: which steps.
        steps_s: predicted, by option.
        best: the name of the option that is fastest in these steps, and what it saves of them.
        gain: see `best`.
        pays: whether that is worth a change.
        bound_by_weights: the share of layers in which the slowest rank as is is longer at reading weights than at products.
        touched: experts that get a row in such a step, on the rank that has the most of them, as is. Few of those it holds where
            rows are few: the weights of the others are not read.
    """

    kind: StepKind
    steps_s: tuple[float, ...]
    best: str
    gain: float
    pays: bool
    bound_by_weights: float
    touched: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = {"steps_s": list(self.steps_s), "best": self.best, "gain": self.gain, "pays": self.pays}
        return {**asdict(self.kind), **figures, "bound_by_weights": self.bound_by_weights, "touched": self.touched}


@dataclass(frozen=True, eq=False)
class Verdict:
    """What was compared, the best of it over all steps, the same for each kind of steps, and the reading in words."""

    options: tuple[Option, ...]
    pays: bool
    best: Option
    sentence: str
    kinds: tuple[KindVerdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        options, kinds = [option.to_dict() for option in self.options], [kind.to_dict() for kind in self.kinds]
        return {"pays": self.pays, "best": self.best.name, "sentence": self.sentence, "options": options, "kinds": kinds}
