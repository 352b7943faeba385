"""Models of transformers whose rows or terms travel as float8: nearly the logits of the unmodified model, and clear errors."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.dispatched import FLOAT8
from tokenferry.testing.tiny_models import make_tiny
from transformers_work import Work, generate, generate_batch, load, prompts, quiet, unmodified

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.filterwarnings("default"),  # transformers warns of its own affairs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's compiler uses what PyTorch deprecates
]

WORK = (Work((5, 17), 6), Work((21,), 6))
SMALL = (Work((3,), 2), Work((2,), 3))
"""For interpreted kernels."""
FORMATS: dict[str, dict[str, Any]] = {
    "rows": {"dispatch_format": "fp8_block128"},
    "terms": {"combine_dtype": FLOAT8},
    "rows-and-terms": {"dispatch_format": "fp8_block128", "combine_dtype": FLOAT8},
}


def logits_differ(group: tf.EPGroup, path: Path, settings: dict[str, Any], works: tuple[Work, Work] = WORK) -> list[float]:
    """How far the first logits are from the unmodified model's, as a part of their norm; and those of a compiled forward from
    an eager one's. Then generates, in both ways, and finishes."""
    quiet()
    model = load(path, group, **{"dtype": torch.float32, **settings})
    plain = unmodified(path, dtype=torch.float32)
    work = works[group.rank]
    ids = torch.tensor(prompts(work.prompt_lengths[:1], group.rank))
    with torch.no_grad():
        got, wanted = model(ids).logits, plain(ids).logits
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    for call in (generate, generate_batch):
        tokens, _ = call(model, work, group.rank)
        model.expert_parallel.finish()
        assert [len(each) for each in tokens] == [work.new_tokens] * len(work.prompt_lengths)
    model.expert_parallel.close()
    return [((each - against).norm() / wanted.norm()).item() for each, against in ((got, wanted), (compiled, expected))]


NEAR = 0.2
"""float8's three bits, through two layers of random weights."""


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.long) for name in ("rows", "terms")), "rows-and-terms"])
def test_logits_are_near_those_of_the_unmodified_model(on_ranks: RankPools, tmp_path: Path, name: str) -> None:
    path = make_tiny("qwen3_moe", tmp_path)
    for error, compiled in on_ranks(logits_differ, 2, path, {"transport": "collective", **FORMATS[name]}, timeout_s=200):
        assert 1e-3 < error < NEAR
        assert compiled == 0


@pytest.mark.interpreter
@pytest.mark.parametrize("experts", [None, pytest.param("eager", marks=pytest.mark.long)], ids=["our-experts", "their-experts"])
def test_logits_over_symmetric_memory(on_ranks: RankPools, tmp_path: Path, experts: str | None) -> None:
    """The gathered tensors are longer than transformers' own experts look at; ours are interpreted."""
    settings = {"transport": "p2p", "experts_implementation": experts, **FORMATS["rows-and-terms"]}
    given = (make_tiny("qwen3_moe", tmp_path), settings, SMALL)
    for error, compiled in on_ranks(logits_differ, 2, *given, env={"TRITON_INTERPRET": "1"}, timeout_s=300):
        assert 1e-3 < error < NEAR
        assert compiled == 0


def bfloat16_model(group: tf.EPGroup, path: Path, transport: str) -> list[float]:
    """How far the logits are with terms of float8 from those with terms of bfloat16, as a part of their norm."""
    quiet()
    ids, found = torch.tensor(prompts((9,), group.rank)), []
    for combine_dtype in (None, FLOAT8):
        model = load(path, group, dtype=torch.bfloat16, transport=transport, combine_dtype=combine_dtype)
        assert model.expert_parallel.workspace.combine_dtype == (combine_dtype or torch.bfloat16)
        with torch.no_grad():
            found.append(model(ids).logits.float())
        model.expert_parallel.finish()
        model.expert_parallel.close()
    return [((found[1] - found[0]).norm() / found[0].norm()).item()]


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_terms_of_float8_in_a_bfloat16_model(on_ranks: RankPools, tmp_path: Path, family: str) -> None:
    path = make_tiny(family, tmp_path)
    for [error] in on_ranks(bfloat16_model, 2, path, "collective", timeout_s=200):
        assert 1e-4 < error < 0.2


# --- wrong settings ---------------------------------------------------------------------------------------------------


def refused(group: tf.EPGroup, path: Path, settings: dict[str, Any]) -> str:
    quiet()
    with pytest.raises(tf.ConfigError) as caught:
        load(path, group, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dispatch_format": "fp8_block128", "exact": True}, "exact=True and dispatch_format 'fp8_block128' exclude one another"),
        ({"combine_dtype": FLOAT8, "exact": True}, "exact=True and combine_dtype torch.float8_e4m3fn exclude one another; leave"),
        ({"dispatch_format": "bytes"}, "dispatch_format 'bytes' carries no hidden rows of a model"),
        ({"dispatch_format": "fp8"}, "dispatch_format must be a RowFormat or one of same, fp8_block128, bytes, got 'fp8'"),
        ({"combine_dtype": torch.float8_e5m2}, "combine_dtype must be one of .*float8_e4m3fn"),
    ],
    ids=["exact-rows", "exact-terms", "bytes", "unknown", "another-float8"],
)
def test_formats_that_a_model_cannot_have(on_ranks: RankPools, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    path = make_tiny("qwen3_moe", tmp_path)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(on_ranks(refused, 1, path, settings, timeout_s=100)[0])
