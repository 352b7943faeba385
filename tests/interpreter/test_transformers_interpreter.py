"""A transformers model over the symmetric transport: its kernels and the experts', interpreted, give the tokens of the unmodified
model."""

from pathlib import Path

import pytest
import torch

import tokenferry as tf
from tokenferry.testing import run_ranks
from tokenferry.testing.tiny_models import make_tiny
from transformers_work import Work, generate, load, quiet, unmodified

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs

WORK = (Work((5, 3), 4), Work((6,), 6))
RUNS = [
    ("qwen3_moe", False),
    ("gpt_oss", False),
    ("nemotron_h", False),
    ("deepseek_v3", False),
    ("llama4", False),
    ("llama4", True),
]
IN_MAKE_TEST = (("qwen3_moe", False), ("gpt_oss", False), ("llama4", True))
"""Our kernels' experts without and with biases, and transformers' own; the others are in the long tests."""
EACH_RUN = [
    pytest.param(*run, id=f"{run[0]}{'-exact' * run[1]}", marks=[] if run in IN_MAKE_TEST else [pytest.mark.long]) for run in RUNS
]


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[tuple[str, bool], list[tuple[float, int]]]:
    """On each rank the largest difference of logits, NaN where the tokens differ; and how many layers our kernels ran: of the
    runs that the selected tests ask for."""
    given = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    runs = [run for run in RUNS if {"family": run[0], "exact": run[1]} in given]
    folder = tmp_path_factory.mktemp("models")
    for family in {family for family, _ in runs}:
        make_tiny(family, folder / family)
    by_rank = run_ranks(run_all, 2, folder, runs, timeout_s=240, env={"TRITON_INTERPRET": "1"})
    return {run: [rank[number] for rank in by_rank] for number, run in enumerate(runs)}


@pytest.mark.parametrize(("family", "exact"), EACH_RUN)
def test_tokens_of_the_unmodified_model(family: str, exact: bool, found: dict[tuple[str, bool], list[tuple[float, int]]]) -> None:
    assert all(difference <= (0.0 if exact else 1e-4) for difference, _ in found[family, exact])


@pytest.mark.parametrize(("family", "exact"), EACH_RUN)
def test_whose_kernels_run_the_experts(family: str, exact: bool, found: dict[tuple[str, bool], list[tuple[float, int]]]) -> None:
    assert all((num_layers > 0) == (family != "llama4" and not exact) for _, num_layers in found[family, exact])


def run_all(group: tf.EPGroup, folder: Path, runs: list[tuple[str, bool]]) -> list[tuple[float, int]]:
    quiet()
    return [_run(group, folder / family, exact) for family, exact in runs]


def _run(group: tf.EPGroup, path: Path, exact: bool) -> tuple[float, int]:
    kwargs = {"attn_implementation": "eager"} if path.name == "gpt_oss" else {}
    model = load(path, group, exact=exact, transport="p2p", max_tokens_per_rank=12, dtype=torch.float32, **kwargs)
    assert model.expert_parallel.workspace.transport == "p2p"
    num_by_kernels = sum(layer.kernels is not None for layer in model.expert_parallel.layers)
    tokens, logits = generate(model, WORK[group.rank], group.rank)
    model.expert_parallel.finish()
    model.expert_parallel.close()
    expected, expected_logits = generate(unmodified(path, **kwargs), WORK[group.rank], group.rank)
    difference = max(float((a - b).abs().max()) for a, b in zip(logits, expected_logits, strict=True))
    return difference if tokens == expected else float("nan"), num_by_kernels


def compiled_as_eager(group: tf.EPGroup, path: Path) -> tuple[int, bool]:
    """How many layers our kernels run, and whether a compiled forward gives the logits of an eager one, before and after a
    reset, on a backend that works on copies of whatever an operator changes."""
    quiet()
    model = load(path, group, transport="p2p", max_tokens_per_rank=12, dtype=torch.float32)
    parallel = model.expert_parallel
    num_by_kernels = sum(layer.kernels is not None for layer in parallel.layers)
    ids = torch.arange(5, 5 + 3 * (group.rank + 1)).view(1, -1)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        equal = torch.equal(compiled(ids, use_cache=False).logits, expected)
        parallel.reset()
        equal = equal and torch.equal(compiled(ids, use_cache=False).logits, expected)
    parallel.close()
    return num_by_kernels, equal


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler uses what PyTorch deprecates
def test_compiled_it_is_the_same(tmp_path: Path) -> None:
    path = make_tiny("qwen3_moe", tmp_path)
    assert run_ranks(compiled_as_eager, 2, path, timeout_s=240, env={"TRITON_INTERPRET": "1"}) == [(2, True)] * 2
