"""Megatron-Core's dispatchers between rank processes on gloo: rows exact, sums the bits of the reference."""

import pytest

import tokenferry as tf
from megatron_scenarios import SCENARIOS, run_expert_tensor_parallel, run_layer_alone_and_in_a_crowd, run_scenarios
from megatron_work import NCCL_CASES, NVLS, NVLS_CASES, Case, Shape, run_alone, run_nccl, run_nvls
from tokenferry.integrations import megatron
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("case", NVLS_CASES.values(), ids=NVLS_CASES)
def test_nvls_round_trips(case: Case) -> None:
    assert run_ranks(run_nvls, case.shape.ep, case) == [len(case.steps)] * case.shape.ep


@pytest.mark.parametrize("case", NCCL_CASES.values(), ids=NCCL_CASES)
def test_nccl_round_trips(case: Case) -> None:
    assert run_ranks(run_nccl, case.shape.ep, case) == [len(case.steps)] * case.shape.ep


def run_nvls_on_kernels(group: tf.EPGroup, case: Case) -> str:
    megatron.configure(transport="p2p")
    run_nvls(group, case)
    return NVLS._symm_rsv["handle"].transport


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case",
    [Case(Shape(2), ((3, 1), (0, 8), (0, 0))), Case(Shape(3, topk=3, hidden_size=12), ((8, 0, 1), (1, 2, 3)), aliased=False)],
    ids=["EP2", "EP3-K3-H12"],
)
def test_nvls_round_trips_on_the_symmetric_kernels(case: Case) -> None:
    """No multicast, an EP size that is no power of two, and odd K: the original has none of them."""
    transports = run_ranks(run_nvls_on_kernels, case.shape.ep, case, env={"TRITON_INTERPRET": "1"})
    assert transports == ["p2p"] * case.shape.ep


def test_group_of_one_process() -> None:
    assert run_ranks(run_alone, 1) == [[5, 0, 5]]


def test_rows_travel_between_all_shards_of_an_expert() -> None:
    run_ranks(run_expert_tensor_parallel, 4)


def test_a_tokens_bits_do_not_depend_on_the_batch() -> None:
    alone, *crowded = run_ranks(run_layer_alone_and_in_a_crowd, 3, "torch")[0]
    assert crowded == [alone, alone]


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, str]]:
    return run_ranks(run_scenarios, 2)


@pytest.mark.parametrize("name", SCENARIOS)
def test_between_two_ranks(name: str, outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(name, "not run: one before it failed") == "", f"rank {rank}: {outcome.get(name)}"
