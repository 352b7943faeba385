"""Short soaks of interpreted ranks; `python tests/soak.py` runs longer ones."""

from typing import Any

import pytest
import torch

import tokenferry as tf
from soak import CAPACITY, Plan, Rank, bits, run
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

WHAT = ("hidden", "topk_idx", "topk_weights", "combined")


OTHERS = [("fp8_block128", "same"), ("bytes", "same"), ("same", "fp8"), ("fp8_block128", "fp8"), ("bytes", "fp8")]
"""Formats of rows, and of terms."""


def long(seconds: float, ranks: int) -> Any:
    return pytest.param(seconds, ranks, marks=[pytest.mark.long, pytest.mark.timeout(seconds + 300)])


@pytest.mark.parametrize(
    ("seconds", "ranks"), [(4, 2), long(60, 3), long(120, 2)], ids=["4-seconds-EP2", "1-minute-EP3", "2-minutes-EP2"]
)
def test_every_row_of_random_steps_is_right_and_memory_stays(seconds: float, ranks: int) -> None:
    reports = run(Plan("interpreter", seconds, seed=ranks, ranks=ranks))
    assert all(report.steps >= min(20, 2 * seconds) and report.seconds >= seconds for report in reports)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("dispatch_format", "combine"), OTHERS)
def test_every_row_of_other_formats_is_right(dispatch_format: str, combine: str) -> None:
    reports = run(Plan("interpreter", 30, seed=2, ranks=2, dispatch_format=dispatch_format, combine=combine))
    assert all(report.steps >= 10 for report in reports)


class Spoiled:
    """A dispatcher that changes the last bit of the last valid element of one of its results."""

    def __init__(self, dispatcher: tf.Dispatcher, what: str) -> None:
        self.dispatcher, self.what = dispatcher, what

    def spoil(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        if what != self.what:
            return tensor
        tensor = tensor.clone()
        bits(tensor)[-1, -1] ^= 1
        return tensor

    def dispatch(self, *rows: torch.Tensor) -> Any:
        got = self.dispatcher.dispatch(*rows)
        for name in WHAT[:3]:
            valid = getattr(got, name)[: int(got.valid_tokens)]
            valid.copy_(self.spoil(valid, name))
        return got

    def combine(self, partial: torch.Tensor, dispatched: tf.Dispatched) -> torch.Tensor:
        return self.spoil(self.dispatcher.combine(partial, dispatched), "combined")


def findings(group: tf.EPGroup) -> dict[str, str]:
    plan = Plan("interpreter", 1, seed=1, ranks=1)
    said = {}
    with tf.Workspace(plan.config, group, max_tokens_per_rank=CAPACITY, transport="p2p") as ws:
        for number, what in enumerate(("nothing", *WHAT)):
            rank = Rank(ws, plan)
            right = rank.layers[0]
            rank.layers[0] = Spoiled(right, what)
            rank.one_step(3, delays=False)
            try:
                rank.look(number)
            except AssertionError as error:
                said[what] = str(error)
    return said


def test_one_wrong_bit_anywhere_is_found() -> None:
    said = run_ranks(findings, 1, env={"TRITON_INTERPRET": "1"})[0]
    assert set(said) == set(WHAT), said
    for what, text in said.items():
        name = {"topk_idx": "ids", "topk_weights": "weights"}.get(what, what)
        assert f"'{name}': 1" in text, text
