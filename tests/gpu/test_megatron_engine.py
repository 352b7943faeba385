"""Megatron-Core's own inference engine on two GPUs, decode steps in CUDA graphs: on its own dispatcher and on ours, the tokens.

All engines are built one after another in one start of two rank processes; the tests look at what came out. A greedy choice
shows other bits only where the best two tokens are close, so equal tokens are asked for where the bits are to be equal, and
where they are not (our experts round elsewhere; other graphs have other products) a small share of other choices is allowed.
"""

import itertools
from pathlib import Path

import pytest
import torch

from engine_harness import GPU_ENVIRONMENT, EngineOptions, Outcome, Request, even, missing
from engine_harness.attention_cases import EQUAL, MIXED, AttentionCase, check_equal, check_mixed
from engine_harness.cases import EngineCase, Run, run_on_ranks
from engine_harness.variants import MEGATRON, Variant
from ranks.test_megatron_example import LENGTHS, lengths, run_example

two_gpus = pytest.mark.gpu(count=2)
with_megatron = pytest.mark.skipif(bool(missing()), reason=missing())

LIMIT_S = 270.0
OTHER_CHOICES = 0.15
"""Allowed share of choices that differ behind equal tokens, where roundings differ. Broken experts differ in nearly all."""

UNEVEN = [[Request(37 + 61 * i, 24 - 2 * i, 2 * i) for i in range(7)], [Request(11 + 5 * i, 36 - i, 5 * i) for i in range(3)]]
"""Other lengths, numbers and ends on each rank; requests arrive while others are decoded; one rank is idle at the end."""
MANY = {
    f"uneven-{seed}": [
        [Request(20 + 7 * seed + 9 * i, 60 - i, 2 * i) for i in range(18)],
        [Request(11 + 5 * seed + 3 * i, 72 - 2 * i, 11 * i) for i in range(4)],
    ]
    for seed in range(3)
}
"""Loads that are long enough for the large model to choose between close tokens now and then."""
EVEN = {"even-1": even(1), "even-8": even(8), "even-32": even(32)}
IDLE = {"one-rank-idle": [[Request(50, 24), Request(70, 24)], []]}
LONG = {"prompts-of-700": [[Request(700 - 64 * (i % 3) - 16 * rank, 6, i) for i in range(4)] for rank in range(2)]}
SHORT = {"even-8": EVEN["even-8"], "uneven": UNEVEN}

OURS = {"nccl": Variant("nccl"), "nvls": Variant("nvls")}
BARE = {"megatron": MEGATRON, **OURS}
EXPERTS = {f"{name}-experts": Variant(name, experts=True) for name in OURS}
NVLS_EXPERTS = {"nvls-experts": EXPERTS["nvls-experts"]}
MODEL = {
    "num_layers": 4, "hidden_size": 256, "num_heads": 4, "num_query_groups": 2, "expert_size": 128, "num_experts": 16, "topk": 4,
    "vocab_size": 1024,
}  # fmt: skip
LARGE = {
    "num_layers": 8, "hidden_size": 2048, "num_heads": 16, "num_query_groups": 4, "expert_size": 768, "num_experts": 64,
    "topk": 8, "vocab_size": 32000,
}  # fmt: skip
SHARED = {**MODEL, "shared_expert_size": 128}
OVERLAP = {"moe_shared_expert_overlap": True}


def options(**changes) -> EngineOptions:
    sizes = {"max_requests": 32, "max_tokens": 2048, "page_tokens": 64, "buffer_gb": 0.25, "graph_scope": "block", "model": MODEL}
    return EngineOptions(**{**sizes, **changes})


CASES = {
    "block-graphs": EngineCase(options(), {**EVEN, "uneven": UNEVEN, **IDLE, **LONG}, {**BARE, **EXPERTS}, suspends=True),
    "equal-graphs": EngineCase(options(), {"uneven": UNEVEN, **IDLE}, {"nvls": OURS["nvls"]}, equal_graphs=True),
    "large": EngineCase(options(model=LARGE), MANY, {"megatron": MEGATRON, "nvls": OURS["nvls"]}),
    "large-equal-graphs": EngineCase(options(model=LARGE), MANY, {"nvls": OURS["nvls"]}, equal_graphs=True),
    "no-graphs": EngineCase(options(graph_scope="none"), {"uneven": UNEVEN, **IDLE}, BARE),
    "layer-graphs": EngineCase(options(graph_scope="layer"), SHORT, BARE),
    "graphs-for-prefill-too": EngineCase(options(mixed_prefill_graphs=True, num_graphs=4), SHORT, {"nvls": OURS["nvls"]}),
    "shared-experts": EngineCase(options(model=SHARED), SHORT, BARE),
    "overlap-block-graphs": EngineCase(options(model=SHARED, config=OVERLAP), SHORT, {**BARE, **NVLS_EXPERTS}),
    "async-scheduling": EngineCase(options(async_scheduling=True), {"even-8": EVEN["even-8"]}, BARE),
    "mtp": EngineCase(options(model={**MODEL, "num_mtp_layers": 1}), SHORT, {**OURS, **NVLS_EXPERTS}),
    "overlap-layer-graphs": EngineCase(options(model=SHARED, config=OVERLAP, graph_scope="layer"), SHORT, BARE),
}

UNEVEN_GRAPHS = ("one-rank-idle", "uneven", *MANY)
"""Loads in which ranks replay graphs of different sizes with the type "nvls"; with "nccl" all take the largest."""


