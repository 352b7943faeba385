"""Masks of a decode step where some layers have a sliding window: those that transformers makes."""

import copy
from typing import Any

import pytest
import torch
from transformers import StaticCache
from transformers.masking_utils import create_masks_for_generate

from tokenferry.integrations.transformers.decode_masks import masks_of_windows
from tokenferry.testing.tiny_models import tiny_config

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs

WINDOW = 16
LENGTH = 24
"""Of the cache."""


def sliding(attention: str = "eager", **values: Any) -> Any:
    config = copy.deepcopy(tiny_config("gpt_oss"))
    assert config.sliding_window == WINDOW
    config._attn_implementation = attention
    config.update(values)
    return config


def filled(config: Any, num_tokens: int) -> StaticCache:
    cache = StaticCache(config=config, max_cache_len=LENGTH)
    for number in range(len(cache.layers)):
        cache.update(torch.ones(2, 2, num_tokens, 16), torch.ones(2, 2, num_tokens, 16), number)
    return cache


def seen(num_tokens: int, padding: int) -> torch.Tensor:
    mask = torch.ones(2, num_tokens + 1, dtype=torch.int64)
    mask[1, :padding] = 0
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [0, 2, 7])
@pytest.mark.parametrize("num_tokens", [8, WINDOW - 1, WINDOW, WINDOW + 1, LENGTH - 1])
def test_masks_are_those_of_the_library(num_tokens: int, padding: int, attention: str, dtype: torch.dtype) -> None:
    config = sliding(attention)
    cache, mask = filled(config, num_tokens), seen(num_tokens, padding)
    expected = create_masks_for_generate(
        config=config, inputs_embeds=torch.empty(2, 1, 0, dtype=dtype), attention_mask=mask, past_key_values=cache
    )
    made = masks_of_windows(config, cache, mask, dtype)
    assert made is not None
    assert made.keys() == expected.keys()
    for kind, found in made.items():
        assert found.dtype == expected[kind].dtype
        assert torch.equal(found, expected[kind])


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        (sliding(layer_types=["full_attention"] * 2), 0),
        (sliding(layer_types=["sliding_attention"]), 0),
        (sliding(layer_types=["sliding_attention", "chunked_attention"]), 0),
        (sliding(is_causal=False), 0),
        (sliding(), 1),
    ],
    ids=["other kinds than the cache has", "a layer too few", "an unknown kind", "not causal", "a mask that is too long"],
)
def test_what_is_not_known_is_left_to_the_library(config: Any, extra: int) -> None:
    assert masks_of_windows(config, filled(sliding(), 8), seen(8 + extra, 0), torch.float32) is None
