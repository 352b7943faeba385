"""The router on a GPU: its kernel against PyTorch's operators on the CPU, in graphs, and the 16-bit units' float32 logits."""

import pytest
import torch

from routes import CASES, Routes, example, hostile
from test_router import DEEPSEEK, config
from tokenferry.router import Router

pytestmark = pytest.mark.gpu(count=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_chooses_and_weighs_as_the_operators_do(case: Routes) -> None:
    assert case.error("cuda") == ""


def test_hostile_rows_get_valid_experts_each_once() -> None:
    assert [name for name, held in hostile("cuda").items() if not held] == []


def test_the_worked_example() -> None:
    weights, idx, renormalised = example("cuda")
    assert idx == [[1, 3]]
    assert weights == [pytest.approx([0.5, 0.25])]
    assert renormalised == [pytest.approx([2 / 3, 1 / 3])]


@pytest.mark.parametrize("rows", [1, 3, 64, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_float32_logits_of_16_bit_rows_are_float32_sums(rows: int, bias: bool) -> None:
    router = Router(config(64, 4, hidden_size=2048, score_function="sigmoid", linear_bias=bias), device="cuda")
    if bias:
        router.bias.normal_()
    hidden = torch.randn(rows, 2048, device="cuda").bfloat16()
    logits = hidden.double() @ router.weight.double().t() + (router.bias.double() if bias else 0)
    weights, idx = router(hidden)
    expected = logits.sigmoid().gather(1, idx.long())
    assert float((weights.double() - expected).abs().max()) < 2e-6
    assert bool((expected.min(1).values >= logits.sigmoid().topk(4, 1).values.min(1).values - 2e-6).all())


def test_a_graph_routes_what_comes_later() -> None:
    router = Router(config(16, 4, hidden_size=64, **DEEPSEEK), device="cuda")
    hidden = torch.randn(5, 64, device="cuda").bfloat16()
    router(hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = router(hidden)
    hidden.normal_()
    graph.replay()
    assert all(torch.equal(got, want) for got, want in zip(captured, router(hidden), strict=True))


@pytest.mark.parametrize("float32_logits", [False, True])
def test_a_prepared_router_gives_the_same_bits(float32_logits: bool) -> None:
    """Of few rows by the kernel that it has loaded, of more by the library."""
    rules = config(64, 4, hidden_size=2880, linear_bias=True, float32_logits=float32_logits)
    router = Router(rules, device="cuda")
    router.bias.normal_()
    batches = [torch.randn(rows, 2880, device="cuda").bfloat16() for rows in (1, 7, 64, 65)]
    before = [router(hidden) for hidden in batches]
    router.prepare(torch.bfloat16)
    for hidden, expected in zip(batches, before, strict=True):
        assert all(torch.equal(got, want) for got, want in zip(router(hidden), expected, strict=True))
