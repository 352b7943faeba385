"""Tiny models of transformers between rank processes on gloo: the tokens of the unmodified model, and clear errors.

Starting a process and importing transformers take longer than generating, so each fixture starts its ranks once and runs all
families in them; each test then looks at the results of one family.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from tokenferry.testing import run_ranks
from tokenferry.testing.tiny_models import FAMILIES, make_tiny
from transformers_work import Work, generate, generate_batch, load, quiet, unmodified

pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs

NO_CONTINUOUS_BATCHING = {  # with the unmodified model either
    "deepseek_v2": "transformers' paged cache takes keys of width head_dim, and latent attention has wider ones",
    "deepseek_v3": "transformers' paged cache takes keys of width head_dim, and latent attention has wider ones",
    "llama4": "transformers' paged cache knows no chunked attention",
    "nemotron_h": "transformers' paged cache knows layers with attention only",
}


@dataclass(frozen=True)
class Run:
    """One model on some ranks, compared with the unmodified model in each rank's own process."""

    family: str
    work: tuple[Work, ...]
    dtype: torch.dtype = torch.float32
    exact: bool = False
    batched: bool = False
    """Through generate_batch()."""
    in_process_group: bool = False
    """With a default process group, as under torchrun, whose ranks share the experts."""

    @property
    def is_long(self) -> bool:
        """Four ranks, and families whose layers or way of generating differ from another's in nothing of ours."""
        is_first = self.family in ("qwen3_moe", "gpt_oss", "llama4")
        has_layers_of_its_own = is_first or self.family in ("deepseek_v3", "nemotron_h")
        is_alike = not is_first and (self.batched or self.dtype == torch.bfloat16)
        return len(self.work) == 4 or is_alike or not has_layers_of_its_own

    @property
    def name(self) -> str:
        way = "batch" if self.batched else "generate"
        kind = f"{self.family}-{str(self.dtype)[6:]}{'-exact' * self.exact}-{way}"
        return f"EP{len(self.work)}-{kind}{'-process-group' * self.in_process_group}"


@dataclass(frozen=True)
class Outcome:
    """What a rank saw."""

    tokens: list[list[int]] = field(default_factory=list)
    expected: list[list[int]] = field(default_factory=list)
    logit_difference: float = 0.0
    num_layers: int = 0
    num_local_experts: int = 0
    error: str = ""


