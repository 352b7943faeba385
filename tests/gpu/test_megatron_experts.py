"""Megatron-Core's fused experts and ours in their place, on a GPU: against float64 and against one another, in graphs too."""

import importlib.util
import warnings
from typing import Any

import pytest
import torch

import tokenferry as tf
from fake_megatron import place_fake_megatron
from megatron_experts_work import TOLERANCE, Call, error, in_float64, make_call, with_valid
from tokenferry.integrations import megatron
from tokenferry.integrations.megatron.known_versions import EXPERT_ENTRIES
from tokenferry.testing import run_ranks
from tokenferry.testing.numeric import same_bits

pytestmark = pytest.mark.gpu(count=1)

ROWS = 4096
COUNTS = (0, 1, 2, 16, 64, 65, 128, 512, ROWS)
"""Valid rows. An expert gets about V / 4 of them."""
SHAPE = {"num_rows": ROWS, "hidden_size": 256, "intermediate_size": 192, "topk": 4, "num_local": 8, "num_experts": 16}
ODD = {**SHAPE, "hidden_size": 136, "intermediate_size": 72}
"""Sizes that no tile divides."""
KINDS = ("squared_relu", "swiglu")


def calls(kind: str, shape: dict[str, int] | None = None) -> dict[int, Call]:
    full = make_call(valid=ROWS, gated=kind == "swiglu", device="cuda", **(shape or SHAPE))
    return {valid: with_valid(full, valid) for valid in COUNTS}


def rms_error(out: torch.Tensor, call: Call, kind: str) -> float:
    valid = int(call.valid)
    return 0.0 if not valid else (out[:valid].double() - in_float64(call, kind)).square().mean().sqrt().item()


# --- ours alone -------------------------------------------------------------------------------------------------------


def run_ours(group: tf.EPGroup) -> dict[str, Any]:
    """Through `install()`, with a stand-in for Megatron that answers with a text."""
    modules, found = place_fake_megatron(), {}
    entries, kinds = modules[EXPERT_ENTRIES], modules[EXPERT_ENTRIES].ActivationType
    with megatron.install(experts=True) as installation:
        for kind in KINDS:
            for name, shape in (("", SHAPE), (" odd", ODD)):
                errors, untouched = [], True
                for valid, call in calls(kind, shape).items():
                    out = torch.full(call.hidden.shape, 7.0, device="cuda")
                    entries.vllm_fused_moe(**call.arguments(kinds(kind)), out=out, num_tokens_hint=1)
                    errors.append(error(out, call, kind))
                    untouched &= bool((out[valid:] == 7.0).all())
                found[f"{kind}{name}"] = (max(errors), untouched)
            found[f"graph {kind}"] = graph_replays(entries, kinds(kind), calls(kind))
        found["decisions"] = installation.experts.decisions
        held = installation.experts.nbytes
    return {**found, "nbytes": (held, installation.experts.nbytes)}


def graph_replays(entries: Any, kind: Any, by_count: dict[int, Call]) -> list[int]:
    """Valid rows for which one graph, captured at another number of them, gives other bits than an eager call."""
    live = with_valid(by_count[ROWS], 16)
    out = torch.full(live.hidden.shape, 7.0, device="cuda")

    def work() -> None:
        entries.vllm_fused_moe(**live.arguments(kind), out=out, num_tokens_hint=16)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    wrong = []
    for valid, call in by_count.items():
        for name in ("hidden", "probs", "routing", "valid"):
            getattr(live, name).copy_(getattr(call, name))
        out.fill_(7.0)
        graph.replay()
        replayed = out.clone()
        out.fill_(7.0)
        work()
        wrong += [] if same_bits(replayed, out) else [valid]
    return wrong


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    return run_ranks(run_ours, 1, backend="nccl", timeout_s=150.0)[0]


@pytest.mark.parametrize("shape", ["", " odd"], ids=["tiles-divide", "no-tile-divides"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_valid_rows_is_within_the_tolerance_of_float64(ours, kind: str, shape: str) -> None:
    assert ours[f"{kind}{shape}"][0] <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_the_valid_ones_are_not_written(ours, kind: str) -> None:
    assert ours[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_has_an_eager_calls_bits_at_other_counts(ours, kind: str) -> None:
    assert ours[f"graph {kind}"] == []


def test_ours_served_and_its_scratch_was_freed(ours) -> None:
    assert all("tokenferry's fused_moe serves" in text for text in ours["decisions"])
    held, after = ours["nbytes"]
    assert held > 0 and after == 0


# --- beside megatron-core's own -----------------------------------------------------------------------------------------


def run_beside(group: tf.EPGroup) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    from megatron.core.inference.moe import ActivationType, vllm_fused_moe
    from megatron.core.transformer.custom_layers import batch_invariant_kernels
    from megatron.core.transformer.moe import experts

    kinds = [kind for kind in KINDS if kind in {each.value for each in ActivationType}]
    found: dict[str, Any] = {"kinds": kinds}
    with megatron.install(experts=True) as installation:
        for kind in kinds:
            rows = []
            for valid, call in calls(kind).items():
                arguments = {**call.arguments(ActivationType(kind)), "num_tokens_hint": max(valid, 1)}
                theirs, own = vllm_fused_moe(**arguments), experts.vllm_fused_moe(**arguments)
                assert theirs.dtype == own.dtype == torch.float32
                rows.append((valid, *(rms_error(out, call, kind) for out in (theirs, own)), error(own, call, kind)))
            found[kind] = rows
        decided = len(installation.experts.decisions)
        batch_invariant_kernels._batch_invariant_MODE = True
        try:
            call = calls("squared_relu")[64]
            experts.vllm_fused_moe(**call.arguments(ActivationType.SQUARED_RELU), num_tokens_hint=64)
        finally:
            batch_invariant_kernels._batch_invariant_MODE = False
        found["batch-invariant"] = installation.experts.decisions[decided:]
    return found


with_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed (its wheel needs Python 3.12)"
)


@pytest.fixture(scope="module")
def beside() -> dict[str, Any]:
    return run_ranks(run_beside, 1, backend="nccl", timeout_s=200.0, env={"NO_VCS_VERSION": "1"})[0]


@with_megatron
@pytest.mark.parametrize("kind", KINDS)
def test_ours_is_no_farther_from_float64_than_megatrons(beside, kind: str) -> None:
    """Root mean squares over all numbers of a call: both round activated rows and outputs to bfloat16, and no more often."""
    if kind not in beside["kinds"]:
        pytest.skip(f"this megatron-core's experts have no {kind}: 0.20 is the first with SwiGLU")
    for valid, theirs, own, worst in beside[kind]:
        assert own <= 1.1 * theirs, f"V={valid}: {own:.2e} against {theirs:.2e}"
        assert worst <= TOLERANCE


@with_megatron
def test_its_batch_invariant_mode_keeps_its_own_experts(beside) -> None:
    [decision] = beside["batch-invariant"]
    assert "Megatron's own vllm_fused_moe serves, since its batch-invariant mode" in decision
