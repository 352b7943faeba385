"""The Triton kernel of the stand-in for flash-attn."""

import pytest
import torch

import tokenferry as tf
from engine_harness import attention_kernel
from engine_harness.attention_cases import EQUAL, MIXED, PAD_TOKENS, wanted
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter


def largest_error(_group: tf.EPGroup, name: str) -> float:
    case = {**MIXED, **EQUAL}[name]
    made, scale = case.make(torch.float32, "cpu"), case.width**-0.5
    arguments = made["q"], made["k"], made["v"]
    if name in MIXED:
        got = attention_kernel.launch(*arguments, made["new"], made["keys"], made["pages"], scale, 0)
    else:
        rows = made["q"][:-PAD_TOKENS]
        got = attention_kernel.launch(rows, *arguments[1:], None, made["keys"].diff(), made["pages"], scale, case.requests[0][0])
    return (got.double() - wanted(made, case)[: got.shape[0]]).abs().max().item()


def largest_errors(group: tf.EPGroup) -> dict[str, float]:
    return {name: largest_error(group, name) for name in (*MIXED, *EQUAL)}


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return run_ranks(largest_errors, 1, env={"TRITON_INTERPRET": "1"})[0]


@pytest.mark.parametrize("name", [*MIXED, *EQUAL])
def test_paged_attention(errors: dict[str, float], name: str) -> None:
    assert errors[name] < 1e-5


@pytest.mark.parametrize(
    ("width", "page", "message"), [(24, 16, "head width 24"), (16, 48, "pages of 48")], ids=["head-width", "page"]
)
def test_sizes_that_are_no_powers_of_two_are_refused(width: int, page: int, message: str) -> None:
    q, cache = torch.zeros(1, 2, width), torch.zeros(1, page, 1, width)
    counts = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        attention_kernel.launch(q, cache, cache, counts, counts, torch.zeros(1, 1, dtype=torch.int32), 1.0, 0)
