"""Where experts should live, from the load that was seen, and whether moving them would pay.

`place` turns a table of loads into a `Placement`; `judge` predicts a model's step with it and says what it would save. Nothing
here moves an expert.
"""

from tokenferry.placement.algorithm import place
from tokenferry.placement.layout import Placement
from tokenferry.placement.options import KindVerdict, Option, StepKind, Verdict
from tokenferry.placement.step_model import StepModel
from tokenferry.placement.verdict import judge

__all__ = ["KindVerdict", "Option", "Placement", "StepKind", "StepModel", "Verdict", "judge", "place"]
