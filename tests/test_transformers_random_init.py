"""Models with random weights on one rank: of which dtype they are."""

from typing import Any

import pytest
import torch

import tokenferry as tf
from tokenferry.errors import ConfigError
from tokenferry.integrations.transformers import from_config
from tokenferry.testing.tiny_models import tiny_config

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs


def make(dtype: Any, configured: torch.dtype | None = None) -> Any:
    config = tiny_config("qwen3_moe")
    config.dtype = configured
    return from_config(config, group=tf.EPGroup(device="cpu"), max_tokens_per_rank=4, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "configured", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
        ("auto", torch.float32, torch.float32),
        ("auto", None, torch.bfloat16),
    ],
)
def test_the_weights_have_the_dtype_that_was_asked_for(dtype: Any, configured: torch.dtype | None, expected: torch.dtype) -> None:
    model = make(dtype, configured)
    assert {each.dtype for each in model.parameters()} == {expected}
    model.expert_parallel.close()


@pytest.mark.parametrize("dtype", ["float31", "nn", 16, None])
def test_what_is_no_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="dtype must be a torch dtype, the name of one"):
        make(dtype)
