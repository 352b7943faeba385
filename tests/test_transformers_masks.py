"""Attention masks of four dimensions, which say for each token whom it sees: what forwards and `generate()` make of them."""

import pytest
import torch
from transformers import StaticCache
from transformers.masking_utils import create_masks_for_generate

from graphed_model import Graphed
from test_transformers_graphs import graphed, paths  # noqa: F401 - fixtures
from tokenferry.errors import ShapeError

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs

IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])
BATCH, LENGTH = IDS.shape


def whole_mask() -> torch.Tensor:
    """[B, 1, N, N]: causal, and the first prompt's first two tokens are seen by themselves alone."""
    mask = torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool))[None, None].repeat(BATCH, 1, 1, 1)
    mask[0, :, 2:, :2] = False
    return mask


@pytest.mark.parametrize("graphed", ["qwen3_moe", "gpt_oss"], indirect=True)
@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
def test_a_forward_takes_it(graphed: Graphed, added: bool) -> None:  # noqa: F811
    mask = whole_mask()
    if added:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    found, expected, plain = (
        graphed.model(IDS, attention_mask=mask).logits,
        graphed.plain(IDS, attention_mask=mask).logits,
        graphed.plain(IDS).logits,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-2, "the mask makes no difference"


@pytest.mark.parametrize("prompt", ["input_ids", "inputs_embeds"])
def test_generate_says_so_before_any_step(graphed: Graphed, prompt: str) -> None:  # noqa: F811
    """With `inputs_embeds` transformers fails after the prompt's forward, by torch's own error of a concatenation."""
    model = graphed.model
    given = IDS if prompt == "input_ids" else model.get_input_embeddings()(IDS)
    steps = model.expert_parallel.workspace.last_step
    with pytest.raises(ShapeError, match=r"must be \[batch, length\] in generate\(\), .* got \[2, 1, 5, 5\]"):
        model.generate(**{prompt: given}, attention_mask=whole_mask(), max_new_tokens=4)
    assert model.expert_parallel.workspace.last_step == steps
    graphed.expect_equal()


@pytest.mark.parametrize("graphed", ["qwen3_moe", "gpt_oss"], indirect=True)
def test_masks_of_a_decode_step_are_left_as_they_are(graphed: Graphed) -> None:  # noqa: F811
    """They were taken for [batch, length] once, and a model that passes such a mask on got one of another shape."""
    model, mask = graphed.model, torch.ones(BATCH, 1, 1, 20, dtype=torch.bool)
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(IDS, past_key_values=cache)
    given = {"inputs_embeds": torch.zeros(BATCH, 1, 64), "attention_mask": mask, "past_key_values": cache}
    found = model.create_masks_for_generate(config=model.config, **given)
    expected = create_masks_for_generate(config=model.config, **given)
    found, expected = (each if isinstance(each, dict) else {"": each} for each in (found, expected))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[kind], expected[kind]) for kind in expected)
