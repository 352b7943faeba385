"""What the one-process tests of Megatron-Core's classes share."""

import pytest
import torch

from tokenferry.integrations import megatron

BASE, NCCL, NVLS = "InferenceAllGatherDispatcherBase", "NCCLAllGatherDispatcher", "NVLSAllGatherVDispatcher"
CLASSES = (BASE, NCCL, NVLS)


@pytest.fixture(autouse=True)
def fresh_classes():
    """Every test finds the class attributes as after import."""
    kept = {}
    for name in CLASSES:
        cls = getattr(megatron, name)
        kept[cls] = {key: value for key, value in vars(cls).items() if not callable(value) and not key.startswith("__")}
    yield
    megatron.close()
    for cls, values in kept.items():
        for key, value in values.items():
            if not isinstance(value, classmethod):
                setattr(cls, key, value)
    megatron.InferenceAllGatherDispatcherBase._registry.scalar = None


def config(**changes) -> megatron.InferenceMoEConfig:
    return megatron.InferenceMoEConfig(**{"moe_router_topk": 2, "num_moe_experts": 4, "hidden_size": 8, **changes})


def rows(num_rows: int = 5, topk: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_rows, 1, 8, generator=generator).bfloat16(),
        torch.randint(4, (num_rows, topk), generator=generator),
        torch.rand(num_rows, topk, generator=generator),
    )


def preprocessed(dispatcher, num_rows: int = 5):
    hidden, routing, probs = rows(num_rows)
    return dispatcher.dispatch_preprocess(hidden, routing, probs)
