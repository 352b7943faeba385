"""This rank's experts on the rows that a dispatch gathered."""

from tokenferry.experts.apply import apply_experts
from tokenferry.experts.borrowed import BorrowedExperts
from tokenferry.experts.float8 import quantize_weights
from tokenferry.experts.module import Experts
from tokenferry.experts.scratch import ExpertScratch
from tokenferry.experts.torch_path import choose_path
from tokenferry.experts.weights import ExpertsConfig, ExpertWeights

__all__ = [
    "BorrowedExperts",
    "ExpertScratch",
    "ExpertWeights",
    "Experts",
    "ExpertsConfig",
    "apply_experts",
    "choose_path",
    "quantize_weights",
]
