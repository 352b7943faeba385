"""The MoE layers of known models, as `tokenferry bench layer` builds them with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from tokenferry.activations import Activation

GPT_OSS_GATE: Final = Activation("clamped_swiglu", interleaved=True)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of one MoE layer, from the model's published configuration.

    Attributes:
        router: settings of `RouterConfig` beside the sizes.
        mxfp4: the experts' weights are packed MXFP4.
        shared_size: intermediate size of the shared expert; 0 for none.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    topk: int
    activation: Activation = field(default_factory=Activation)
    bias: bool = False
    shared_size: int = 0
    mxfp4: bool = False
    router: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "router", dict(self.router))


SOFTMAX: Final = MappingProxyType({"renormalize": True, "float32_logits": False})
GPT_OSS: Final = MappingProxyType({"topk_before_score": True, "linear_bias": True, "float32_logits": False})
DEEPSEEK_V3: Final = MappingProxyType({
    "score_function": "sigmoid", "score_correction_bias": True, "num_groups": 8, "topk_groups": 4, "renormalize": True,
    "renormalize_epsilon": 1e-20, "scaling_factor": 2.5,
})  # fmt: skip

PRESETS: Final = (
    Preset(name="qwen3-30b-a3b", hidden_size=2048, intermediate_size=768, num_experts=128, topk=8, router=SOFTMAX),
    Preset(
        name="gpt-oss-20b",
        hidden_size=2880,
        intermediate_size=2880,
        num_experts=32,
        topk=4,
        activation=GPT_OSS_GATE,
        bias=True,
        router=GPT_OSS,
    ),
    Preset(
        name="gpt-oss-20b-mxfp4",
        hidden_size=2880,
        intermediate_size=2880,
        num_experts=32,
        topk=4,
        activation=GPT_OSS_GATE,
        bias=True,
        mxfp4=True,
        router=GPT_OSS,
    ),
    Preset(
        name="gpt-oss-120b",
        hidden_size=2880,
        intermediate_size=2880,
        num_experts=128,
        topk=4,
        activation=GPT_OSS_GATE,
        bias=True,
        router=GPT_OSS,
    ),
    Preset(
        name="deepseek-v3",
        hidden_size=7168,
        intermediate_size=2048,
        num_experts=256,
        topk=8,
        shared_size=2048,
        router=DEEPSEEK_V3,
    ),
    Preset(name="mixtral-8x7b", hidden_size=4096, intermediate_size=14336, num_experts=8, topk=2, router=SOFTMAX),
)
"""All of deepseek-v3's experts fit: on 2 ranks 11.3 GB of bfloat16 each."""

REHEARSAL: Final = (
    Preset(name="tiny", hidden_size=64, intermediate_size=48, num_experts=8, topk=2, router=SOFTMAX),
    Preset(
        name="tiny-oss",
        hidden_size=64,
        intermediate_size=48,
        num_experts=8,
        topk=2,
        activation=GPT_OSS_GATE,
        bias=True,
        router=GPT_OSS,
    ),
    Preset(
        name="tiny-mxfp4",
        hidden_size=64,
        intermediate_size=96,
        num_experts=8,
        topk=2,
        activation=GPT_OSS_GATE,
        bias=True,
        mxfp4=True,
        router=GPT_OSS,
    ),
    Preset(
        name="tiny-v3",
        hidden_size=64,
        intermediate_size=32,
        num_experts=16,
        topk=4,
        shared_size=32,
        router=DEEPSEEK_V3,
    ),
)
"""Small enough for CPUs: every call and every check, no figures."""
