"""Megatron-Core's own inference engine on two CPU ranks: the tokens that come out, on its own dispatcher and on ours."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine_harness import ENVIRONMENT, EngineOptions, Request, even, missing
from engine_harness.cases import EngineCase, Run, run_on_ranks
from engine_harness.variants import MEGATRON, Variant

pytestmark = [pytest.mark.ranks, pytest.mark.long, pytest.mark.skipif(bool(missing()), reason=missing())]

LOADS = {
    "even": even(2, new_tokens=4, prompt_tokens=16),
    "uneven-with-late-arrivals": [[Request(13 + 7 * i, 6 - i, 2 * i) for i in range(3)], [Request(5, 9, 1)]],
    "one-rank-idle": [[Request(13, 5)], []],
}
OURS = {"nccl": Variant("nccl"), "nvls": Variant("nvls")}
ALL = {"megatron": MEGATRON, **OURS}
SHARED = {"shared_expert_size": 32}
CASES = {
    "plain": EngineCase(EngineOptions(), LOADS, ALL, suspends=True),
    "shared-experts": EngineCase(EngineOptions(model=SHARED), LOADS, ALL),
    "shared-experts-overlap": EngineCase(EngineOptions(model=SHARED, config={"moe_shared_expert_overlap": True}), LOADS, ALL),
    "async-scheduling": EngineCase(EngineOptions(async_scheduling=True), LOADS, ALL),
    "mtp": EngineCase(EngineOptions(model={"num_mtp_layers": 1}), LOADS, OURS),
}
EXPERTS = replace(CASES["plain"], variants={f"{name}-experts": replace(variant, experts=True) for name, variant in OURS.items()})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder: Path = tmp_path_factory.mktemp("engines")
    cases = {**CASES, "experts": EXPERTS}
    settings = {"timeout_s": 20.0, "open_timeout_s": 60.0}
    return run_on_ranks(cases, folder, backend="gloo", environment=ENVIRONMENT, timeout_s=120.0, settings=settings)


@pytest.mark.parametrize("variant", OURS)
@pytest.mark.parametrize(("case", "load"), [(name, load) for name in CASES if name != "mtp" for load in CASES[name].load_names])
def test_tokens_are_megatrons(run: Run, case: str, variant: str, load: str) -> None:
    assert run.differences(case, variant, load, (case, "megatron")) == {}
    assert sum(outcome.num_tokens for outcome in run.outcomes(case, variant, load)) > 4


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("variant", OURS)
def test_multi_token_prediction_gives_the_tokens_of_plain_decoding(run: Run, variant: str, load: str) -> None:
    """Megatron's own NCCL class ends such a run with an error about shapes."""
    assert run.differences("mtp", variant, load, ("plain", "megatron")) == {}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("variant", EXPERTS.variants)
def test_tokens_with_our_experts(run: Run, variant: str, load: str) -> None:
    """On CPUs both are the same function, since Megatron's own kernels do not run there."""
    assert run.differences("experts", variant, load, ("plain", "megatron")) == {}


def test_idle_rank_takes_part(run: Run) -> None:
    busy, idle = run.outcomes("plain", "nvls", "one-rank-idle")
    assert idle.kinds() == {"dummy": len(busy.steps)}
    assert busy.kinds() == {"decode": 4, "prefill": 1}
