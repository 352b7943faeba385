"""What is known to wait for the host in a model's forward, before a capture is tried."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tokenferry as tf
from tokenferry.integrations.transformers import from_config
from tokenferry.integrations.transformers.capturable import why_layer_waits, why_not_captured
from tokenferry.testing.tiny_models import tiny_config

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs


def model_of(family: str = "qwen3_moe", *, dtype: torch.dtype = torch.bfloat16, transport: str = "local", **kwargs: Any) -> Any:
    group = tf.EPGroup(device="cpu")
    return from_config(tiny_config(family), group=group, max_tokens_per_rank=8, transport=transport, dtype=dtype, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"transport": "collective"}, "the transport is 'collective', whose counts pass through the host"),
        ({"exact": True}, "exact=True has the host read every rank's count"),
        ({"dtype": torch.float32}, "in torch.float32 grouped_mm has the host read the rows of each"),
        ({"dtype": torch.float16}, "in torch.float16 grouped_mm has the host read the rows of each"),
        ({"dtype": torch.float32, "experts_implementation": "grouped_mm"}, "in torch.float32 grouped_mm"),
        ({"experts_implementation": "eager"}, "experts_implementation is 'eager'"),
    ],
    ids=["collective", "exact", "float32", "float16", "grouped_mm", "eager"],
)
def test_what_waits_is_named(kwargs: dict[str, Any], said: str) -> None:
    parallel = model_of(**kwargs).expert_parallel
    assert said in (why_not_captured(parallel) or "")
    parallel.close()


@pytest.mark.parametrize(
    ("family", "kwargs"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"dtype": torch.float32, "experts_implementation": "batched_mm"}),
        ("llama4", {"dtype": torch.float32}),
    ],
    ids=["grouped_mm in bfloat16", "batched_mm", "experts without choices"],
)
def test_what_does_not_wait_may_be_captured(family: str, kwargs: dict[str, Any]) -> None:
    parallel = model_of(family, **kwargs).expert_parallel
    assert why_not_captured(parallel) is None
    parallel.close()


class Kernels:
    def __init__(self, *, holds: bool) -> None:
        self.holds = holds


@pytest.mark.parametrize("holds", [True, False])
def test_our_kernels_wait_for_nothing_while_they_run_the_experts(holds: bool) -> None:
    parallel = model_of(dtype=torch.float32).expert_parallel
    layer = parallel.layers[0]
    layer.kernels = Kernels(holds=holds)
    assert (why_layer_waits(layer) is None) == holds
    parallel.close()


def test_rows_that_grouped_mm_refuses_run_by_batched_mm_which_waits_for_nothing(tmp_path: Path) -> None:
    parallel = model_of(dtype=torch.float32).expert_parallel
    layer = parallel.layers[0]
    experts = layer.module
    experts.down_proj = torch.nn.Parameter(experts.down_proj[..., :-2].contiguous(), requires_grad=False)  # type: ignore[index]
    assert why_layer_waits(layer) is None
    parallel.close()
