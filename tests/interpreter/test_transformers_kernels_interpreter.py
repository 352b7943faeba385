"""Our expert kernels, interpreted, on the parameters of experts modules of transformers, layout by layout."""

import logging
from pathlib import Path

import pytest
import torch

import tokenferry as tf
from float8_checkpoint import dequantized, make_float8
from foreign_experts import FAMILIES, NUM_EXPERTS, TOPK, skip_what_is_newer, some_choices
from test_experts import gathered
from tokenferry.experts import ExpertScratch
from tokenferry.testing import run_ranks
from tokenferry.testing.tiny_models import make_tiny
from transformers_work import load, quiet, unmodified

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs

INTERPRETER = {"TRITON_INTERPRET": "1"}


def all_families(group: tf.EPGroup) -> dict[str, float]:
    """How far the sums are from those of the module's own function. Beyond V are NaNs, and numbers of local experts."""
    from tokenferry.integrations.transformers.kernel_experts import KernelExperts

    found = {}
    for name, family in FAMILIES.items():
        module = family.make()
        kernels = KernelExperts(module, range(NUM_EXPERTS), torch.float32)
        kernels.borrowed.prepare(ExpertScratch("cpu"), topk=TOPK, max_rows=16, out_dtypes=[torch.float32])
        hidden, idx, weights = some_choices()
        expected = module(hidden, idx, weights)
        rows = gathered(*(torch.cat([part, part[:5]]) for part in (hidden, idx.int(), weights)), num_valid=len(hidden))
        rows.hidden[len(hidden) :] = torch.nan
        rows.topk_weights[len(hidden) :] = torch.nan
        out = torch.full(rows.hidden.shape, 7.0)
        kernels(rows, out)
        written_beyond = bool((out[len(hidden) :] != 7.0).any())
        found[name] = (
            float("inf") if written_beyond else ((out[: len(hidden)] - expected).abs().max() / expected.abs().max()).item()
        )
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return run_ranks(all_families, 1, env=INTERPRETER)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_give_the_sums_of_the_models_own_function(name: str, found: dict[str, float]) -> None:
    skip_what_is_newer(name)
    assert found[name] < 1e-5


# --- which way a loaded model takes ---------------------------------------------------------------------------------------


def ways(group: tf.EPGroup, folder: Path) -> dict[str, tuple[int, list[str]]]:
    """Layers by our kernels, and what the log said, for each way of loading."""
    quiet()
    asked = {
        "mixtral": {},
        "mixtral grouped_mm": {"experts_implementation": "grouped_mm"},
        "mixtral batched_mm": {"experts_implementation": "batched_mm"},
        "mixtral exact": {"exact": True},
        "llama4": {},
    }
    found = {}
    for name, kwargs in asked.items():
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, said=said: said.append(record.getMessage())  # type: ignore[method-assign, misc]
        logger = logging.getLogger("tokenferry.integrations.transformers")
        logger.addHandler(handler)
        model = load(folder / name.split()[0], group, max_tokens_per_rank=8, **kwargs)
        logger.removeHandler(handler)
        layers = model.expert_parallel.layers
        found[name] = (sum(layer.kernels is not None for layer in layers), said)
        model.expert_parallel.close()
        assert all(layer.kernels is None for layer in layers), "a closed model keeps the scratch of its experts"
    return found


def test_the_log_says_once_why_the_models_own_function_runs(tmp_path: Path) -> None:
    for family in ("mixtral", "llama4"):
        make_tiny(family, tmp_path / family)
    [found] = run_ranks(ways, 1, tmp_path, env=INTERPRETER)
    assert found["mixtral"] == (2, [])
    assert found["mixtral grouped_mm"] == found["mixtral batched_mm"] == found["mixtral exact"] == (0, [])
    num_layers, [line] = found["llama4"]
    assert num_layers == 0
    assert "2 of 2 MoE layers run by transformers' own expert function: its experts take no choices" in line


# --- float8 checkpoints ---------------------------------------------------------------------------------------------------


def float8_layers(group: tf.EPGroup, float8: Path, plain: Path) -> dict[str, bool]:
    """What a rank holds of a float8 checkpoint. (Sums are compared on GPUs: the interpreter rounds float8 wrongly.)"""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    quiet()
    # without a GPU it would unpack the checkpoint
    FineGrainedFP8HfQuantizer.validate_environment = lambda *_, **__: None  # type: ignore[method-assign]
    model = load(float8, group, max_tokens_per_rank=8, transport="p2p")
    whole = unmodified(plain).model.layers
    owned = group.expert_range(4)
    held = {}
    for number, layer in enumerate(model.expert_parallel.layers):
        experts = whole[number].mlp.experts
        held[f"layer {number} by our kernels"] = layer.kernels is not None
        if layer.kernels is None:
            continue
        weights = layer.kernels.borrowed.weights
        held[f"layer {number} is float8"] = weights.up_proj.dtype == weights.down_proj.dtype == torch.float8_e4m3fn
        for which, expected in (("up", experts.gate_up_proj), ("down", experts.down_proj)):
            held[f"layer {number}, {which}"] = torch.equal(dequantized(weights, which), expected[owned.start : owned.stop])
    held["it runs"] = bool(model(torch.tensor([[5, 6, 7]])).logits.isfinite().all())
    model.expert_parallel.finish()
    model.expert_parallel.close()
    return held


def test_experts_of_a_float8_checkpoint_stay_float8(tmp_path: Path) -> None:
    for held in run_ranks(float8_layers, 2, *make_float8(tmp_path), env=INTERPRETER, timeout_s=120):
        assert all(held.values()), held
