"""Models of transformers whose rows travel as float8: nearly the logits of the unmodified model, and clear errors."""

from pathlib import Path

import pytest
import torch

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.testing.tiny_models import make_tiny
from transformers_work import Work, generate, load, prompts, quiet, unmodified

pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs

WORK = (Work((5, 17), 6), Work((21,), 6))


def logits_differ(group: tf.EPGroup, path: Path, settings: dict) -> list[float]:
    """How far the first logits are from the unmodified model's, as a part of their norm; then generates, and finishes."""
    quiet()
    model, plain = load(path, group, dispatch_format="fp8_block128", **settings), unmodified(path, dtype=torch.float32)
    ids = torch.tensor(prompts(WORK[group.rank].prompt_lengths[:1], group.rank))
    with torch.no_grad():
        got, wanted = model(ids).logits, plain(ids).logits
    tokens, _ = generate(model, WORK[group.rank], group.rank)
    model.expert_parallel.finish()
    assert [len(made) for made in tokens] == [6] * len(WORK[group.rank].prompt_lengths)
    return [((got - wanted).norm() / wanted.norm()).item()]


@pytest.mark.parametrize("experts", [None, "eager"], ids=["our-experts", "their-experts"])
def test_logits_are_near_those_of_the_unmodified_model(on_ranks: RankPools, tmp_path: Path, experts: str | None) -> None:
    path = make_tiny("qwen3_moe", tmp_path)
    for [error] in on_ranks(logits_differ, 2, path, {"experts_implementation": experts, "dtype": torch.float32}, timeout_s=200):
        assert 1e-3 < error < 0.2  # float8's three bits, through two layers of random weights


def refused(group: tf.EPGroup, path: Path, settings: dict) -> str:
    quiet()
    with pytest.raises(tf.ConfigError) as caught:
        load(path, group, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dispatch_format": "fp8_block128", "exact": True}, "exact=True and dispatch_format 'fp8_block128' exclude one another"),
        ({"dispatch_format": "bytes"}, "dispatch_format 'bytes' carries no hidden rows of a model"),
        ({"dispatch_format": "fp8"}, "dispatch_format must be a RowFormat or one of same, fp8_block128, bytes, got 'fp8'"),
    ],
    ids=["exact", "bytes", "unknown"],
)
def test_formats_that_a_model_cannot_have(on_ranks: RankPools, tmp_path: Path, settings: dict, said: str) -> None:
    path = make_tiny("qwen3_moe", tmp_path)
    assert on_ranks(refused, 1, path, settings, timeout_s=100)[0].startswith(said)
