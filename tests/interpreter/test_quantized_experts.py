"""The experts' kernels on quantized rows, interpreted: no second quantisation, with few rows and with many."""

import dataclasses

import pytest
import torch

import tokenferry as tf
from quantized_experts import CASES, pair
from test_experts import LOCAL
from tokenferry.experts import ExpertScratch, triton_path
from tokenferry.experts.plan import Plan, Tiles
from tokenferry.testing import run_ranks
from tokenferry.testing.numeric import first_difference

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}


def tiles(**changes) -> Tiles:
    common = {"rows": 16, "rows_few": 16, "columns": 64, "num_warps": 4, "num_stages": 2, "programs_per_sm": 1}
    return Tiles(**{**common, **changes})


def plan_of(name: str, float8: bool, depth: int) -> Plan:
    if float8 and "blocks" in name:
        common = {"columns": 128, "depth": 128, "tensor_map": True, "prequantize": True, "in_blocks": True}
        many, few = tiles(min_rows=7, **common), tiles(max_rows=6, swapped=True, **common)
        return Plan(up=(many, few), down=(few, dataclasses.replace(many, columns=256)))
    two = (
        tiles(depth=128 if float8 else depth, min_rows=7, prequantize=float8, tensor_map=not float8),
        tiles(depth=128 if float8 else depth, max_rows=6),
    )
    return Plan(up=two, down=two)


def both(group: tf.EPGroup, name: str, float8: bool, depth: int, max_bytes: int) -> tuple[str, float]:
    experts, came, plain = pair(CASES[name], float8=float8, num_valid=17)
    plan, outputs = plan_of(name, float8, depth), []
    for rows in (came, plain):
        out = torch.full((19, CASES[name].hidden_size), 7.0)
        scratch = ExpertScratch("cpu", max_bytes=max_bytes)
        outputs.append(
            triton_path.run(
                rows, experts.weights, LOCAL.start, experts.config.activation, out, scratch, plan=plan, dtype=CASES[name].dtype
            )
        )
    came, plain = outputs
    return first_difference(came, plain), ((came - plain)[:17].abs().max() / plain[:17].abs().max()).item()


@pytest.mark.parametrize("max_bytes", [1 << 24, 1 << 15], ids=["one-chunk", "chunks"])
@pytest.mark.parametrize("float8", [False, True], ids=["plain-weights", "float8-weights"])
@pytest.mark.parametrize("name", CASES)
def test_quantized_rows_are_not_quantized_again(name: str, float8: bool, max_bytes: int) -> None:
    """To the bit for float8 weights. For others the interpreter rounds what the rows stand for in another way than a GPU does."""
    [(difference, error)] = run_ranks(both, 1, name, float8, 64, max_bytes, env=INTERPRETER, timeout_s=120)
    assert not difference or not float8
    assert error < 1.5e-2