EQUAL_GRAPHS_OF = {"block-graphs": "equal-graphs", "large": "large-equal-graphs"}
UNEVEN_CASES = [(case, load) for case, equal in EQUAL_GRAPHS_OF.items() for load in CASES[equal].loads]


def rows_of_graphs(outcomes: list[Outcome]) -> list[list[int]]:
    """Of each rank's steps in graphs, in their order."""
    return [[step.padded_tokens for step in outcome.steps if step.in_graph] for outcome in outcomes]


def combinations(variants: dict[str, Variant]) -> list[tuple[str, str, str]]:
    """Case, variant and load, for the cases that Megatron's own dispatcher runs too."""
    return [
        (name, variant, load)
        for name, case in CASES.items()
        if "megatron" in case.variants
        for variant, load in itertools.product(variants, case.load_names)
        if variant in case.variants
    ]


def is_uneven_in_graphs(case: str, variant: str, load: str) -> bool:
    return CASES[case].options.graph_scope != "none" and variant.startswith("nvls") and load in UNEVEN_GRAPHS


EQUAL_TOKENS = [each for each in combinations(OURS) if not is_uneven_in_graphs(*each)]
NEARLY = [each for each in combinations(OURS) if is_uneven_in_graphs(*each)] + combinations(EXPERTS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = {"timeout_s": 20.0, "open_timeout_s": 60.0}
    folder: Path = tmp_path_factory.mktemp("engines")
    return run_on_ranks(CASES, folder, backend="nccl", environment=GPU_ENVIRONMENT, timeout_s=LIMIT_S, settings=settings)


@two_gpus
@with_megatron
@pytest.mark.timeout(LIMIT_S + 60.0)
@pytest.mark.parametrize(("case", "variant", "load"), EQUAL_TOKENS, ids=map("-".join, EQUAL_TOKENS))
def test_tokens_are_megatrons(case: str, variant: str, load: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue("run")  # so that a skipped test does not start ranks
    assert run.differences(case, variant, load, (case, "megatron")) == {}
    assert sum(outcome.num_tokens for outcome in run.outcomes(case, variant, load)) >= 40


@two_gpus
@with_megatron
@pytest.mark.parametrize(("case", "variant", "load"), NEARLY, ids=map("-".join, NEARLY))
def test_choices_are_nearly_megatrons(case: str, variant: str, load: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue("run")
    assert run.share_of_other_choices(case, variant, load, (case, "megatron")) <= OTHER_CHOICES


@two_gpus
@with_megatron
@pytest.mark.parametrize(("case", "load"), UNEVEN_CASES, ids=map("-".join, UNEVEN_CASES))
def test_uneven_ranks_in_equal_graphs_give_megatrons_tokens(case: str, load: str, request: pytest.FixtureRequest) -> None:
    """With the type "nvls" a rank takes the smallest graph that holds its own rows, and products of another number of rows may
    sum in another order. In a trial on two H100 one or two of ten requests parted so from Megatron's, which takes the largest
    graph of all ranks; on two H200 none parted in these loads. Where all ranks take one size, tokens must be equal anywhere."""
    run: Run = request.getfixturevalue("run")
    equal = EQUAL_GRAPHS_OF[case]
    assert run.differences(equal, "nvls", load, (case, "megatron")) == {}
    if load != "one-rank-idle":  # where the only rank that has rows takes its own graph in any case
        own, forced = (run.outcomes(name, "nvls", load) for name in (case, equal))
        assert rows_of_graphs(own) != rows_of_graphs(forced), "the ranks took graphs of equal size anyway: nothing was shown"


@two_gpus
@with_megatron
@pytest.mark.parametrize("load", SHORT)
@pytest.mark.parametrize("variant", CASES["mtp"].variants)
def test_multi_token_prediction_chooses_as_plain_decoding(variant: str, load: str, request: pytest.FixtureRequest) -> None:
    """Megatron's own NCCL class ends such a run with an error about shapes."""
    run: Run = request.getfixturevalue("run")
    assert run.share_of_other_choices("mtp", variant, load, ("block-graphs", "megatron")) <= OTHER_CHOICES


@two_gpus
@with_megatron
@pytest.mark.parametrize("load", SHORT)
def test_graphs_for_prefill_too(load: str, request: pytest.FixtureRequest) -> None:
    """A graph of another size than the eager prefill of the engines before, so other products."""
    run: Run = request.getfixturevalue("run")
    wanted = ("block-graphs", "megatron")
    assert run.share_of_other_choices("graphs-for-prefill-too", "nvls", load, wanted) <= OTHER_CHOICES
    kinds = [outcome.kinds() for outcome in run.outcomes("graphs-for-prefill-too", "nvls", load)]
    assert all("prefill in graph" in each for each in kinds), kinds


@two_gpus
@with_megatron
@pytest.mark.parametrize("variant", {**BARE, **EXPERTS})
def test_decode_steps_replay_graphs(variant: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue("run")
    kinds = [outcome.kinds() for outcome in run.outcomes("block-graphs", variant, "even-8")]
    assert kinds == [{"decode in graph": 23, "prefill": 1}] * 2


@two_gpus
@with_megatron
def test_example() -> None:
    assert lengths(run_example()) == LENGTHS


# --- the stand-in for flash-attn ---------------------------------------------------------------------------------------


@pytest.mark.gpu(count=1)
@pytest.mark.parametrize("name", [*MIXED, *EQUAL])
def test_paged_attention(name: str) -> None:
    case: AttentionCase = {**MIXED, **EQUAL}[name]
    (check_mixed if name in MIXED else check_equal)(case, torch.bfloat16, "cuda", 2e-2)