ASKED_FOR = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4")
UNEVEN = (Work((5, 17, 9), 8), Work((21,), 12))
ONE_IDLE = (Work((3, 3), 4), Work(), Work((26,), 8), Work((9, 4), 6))
RUNS = [
    *(Run(family, UNEVEN) for family in FAMILIES),
    *(Run(family, UNEVEN, exact=True) for family in ("qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "nemotron_h")),
    *(Run(family, UNEVEN, torch.bfloat16, exact=True) for family in ASKED_FOR),
    *(Run(family, UNEVEN, torch.bfloat16) for family in ("qwen3_moe", "gpt_oss")),
    *(Run(family, (*UNEVEN, Work())) for family in ("qwen3_moe", "gpt_oss", "llama4", "mixtral", "glm4_moe")),
    *(Run(family, ONE_IDLE) for family in ASKED_FOR),
    *(Run(family, UNEVEN, batched=True) for family in FAMILIES if family not in NO_CONTINUOUS_BATCHING),
    Run("llama4", (*UNEVEN, Work()), torch.bfloat16, exact=True),
    Run("qwen3_moe", UNEVEN, torch.bfloat16, exact=True, batched=True),
    Run("gpt_oss", ONE_IDLE, batched=True),
    Run("qwen3_moe", (UNEVEN[0], Work()), in_process_group=True),
    Run("qwen3_moe", (UNEVEN[0], Work()), batched=True, in_process_group=True),
    Run("mixtral", (Work((5, 8), 6),)),
]


def param(run: Run) -> Any:
    return pytest.param(run, id=run.name, marks=[pytest.mark.long] if run.is_long else [])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_tiny(family, folder / family)
    return folder


@pytest.fixture(scope="module")
def outcomes(models: Path, request: pytest.FixtureRequest) -> Callable[[Run], list[Outcome]]:
    """The outcomes of a run by rank. All that the selected tests ask for, with as many ranks, are made at the first question."""
    done: dict[Run, list[Outcome]] = {}
    selected = {item.callspec.params["run"] for item in request.session.items if item.path == request.path}

    def of(run: Run) -> list[Outcome]:
        if run not in done:
            alike = [other for other in RUNS if other in selected and len(other.work) == len(run.work)]
            by_rank = run_ranks(run_all, len(run.work), alike, models, timeout_s=240)
            done.update((other, list(outcomes)) for other, outcomes in zip(alike, zip(*by_rank, strict=True), strict=True))
        return done[run]

    return of


@pytest.mark.parametrize("run", [param(run) for run in RUNS])
def test_tokens_of_the_unmodified_model(run: Run, outcomes: Callable[[Run], list[Outcome]]) -> None:
    for work, outcome in zip(run.work, outcomes(run), strict=True):
        assert not outcome.error, outcome.error
        assert [len(tokens) for tokens in outcome.tokens] == [work.new_tokens] * len(work.prompt_lengths)
        assert outcome.tokens == outcome.expected
        assert outcome.num_layers > 0
        # float32 sums in another order. An expert's output that is off by a thousandth moves logits by more, but few tokens
        assert run.dtype != torch.float32 or outcome.logit_difference < 1e-4


@pytest.mark.parametrize("run", [param(run) for run in RUNS if run.exact and not run.batched])
def test_exact_mode_gives_the_logits_of_the_unmodified_model(run: Run, outcomes: Callable[[Run], list[Outcome]]) -> None:
    assert [outcome.logit_difference for outcome in outcomes(run)] == [0.0] * len(run.work)


@pytest.mark.parametrize("run", [run for run in RUNS if len(run.work) == 3], ids=lambda run: run.name)
def test_experts_that_do_not_divide_by_the_ranks(run: Run, outcomes: Callable[[Run], list[Outcome]]) -> None:
    held = [outcome.num_local_experts for outcome in outcomes(run)]
    assert held in ([3, 3, 2], [2, 1, 1])


# --- workers --------------------------------------------------------------------------------------------------------


def run_all(group: tf.EPGroup, runs: list[Run], models: Path) -> list[Outcome]:
    quiet()
    return [_run_in_process_group(group, run, models) if run.in_process_group else _run(group, run, models) for run in runs]


def _run_in_process_group(group: tf.EPGroup, run: Run, models: Path) -> Outcome:
    store = dist.PrefixStore(group.unique_name("process-group"), group.store)
    dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size)
    try:
        return _run(tf.EPGroup(dist.group.WORLD), run, models)
    finally:
        dist.destroy_process_group()


def _run(group: tf.EPGroup, run: Run, models: Path) -> Outcome:
    work, path = run.work[group.rank], models / run.family
    make = generate_batch if run.batched else generate
    kwargs = {"dtype": run.dtype} | ({"attn_implementation": "eager"} if run.family == "gpt_oss" else {})
    try:
        expected, expected_logits = make(unmodified(path, **kwargs), work, group.rank)
        model = load(path, group, exact=run.exact, **kwargs)
        try:
            tokens, logits = make(model, work, group.rank)
            model.expert_parallel.finish()
            return Outcome(
                tokens=tokens,
                expected=expected,
                logit_difference=max(
                    (float((a - b).abs().max()) for a, b in zip(logits, expected_logits, strict=True)), default=0.0
                ),
                num_layers=len(model.expert_parallel.layers),
                num_local_experts=model.expert_parallel.num_local_experts,
            )
        finally:
            model.expert_parallel.close()
    except Exception:
        return Outcome(error=traceback.format_exc())
